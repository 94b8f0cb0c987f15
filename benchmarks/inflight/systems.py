"""All systems by name, and which of them can run here."""

import importlib.util
from collections.abc import Sequence

from .. import record
from . import hf, public, vllm
from .system import System

ALL: tuple[System, ...] = (*hf.SYSTEMS, *public.SYSTEMS, *vllm.SYSTEMS)
ORDER = tuple(system.name for system in ALL)


def why_not(system: System) -> str:
    """Why ``system`` cannot run here; empty if it can."""
    wants = getattr(system, "wants", ())
    if missing := [name for name in wants if importlib.util.find_spec(name) is None]:
        return f"needs {' and '.join(missing)}"
    second = getattr(system, "second_runner", None)
    if second is not None and second != vllm.second_runner():
        return f"runs where VLLM_USE_V2_MODEL_RUNNER={int(second)} is set" if second else "runs where VLLM_USE_V2_MODEL_RUNNER is not 1"
    return ""


def known() -> dict[str, str]:
    """What every system is, or why it cannot run here."""
    return {s.name: f"({why})" if (why := why_not(s)) else s.about for s in ALL}


def chosen(names: Sequence[str] | None = None) -> list[System]:
    """The systems of these names, in their order; by default all that can run here.

    Raises:
        ValueError: a name that none has.
        ImportError: one that cannot run here.
    """
    if names is None:
        return [s for s in ALL if not why_not(s)]
    by_name = {s.name: s for s in ALL}
    if unknown := [n for n in names if n not in by_name]:
        raise ValueError(f"system: {', '.join(unknown)}; expected some of {', '.join(by_name)}")
    found = [by_name[n] for n in names]
    for system in found:
        if why := why_not(system):
            raise ImportError(f"system: {system.name} {why}")
    return found


def versions(system: System) -> dict[str, str]:
    """Of the packages that ``system`` wants besides those that every row has."""
    wants = getattr(system, "wants", ())
    return {"package": "; ".join(f"{n} {v}" for n in (*wants, *(f"{w}-cpu" for w in wants)) if (v := record.version(n)))}
