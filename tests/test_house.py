"""The limits that CONTRIBUTING.md sets to files, functions and folders."""

import ast
from pathlib import Path

import pytest

import hf_orthograd


PACKAGE = Path(hf_orthograd.__file__).parent
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_no_folder_holds_more_than_ten_files(folder):
    assert len(list(folder.glob("*.py"))) <= 10


def test_no_file_and_no_function_is_too_long():
    too_long = [f"{path.name}: {lines}" for path in FILES if (lines := len(path.read_text().splitlines())) > 400]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
                if body[-1].end_lineno - body[0].lineno + 1 > 60:
                    too_long.append(f"{path.name}, {node.name}")
    assert too_long == []
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) <= 350
