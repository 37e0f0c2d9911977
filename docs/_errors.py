"""Lists every error that the library raises, from its source: `python docs/_errors.py > docs/errors.md`."""

import ast
from pathlib import Path


PACKAGE = Path(__file__).parent.parent / "hf_orthograd"
ROOMS = {
    "": "Trainer and configuration",
    "validation": "Before the first step",
    "preparation": "Engine and starting model",
    "data": "Data",
    "gradients": "Gradient engines",
    "objectives": "Losses",
    "parallel": "Several processes",
    "callbacks": "Stopping and resuming",
    "baselines": "Baselines",
    "evaluation": "Evaluation",
    "publishing": "Publishing",
    "requests": "Requests over time",
    "commands": "Command line",
}
HEAD = """# Errors

What each error says. `...` stands for what was given. Most messages end with what to do; where one states a rule, keep to it.
(Made by `python docs/_errors.py` from the source; a test holds the list complete.)
"""


def template(node: ast.AST) -> str:
    """The text of a message, with `...` for what is put into it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "..."


def raised(path: Path) -> list[tuple[str, str]]:
    """Kind and message of each error that a file makes; what is only passed on has no message of its own."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith("Error"):
            text = template(node.args[0]).strip()
            if any(letter.isalpha() for letter in text):
                found.append((node.lineno, ast.unparse(node.func), text))
    return [(kind, text) for _, kind, text in sorted(found)]


def page() -> str:
    parts = [HEAD]
    for room, title in ROOMS.items():
        files = sorted((PACKAGE / room).glob("*.py") if room == "" else (PACKAGE / room).rglob("*.py"))
        rows = dict.fromkeys(row for path in files for row in raised(path))
        if rows:
            parts += [f"\n## {title}\n", "| it says | kind |", "|---|---|"]
            parts += [f"| {text.replace('|', chr(92) + '|').replace('<', '&lt;')} | `{kind}` |" for kind, text in rows]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
