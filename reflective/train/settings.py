"""What a training run depends on beside the model. No torch here: the command line has its defaults from this."""

from dataclasses import InitVar, dataclass
from typing import Any, Literal

Way = Literal["head", "backbone", "joint"]


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Attributes:
        way: what is trained: the head on recorded features; the backbone too, from outcomes; policy and head together.
        task: ``sums``, ``chain_sum``, ``reasoning-gym:<dataset>``, or a JSONL or parquet file, see ``read_questions``.
        verifier: see ``reflective.train.verifier``; None: that of the reasoning-gym dataset, else ``answer``.
        data: JSONL or parquet file of judged responses, in place of a task, see ``read_rollouts``.
        questions, eval_questions: to learn from, and others to measure on. Of ``data`` at most a third is measured on,
            and the rest is learnt from.
        samples: responses to each question.
        temperature, top_p, max_new_tokens: of responses.
        batch_rows: responses decoded together.
        epochs: passes of the head alone over the rollouts.
        warmup: epochs (``head``) or optimizer steps in plain BCE before the dynamic weights; None: never dynamic; 0:
            from the start, as published. The head that other ways begin with is always fitted in plain BCE.
        lr: of the head; published ones were trained with 1e-5.
        batch: different trajectories an optimizer step (``joint``: answers), over all processes.
        within_questions: only questions answered both ways, their two sides weighted equally.
        class_balance: weigh the two outcomes of a batch against each other.
        layers: what the head reads, as indices of ``hidden_states``; several are concatenated. A tuple, or as text ``"-9"`` or
            ``"-9,-2"``. ``"auto"``: that of several, each tried alone, whose head tells right from wrong best within a quarter of
            the training questions that it has not learnt from; ``"auto:-2,-6,-9"``: of these. None: where the model's head, or
            ``continue_head``, reads, and that is -2 unless it says otherwise.
        at: which token's state stands for a step, see ``Tap``; None: as the checkpoint says.
        width: hidden units of a new head; None: twice as many as inputs. ``units`` is another name for it.
        continue_head: published head to go on from; None: a new one.
        lora: rank of LoRA layers (``backbone``, ``joint``); None: all weights.
        backbone_lr: of LoRA layers or backbone.
        backbone_epochs: passes over the rollouts (``backbone``).
        steps, group: optimizer steps, and answers to each of their questions (``joint``).
        head_updates: steps that the head takes by itself after each of these, on what was drawn last (``joint``); 0: one with the policy,
            as published, see ``ReflectiveGRPOConfig``.
        settle: training questions that the trained policy answers once more, at most, and its head is fitted anew to (``joint``); None: all; 0:
            the head stays as it was trained along. Few are no bargain, see ``benchmarks/NOTES.md``, "Joint training and its head".
        gradient_checkpointing: run layers twice and keep less (``backbone``, ``joint``).
        dtype: of rollouts and of the matrix products in training: ``bfloat16``, ``float32``, or ``auto``: rollouts in
            the model's own, training in bfloat16. A head alone is always fitted in float32.
        seed: of everything that is random.
        published: write ``score_module.pt`` too.
    """

    way: Way = "head"
    task: str = "sums"
    verifier: str | None = None
    data: str | None = None
    questions: int = 640
    eval_questions: int = 320
    samples: int = 12
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 64
    batch_rows: int = 256
    epochs: int = 32
    warmup: int | None = None
    lr: float = 3e-4
    batch: int = 64
    within_questions: bool = True
    class_balance: bool = False
    layers: tuple[int, ...] | str | None = None
    at: Literal["predict", "token", "every"] | None = None
    width: int | None = None
    continue_head: str | None = None
    lora: int | None = 8
    backbone_lr: float = 1e-4
    backbone_epochs: int = 1
    steps: int = 100
    group: int = 8
    head_updates: int = 8
    settle: int | None = None
    gradient_checkpointing: bool = False
    dtype: str = "auto"
    seed: int = 0
    published: bool = False
    units: InitVar[int | None] = None

    def __post_init__(self, units: int | None) -> None:
        if units is not None:
            if self.width not in (None, units):
                raise ValueError(f"units={units} and width={self.width} are two names of one setting; give one of them")
            object.__setattr__(self, "width", units)
        object.__setattr__(self, "layers", _layers(self.layers))
        for name, allowed in (("way", ("head", "backbone", "joint")), ("dtype", ("auto", "bfloat16", "float32"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if self.at not in (None, "predict", "token", "every"):
            raise ValueError(f"at={self.at!r}; expected one of predict, token, every")
        if self.automatic and self.continue_head is not None:
            raise ValueError("layers='auto' chooses for a new head; continue_head reads what it was trained on, so leave one of them out")
        if self.published and self.layers not in (None, (-2,)):
            raise ValueError(f"published: the published code reads layer -2, and score_module.pt cannot say that it is {self.layers}")
        if self.way == "joint" and self.data is not None:
            raise ValueError("data: way joint learns from answers of its own; give a task and a verifier")
        for name in ("head_updates", "settle"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.way == "joint" and self.batch % self.group:
            raise ValueError(f"batch={self.batch} is no multiple of group={self.group}")

    @property
    def automatic(self) -> bool:
        """Whether the layer is to be chosen."""
        return isinstance(self.layers, str)

    @property
    def candidates(self) -> tuple[int, ...] | None:
        """Among which, as far as the settings name them."""
        return _indices(self.layers.partition(":")[2]) if self.automatic and ":" in self.layers else None


def _layers(given: Any) -> tuple[int, ...] | str | None:
    """``layers`` as it is kept: a tuple, ``"auto"`` or ``"auto:..."``, or None."""
    if given is None or isinstance(given, str) and given == "auto":
        return given
    if isinstance(given, str) and given.startswith("auto:"):
        return "auto:" + ",".join(map(str, _indices(given.removeprefix("auto:"))))
    return _indices(given)


def _indices(given: Any) -> tuple[int, ...]:
    try:
        found = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
        found = tuple(int(layer) for layer in found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layers={given!r}; expected -2, several such as -9,-2, or auto") from error
    if not found or len(set(found)) < len(found):
        raise ValueError(f"layers={given!r}; expected at least one of the hidden_states, and each once")
    return found
