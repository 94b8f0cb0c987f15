"""What docs/ and CONTRIBUTING.md say holds: code runs as it stands there, and what is named exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ("docs/architecture.md", "docs/integrate.md", "CONTRIBUTING.md")


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_integrate():
    names = {"__name__": "integrate"}
    for block in re.findall(r"```python\n(.*?)```", text("docs/integrate.md"), re.DOTALL):
        exec(block, names)  # noqa: S102
