"""Training the SPRM from outcomes alone: the head, the backbone with it, or policy and head together."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..search.verify import verifier
    from .backbone import Step, Tuned, tune
    from .data import (
        Rollouts,
        question_weights,
        read_questions,
        read_rollouts,
        split_questions,
        write_rollouts,
    )
    from .grpo import ReflectiveGRPOConfig, ReflectiveGRPOTrainer, shared_rollouts
    from .head import fit
    from .layers import choose_layer
    from .metrics import Metric, calibration, evaluate, evaluate_seeds, saturation, vote_rule
    from .objective import sprm_objective
    from .ready import readiness
    from .record import record_features
    from .rollout import roll_out
    from .run import table, train
    from .sampler import Sampler
    from .settings import Settings

__all__ = [
    "Metric",
    "ReflectiveGRPOConfig",
    "ReflectiveGRPOTrainer",
    "Rollouts",
    "Sampler",
    "Settings",
    "Step",
    "Tuned",
    "calibration",
    "choose_layer",
    "evaluate",
    "evaluate_seeds",
    "fit",
    "question_weights",
    "read_questions",
    "read_rollouts",
    "readiness",
    "record_features",
    "roll_out",
    "saturation",
    "shared_rollouts",
    "split_questions",
    "sprm_objective",
    "table",
    "train",
    "tune",
    "verifier",
    "vote_rule",
    "write_rollouts",
]
_NAMES = {
    "backbone": ("Step", "Tuned", "tune"),
    "data": ("Rollouts", "question_weights", "read_questions", "read_rollouts", "split_questions", "write_rollouts"),
    "grpo": ("ReflectiveGRPOConfig", "ReflectiveGRPOTrainer", "shared_rollouts"),
    "head": ("fit",),
    "layers": ("choose_layer",),
    "metrics": ("Metric", "calibration", "evaluate", "evaluate_seeds", "saturation", "vote_rule"),
    "objective": ("sprm_objective",),
    "ready": ("readiness",),
    "record": ("record_features",),
    "rollout": ("roll_out",),
    "run": ("table", "train"),
    "sampler": ("Sampler",),
    "settings": ("Settings",),
    ".search.verify": ("verifier",),  # evaluation has it, too
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_EXTRA = ("accelerate", "datasets", "math_verify", "peft", "pyarrow", "reasoning_gym", "trl")


def __getattr__(name: str) -> Any:
    """Import a name on first use: each way of training needs its own packages, and only those."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras():
        value = globals()[name] = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@contextmanager
def extras() -> Iterator[None]:
    """Within, a missing optional package is an ImportError that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _EXTRA:
            raise ImportError(f'{error.name} is not installed: pip install "reflective-kernels[train]"') from error
        raise
