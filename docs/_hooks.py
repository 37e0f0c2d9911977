"""What mkdocs does not do by itself: pages of the repository outside of `docs/`, and names in docstrings."""

import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)((?:benchmarks|examples|README)[^)#]*)(#[^)]*)?\)")
SHOWN = (".md", ".png", ".yaml", ".py", ".json", ".jsonl", ".ipynb")


def on_files(files, config):
    """Results and examples that the guides link to are part of the site, under their own names."""
    for folder in ("benchmarks/results", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SHOWN and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """`../benchmarks/x.md`, right for who reads the file, becomes a link within the site."""
    up = "../" * page.file.src_uri.count("/")

    def inside(found):
        return f"]({up}{found[2]}{found[3] or ''})"

    return OUTSIDE.sub(inside, markdown)


def on_page_content(html, page, config, files):
    """Names and types in docstrings, as transformers writes them: [`Name`], and `float` within a table of types."""
    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    return re.sub(r"<code>[^<]*`[^<]*</code>", lambda found: found[0].replace("`", ""), html)
