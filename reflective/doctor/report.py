"""What ``reflective doctor`` found, as text, as JSON and as a block for a bug report: without secrets, and without whose machine it is."""

import getpass
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "differs", "broken", "not here"]
BAD = ("differs", "broken")
_LONG = 400  # characters of an error that are shown


@dataclass
class Check:
    """One check, and what came of it.

    Attributes:
        name: what was checked.
        status: ``ok``; ``differs``: it ran, and its numbers are not those expected; ``broken``: it is installed and does not run;
            ``not here``: there is nothing to check.
        detail: by how much it differs and what was expected, or why it is not here.
        advice: what to do, where the status is bad.
        measured, allowed: the largest difference, and the largest that rounding can make; None where there is no such number.
        seconds: that it took.
    """

    name: str
    status: Status
    detail: str = ""
    advice: str = ""
    measured: float | None = None
    allowed: float | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """Attributes: ``facts``: of this installation, by section and name; ``checks``: in their order."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all that is here agrees."""
        return not any(check.status in BAD for check in self.checks)

    def json(self) -> dict[str, Any]:
        """Without secrets and home directories, as everything that is shown."""
        return {
            "ok": self.ok,
            "facts": {section: {k: clean(v) for k, v in said.items()} for section, said in self.facts.items()},
            "checks": [{k: clean(v) if isinstance(v, str) else v for k, v in asdict(c).items()} for c in self.checks],
        }

    def verdict(self) -> str:
        """In a line."""
        counts = {status: sum(c.status == status for c in self.checks) for status in ("ok", "differs", "broken", "not here")}
        told = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        if self.ok:
            return f"All that is here agrees: {told}."
        return f"Something is wrong: {told}."

    def paste(self) -> str:
        """Markdown for a bug report."""
        lines = ["<details><summary>reflective doctor: " + self.verdict() + "</summary>", "", "```text"]
        for section, said in self.facts.items():
            lines += [f"[{section}]", *(f"{name}: {clean(value)}" for name, value in said.items()), ""]
        lines.append("[checks]")
        for check in self.checks:
            lines.append(f"{check.status:8} {check.name}: {clean(check.detail)}".rstrip(": "))
        return "\n".join([*lines, "```", "", "</details>"])


def clean(text: str) -> str:
    """``text`` without home directories, the user's name in paths, environments' places, and what looks like a token."""
    for place, name in _places():
        text = text.replace(place, name)
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without a name for its user
        user = ""
    if len(user) > 1:
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "USER", text)
    text = re.sub(r"(?i)(/(?:home|users)/|[a-z]:\\users\\)[^/\\\s:'\"]+", r"\1USER", text)
    text = re.sub(r"\b(?:hf|sk|ghp|gho|pypi)[-_][A-Za-z0-9_-]{8,}", "***", text)
    text = re.sub(r"://[^/@\s]+@", "://***@", text)  # user and password in an address
    return text


def _places() -> Iterable[tuple[str, str]]:
    """The longest first: an environment may lie at home."""
    package = Path(__file__).resolve().parents[2]
    found = {
        str(package): "PACKAGE", sys.prefix: "ENV", sys.base_prefix: "PYTHON", str(Path(os.path.expanduser("~"))): "~",
        os.path.realpath(os.path.expanduser("~")): "~",
    }  # fmt: skip
    return sorted(((k, v) for k, v in found.items() if len(k) > 1), key=lambda item: -len(item[0]))


def short(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _LONG else text[:_LONG] + "…"
