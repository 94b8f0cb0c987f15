"""Strategies whose rule was calibrated on questions, and lies as a JSON file beside the head."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from ...utils.outputs import json_text, write_text
from . import Strategy

_MOST = 4096  # candidates that a checkpoint's rule may ask for


@dataclass
class Calibrated(Strategy):
    """Base of those strategies.

    Attributes:
        file: name of the rule's file.
        rule: the fields that are in it, the first of which must be given where there is no file.
    """

    file: ClassVar[str]
    rule: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, self.rule[0]) is None:
            kind = type(self).__name__
            raise ValueError(
                f"{self.name}: no {self.rule[0]}; use {kind}.calibrate, {kind}.load or a checkpoint that comes with one"
            )

    @classmethod
    def of(cls, home: str | Path | None, **settings: Any) -> Self:
        if cls.rule[0] in settings or not cls.lies_in(home):
            return cls(**settings)
        return cls.load(Path(home) / cls.file, **settings)

    @classmethod
    def lies_in(cls, home: str | Path | None) -> bool:
        """Whether the checkpoint at ``home`` comes with the rule."""
        return home is not None and (Path(home) / cls.file).is_file()

    def save(self, path: str | Path) -> None:
        """Write the rule to a JSON file, or under its name into a directory.

        Raises:
            ValueError: a rule of what is no number. OSError: ``path`` cannot be written.
        """
        rule = {k: getattr(self, k) for k in self.rule}
        for name, value in rule.items():
            if isinstance(value, float) and not math.isfinite(value):  # as of questions whose step scores are missing
                raise ValueError(f"{name}={value}: {self.file} holds numbers alone; calibrate on questions with scores")
        path = Path(path) / self.file if Path(path).is_dir() else Path(path)
        write_text(path, json_text(rule, indent=2) + "\n", "path")

    @classmethod
    def load(cls, path: str | Path, **settings: Any) -> Self:
        """What ``save`` wrote, with ``settings`` in its place.

        Raises:
            ValueError: the file, which is named, holds no rule.
        """
        path = Path(path) / cls.file if Path(path).is_dir() else Path(path)
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            cls._check(said)
            return cls(**said | settings)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a valid {cls.file}: {error}") from error

    @classmethod
    def _check(cls, said: Any) -> None:
        """The file comes with a checkpoint, and may hold anything.

        Raises:
            ValueError: what is no field of the rule; another value than a number, or the name of an aggregation; more candidates than anybody
                has asked for.
        """
        if not isinstance(said, dict):
            raise ValueError(f"expected an object, found {type(said).__name__}")  # noqa: TRY004
        if unknown := sorted(said.keys() - set(cls.rule)):
            raise ValueError(f"unknown {', '.join(unknown)[:200]}; it holds {', '.join(cls.rule)}")
        for name, value in said.items():
            kind = str if name == "aggregation" else int | float
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}: expected a {'name' if kind is str else 'number'}, found {value!r:.60}")
        if (n := said.get("n")) is not None and not 1 <= n <= _MOST:
            raise ValueError(f"n={n}: expected 1 to {_MOST} candidates")
