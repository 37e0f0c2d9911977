"""What is public is documented: each name, its shapes, its errors, and its page in the reference."""

import ast
import importlib
import inspect
import re
import runpy
import textwrap
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
MODULES = (
    "hf_orthograd", "hf_orthograd.baselines", "hf_orthograd.callbacks", "hf_orthograd.data", "hf_orthograd.evaluation",
    "hf_orthograd.evaluation.text", "hf_orthograd.gradients", "hf_orthograd.objectives", "hf_orthograd.publishing",
    "hf_orthograd.requests",
)  # fmt: skip


SHAPE = re.compile(
    r"[Ss]hape|scalar|by (name of each )?parameter|\((1 \+ )?[a-zA-Z]{1,2},[^)]{0,20}\)"
)  # as (n,), (B, T), (1 + k, 1 + k)


def public(module):
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


def documented_errors(thing) -> bool:
    return "Raises:" in (thing.__doc__ or "")


def raises_on_input(function) -> bool:
    """Whether its own body raises a `ValueError`, which a caller could have avoided."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return any(ast.unparse(exception.func) == "ValueError" for exception in raised)


def takes_tensors(function) -> bool:
    """Or returns some. A method without a docstring has that of the class it overrides."""
    if not function.__doc__:
        return False
    annotations = [str(one) for one in function.__annotations__.values()]
    return any(re.search(r"\b(Tensor|ndarray)\b", one) and "Callable" not in one for one in annotations)


def callables(module):
    """Public functions, and public methods of public classes with the class."""
    for name, thing in public(module).items():
        if inspect.isfunction(thing):
            yield name, thing, None
        elif inspect.isclass(thing):
            for method, function in vars(thing).items():
                function = getattr(function, "__func__", function)
                written = inspect.isfunction(function) and "<string>" not in function.__code__.co_filename
                if written and (not method.startswith("_") or method == "__init__"):
                    yield f"{name}.{method}", function, thing


@pytest.mark.parametrize("module", MODULES)
def test_each_name_is_documented(module):
    undocumented = [
        name
        for name, thing in public(module).items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not (thing.__doc__ or "").strip()
    ]
    assert not undocumented
    signatures = [name for name, thing in public(module).items() if (thing.__doc__ or "").startswith(f"{name}(")]
    assert not signatures  # that is what a dataclass without a docstring gets


@pytest.mark.parametrize("module", MODULES)
def test_errors_and_shapes_are_documented(module):
    errors, shapes = [], []
    for name, function, owner in callables(module):
        documented = documented_errors(function) or documented_errors(owner)
        if raises_on_input(function) and not documented:
            errors.append(name)
        of_class = owner is not None and function.__name__ == "__init__"
        text = f"{function.__doc__} {owner.__doc__ if of_class else ''}"
        if takes_tensors(function) and not SHAPE.search(text):
            shapes.append(name)
    assert (errors, shapes) == ([], [])


@pytest.mark.parametrize("module", MODULES)
def test_reference_lists_each_name(module):
    pages = [path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")]
    (page,) = [text for text in pages if f"::: {module}\n" in text]
    assert re.findall(r"^        - (\w+)$", page, re.M) == list(public(module))


def test_list_of_errors_is_complete():
    page = runpy.run_path(str(ROOT / "docs" / "_errors.py"))["page"]
    assert (ROOT / "docs" / "errors.md").read_text() == page() + "\n", "run: python docs/_errors.py > docs/errors.md"


def test_long_sentences_are_found(tmp_path):
    check = runpy.run_path(str(ROOT / "docs" / "_sentences.py"))
    long, short = "word " * 31, "word " * 15
    path = tmp_path / "page.md"
    path.write_text(f"# Title\n\n{short}. Then {short}.\n\n| {long} |\n\n```\n{long}\n```\n")
    assert check["main"]([str(path)]) == 0
    path.write_text(f"- {short}\n  {short}, and more.\n")
    assert check["main"]([str(path)]) == 1
