"""README.md and the pages in docs/ as tests read them: their blocks of code, links, and commands. A page that is added is tested by being there.

A block of Python runs in the tests, after those above it on the page and in the same names, unless a comment right before its fence says which test runs it::

    <!-- run by: tests/in_vllm/test_texts.py -->
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(?:<!-- run by: ([\w/.]+) -->\n)?^([ ]*)```(\w*)[^\n]*\n(.*?)^\2```", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(r"^(?:python3? -m reflective|accelerate launch .*-m reflective|reflective)(?= |$)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes: ``run_by``: the test that runs it, where that is not the one of all pages; None otherwise.
    """

    page: str
    line: int
    language: str
    code: str
    run_by: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def names() -> list[str]:
    """README.md and every page, by its path in the repository."""
    return ["README.md", *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*.md")))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, *languages: str) -> list[Block]:
    """The blocks of a page, of these languages; of all, if none is given."""
    whole = text(name)
    found = []
    for match in _BLOCK.finditer(whole):
        indent, code = match[2], match[4]
        code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(name, whole.count("\n", 0, match.start(4)) + 1, match[3], code, match[1]))
    return [b for b in found if not languages or b.language in languages]


def prose(name: str) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", text(name))


def lines(name: str) -> Iterator[tuple[str, list[str]]]:
    """Every shell command that a page shows, in blocks and within sentences: where it stands, and its words."""
    for block in blocks(name, "sh", "bash", "shell", "console"):
        yield from _commands(block)
    for inline in re.findall(r"(?<!`)`((?:reflective|make|python) [^`\n]+)`", prose(name)):
        try:
            yield f"{name}: {inline}", shlex.split(inline)
        except ValueError:  # an apostrophe: a sentence, not a command
            continue


def _commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """A quoted argument may go over several lines."""
    whole = ""
    for line in block.code.replace("\\\n", " ").splitlines():
        whole += line.removeprefix("$ ")
        try:
            words = shlex.split(whole, comments=True)
        except ValueError:  # within quotes
            whole += "\n"
            continue
        if words:
            yield f"{block}: {whole}", words
        whole = ""
    assert not whole, f"{block}: no closing quotation"


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """Of these the calls of ``reflective``: where one stands, and its arguments."""
    for where, words in lines(name):
        words = [w for before, w in zip(["", *words], words, strict=False) if w not in (">", "<") and before not in (">", "<")]  # no redirections
        pipes = " ".join(shlex.quote(w) if w not in "|&&" else w for w in words).split(" | ")
        for part in pipes:
            if match := _COMMAND.match(part):
                yield where, shlex.split(part[match.end() :])
