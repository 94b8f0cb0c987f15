"""``reflective doctor``: what is installed here, whether it agrees with what is recorded, and what to paste into a bug report."""

from collections.abc import Callable

from . import facts
from .apart import examined
from .report import Check, Report, short

__all__ = ["Check", "Report", "examine"]


def examine(
    quick: bool = False,
    *,
    begun: Callable[[str, int, int], None] = lambda name, i, n: None,
    found: Callable[[Check], None] = lambda check: None,
) -> Report:
    """Look at this installation, and check it against the known trajectory.

    Nothing raises here: what is broken is a line of the report.

    Args:
        quick: without vLLM and without the default model.
        begun: called before a check with its name, its number and how many there are.
        found: called with every check.
    """
    report = Report()
    for section, ask in (
        ("versions", facts.versions), ("machine", facts.machine), ("places", facts.places), ("environment", facts.environment),
    ):  # fmt: skip
        try:
            report.facts[section] = ask()
        except Exception as error:  # noqa: BLE001, a report with a hole is better than none
            report.facts[section] = {"could not be read": short(error)}
    if not report.facts["environment"]:
        report.facts["environment"] = {"set": "none of those that matter"}
    report.facts["backends"] = {}
    for told in examined(quick, begun):
        if isinstance(told, Check):
            report.checks.append(told)
            found(told)
        else:
            for name, value in told.items():
                section, name = ("backends", name.removeprefix("backend ")) if name.startswith("backend ") else ("machine", name)
                report.facts[section][name] = value
    if not report.facts["backends"]:
        report.facts["backends"] = {"unknown": "the package could not be imported"}
    return report
