import re
from pathlib import Path

from setuptools import find_packages, setup


VERSION = re.search(r'__version__ = "(.+)"', Path("hf_orthograd/__init__.py").read_text()).group(1)

REQUIRED = [
    "torch>=2.11",
    "transformers>=5.17,<6",
    "accelerate>=1.10",
    "peft>=0.18",
    "pyyaml>=6.0.1",
    "datasets>=4.0",
    "evaluate>=0.4.6",
    "filelock>=3.12",
    "huggingface_hub>=1.5",
    "jinja2>=3.1",
    "jiwer>=4.0",
    "markupsafe>=2.1.3",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "psutil>=5.9",
    "pyarrow>=21.0",
    "rouge-score>=0.1.2",
    "scikit-learn>=1.5",
    "scipy>=1.15",
    "soundfile>=0.13",
]
BENCH = ["opacus>=1.6", "torchjd>=0.18"]
COMPLETION = ["argcomplete>=3.5"]
DEMO = ["espeakng-loader>=0.2.4"]
SIGN = ["model-signing>=1.1", "pyopenssl>=24"]  # the first imports the second without naming it
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.30"]
QUALITY = ["mypy>=1.18", "ruff==0.17.6"]
TESTS = [
    "build>=1.2",
    "ipykernel>=6.29",
    "nbclient>=0.10",
    "pytest>=8.0",
    "pytest-cov>=6.0",
    "pytest-xdist>=3.6",
]

setup(
    name="hf-orthograd",
    version=VERSION,
    description="Machine unlearning for Hugging Face models by retain-orthogonal gradients: a drop-in Trainer.",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["hf_orthograd", "hf_orthograd.*"]), "hf_orthograd.scripts"],
    package_dir={"hf_orthograd.scripts": "examples"},  # what `hf-orthograd unlearn` runs
    package_data={
        "hf_orthograd": ["py.typed"],
        "hf_orthograd.evaluation.reporting": ["templates/*.html"],
        "hf_orthograd.publishing": ["templates/*.md"],
        "hf_orthograd.scripts": ["accelerate/*.yaml"],
    },
    entry_points={"console_scripts": ["hf-orthograd = hf_orthograd.__main__:main"]},
    install_requires=REQUIRED,
    extras_require={
        "bench": BENCH,
        "completion": COMPLETION,
        "demo": DEMO,
        "dev": COMPLETION + DEMO + DOCS + QUALITY + SIGN + TESTS,
        "docs": DOCS,
        "sign": SIGN,
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
