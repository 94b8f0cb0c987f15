"""reflective train: from questions, or from responses that were judged elsewhere, to a head, an adapter or a model."""

import copy
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from rich.table import Table

from .. import __version__
from ..checkpoints.config import told
from ..engines.hf.backbone import Backbone
from ..model import CONFIG_NAME, ReflectiveModel
from ..scoring.sprm import NAMES, SPRM
from ..scoring.taps import Tap
from ..search.verify import Verifier, verifier
from ..tasks import TASKS, Question, gym, split
from ..utils.fingerprint import fingerprint
from ..utils.outputs import finite, folder, json_text, write_text
from . import extras
from .data import Rollouts, question_weights, read_questions, read_rollouts, split_questions
from .head import check_trainable, fit
from .layers import candidates, choose_layer
from .metrics import Metric, evaluate
from .processes import Processes
from .record import record_features
from .rollout import recorded, roll_out
from .settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .backbone import Step, Tuned

_SHOWN = ("pass@1", "majority", "weighted_vote", "best_of", "any", "auc_within", "score_gap", "kept", "ece")
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl")
_GYM = "reasoning-gym:"
_WATCHED = 64  # questions of the evaluation that the progress bar's numbers are of
_BLOCK = 4096  # trajectories read before their features are written down
_LATER = ("layers", "at")  # settings that runs of before do not have; where they are not given nothing has changed
_SETTLED_DROPOUT = 0.1  # 0.5, as published, is for a head that learns while the policy changes
_DAY = timedelta(days=1)  # processes that are done with their share of the rollouts wait for the others


def train(
    model: ReflectiveModel, settings: Settings, output: str | Path, bars: Progress | None = None
) -> dict[str, Any]:
    """Roll out or read, train, and measure on questions that training never saw.

    Ways ``backbone`` and ``joint`` begin with a head fitted to the model as it is, or ``continue_head``; ``before``
    is measured with that. They train ``model`` in place, and leave a LoRA adapter merged into it. After way ``joint`` the head is fitted
    again, to answers of the policy that moves no more (``settings.settle``). Under ``accelerate
    launch`` the processes share the work; the main one writes. A run that was killed goes on, and one that is over only
    returns its report.

    ==============================  ==================================================================================
    ``score_module.safetensors``    the head; ``score_module.pt`` too if ``published``
    ``reflective.json``             how it is used
    ``adapter_*`` or the model      of ways ``backbone`` and ``joint``, with the tokenizer
    ``report.json``                 what is returned
    ``log.jsonl``                   loss, kept steps and score gap of every epoch or step
    ``rollouts/``                   answers and features, for a killed run or one with other settings of training
    ``unfinished-*/``               states of training, until the run is over
    ==============================  ==================================================================================

    Args:
        output: their directory.
        bars: shows every stage; None: nothing is shown.

    Returns:
        ``run`` (settings; fingerprints of model and files), ``versions``, ``tap`` (where the head reads), ``layers`` (where one was
        chosen: of each the AUC within held-back training questions), ``rollouts`` (counts), ``seconds`` (of each stage, since the
        last start), ``metrics``, ``before`` and, of way ``joint``, ``along``, with the head as it was before it was fitted again: by name ``value``,
        ``low`` and ``high`` as from ``evaluate``, None for NaN.

    Raises:
        ValueError: an unknown task, too few questions, no way to judge answers, nothing to learn from, or ``output``
            holds rollouts of another model or made with other settings.
        ImportError: a package of the ``train`` extra is missing.
    """
    with extras():
        return _Run(model, settings, Path(output).expanduser(), bars).report()


def table(report: dict[str, Any]) -> Table:
    """What ``train`` returns, for a terminal: selection among 8 responses, or among as many as there are."""
    after, before = report["metrics"], report.get("before")
    sizes = {int(name.partition("@")[2]) for name in after if name.startswith("best_of@")}
    n = 8 if 8 in sizes else max(sizes, default=0)
    shown = Table("held-out questions", *(("before", "after") if before else ("value",)), "95 % interval")
    for name in _SHOWN:
        name = name if name in after else f"{name}@{n}"
        if name in after:
            value, low, high = (_text(after[name][k]) for k in ("value", "low", "high"))
            shown.add_row(name, *([_text(before[name]["value"])] if before else []), value, f"{low} – {high}")
    return shown


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


class _Run:
    def __init__(self, model: ReflectiveModel, settings: Settings, output: Path, bars: Progress | None) -> None:
        self.model, self.settings, self.output = model, settings, output
        if is_main_process():
            folder(output)  # before hours of work
        self.accelerator = _accelerator()
        self.processes = Processes(self.accelerator, model.model.device)
        self.bars = bars if bars is not None and self.processes.main else Progress(disable=True)
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, dict[str, float]] = {}
        s, sources = settings, [Path(source) for source in (settings.data, settings.task) if source is not None]
        self.policy = {
            "model": fingerprint(model.model.parameters()), "use": asdict(model.config), "dtype": s.dtype,
            "seed": s.seed,
            "files": [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in sources if f.is_file()],
        }  # fmt: skip
        self.start = SPRM.from_pretrained(s.continue_head).float() if s.continue_head else None
        start = self.start and fingerprint(self.start.parameters())
        self.tap = self._recorded_tap()
        given = {k: v for k, v in asdict(s).items() if v is not None or k not in _LATER}
        if s.way != "joint":  # of nothing else, and runs of before do not have them
            del given["head_updates"], given["settle"]
        self.run = json.loads(json_text(self.policy | given | {"start": start}))
        # Of all that is recorded; where it is as it always was, nothing is said of it.
        self.policy |= {} if self.tap == Tap(at=model.config.at) else {"tap": self.tap.to_dict()}
        self.choice: dict[int, Metric] = {}
        name = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()[:8]
        self.unfinished = output / f"unfinished-{name}"

    def report(self) -> dict[str, Any]:
        file = self.output / "report.json"
        if file.is_file() and (report := json.loads(file.read_text()))["run"] == self.run:
            return report
        if self.accelerator is not None and not getattr(self.model.model, "hf_device_map", None):
            self.model.model.to(self.processes.device)
        tables = self._train()
        report = {
            "run": self.run, "versions": _versions(), "tap": self.tap.to_dict(), **self._chosen(), "rollouts": self.counts,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()}, **tables,
        }  # fmt: skip
        self._write(file, report)
        self._wait()
        if self.processes.main:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        return report

    def _train(self) -> dict[str, Any]:
        s = self.settings
        if s.data:
            learnt, held_out = self._from_file()
            held_out = self._features("eval", held_out)
        else:
            learnt, held_out = None, self._answers("eval")
        if self.start is None or s.way == "head":
            learnt = self._features("train", learnt) if s.data else self._answers("train")
            if s.automatic:
                self._choose(learnt)
            learnt, held_out = learnt.read(self.tap), held_out.read(self.tap)
            head = self._fit(learnt, held_out, init=self.start, width=s.width)
        else:
            head = self.start.to(self.processes.device).use(tap=self.tap)
            if s.way == "backbone" and not s.data:
                learnt = self._answers("train")
        found = self._measure(held_out, head)
        config = replace(self.model.config, at=self.tap.at)
        if s.way == "head":
            if self.processes.main:
                for name in NAMES[: 1 + s.published]:
                    head.to(self.model.model.dtype).save_pretrained(self.output / name)
            self._write(self.output / CONFIG_NAME, told(head, config))
            return {"metrics": found}
        self.model.head, self.model.config = head, config
        trained = self._tune(learnt) if s.way == "backbone" else self._joint()
        if trained.adapter is None:  # of the model beside it, whatever the name that it will have
            for one in (trained.head, self.model.head):
                one.use(trained_on=None)
        if self.processes.main:
            trained.save(self.output, published=s.published)
            self.model.tokenizer.save_pretrained(self.output)
        if trained.adapter is not None:
            self.model.model = trained.adapter.merge_and_unload()
        held_out = self._features("after", held_out) if s.data else self._answers("after")
        along = self._measure(held_out, trained.head)
        settled = self._settle(held_out, trained.head) if s.way == "joint" and s.settle != 0 else None
        if settled is None:
            return {"metrics": along, "before": found}
        return {"metrics": self._measure(held_out, settled), "before": found, "along": along}

    def _settle(self, held_out: Rollouts, along: SPRM) -> SPRM | None:
        """The head fitted again, to answers of the policy that moves no more, and saved in place of the one that was trained along; None where
        no question is answered both ways."""
        s = self.settings
        learnt = self._answers("settle")
        if not question_weights(learnt.question, learnt.outcome, learnt.count, within_questions=s.within_questions).any():
            return None
        head = self._fit(learnt, held_out, "settle", width=along.width, dropout=_SETTLED_DROPOUT)
        head.use(trained_on=along.trained_on)
        if self.processes.main:
            for name in NAMES[: 1 + s.published]:
                head.save_pretrained(self.output / name)
        return head

    def _recorded_tap(self) -> Tap:
        """Where features are recorded: where the head will read, or all layers among which one is chosen."""
        s, own = self.settings, self.model.tap
        if self.start is not None:
            check_trainable(self.start, "continue_head")
            if s.layers not in (None, self.start.tap.layers):
                raise ValueError(f"layers={s.layers}: continue_head reads {self.start.tap.layers}, and nothing else")
            own = replace(self.start.tap, at=own.at)
        layers = own.layers if s.layers is None else s.layers
        if s.automatic:
            layers = s.candidates or candidates(len(Backbone.of(self.model.model).layers))
        if s.at == Tap().at != own.at:
            raise ValueError(f"at={s.at!r}: the checkpoint says at={own.at!r}, and heads that say nothing else read that; change it there")
        tap = replace(own, layers=layers, at=s.at or own.at)
        _ = Backbone.of(self.model.model, tap).places  # before hours of work
        if s.published and (tap.layers != (-2,) or tap.norm or tap.at == "every"):
            raise ValueError(f"published: the published code reads layer -2, and score_module.pt cannot say that it is {tap}")
        return tap

    def _choose(self, learnt: Rollouts) -> None:
        """Of the recorded layers that which is worth most on training questions that are held back; the evaluation has no say."""
        s = self.settings

        def on_layer(layer: int, auc: Metric) -> None:
            self.choice[layer] = auc
            tell(len(self.choice), layer=layer, auc_within=auc.value)

        with self._stage("choose a layer", len(self.tap.layers)) as tell:
            self.tap, self.choice = choose_layer(
                learnt, epochs=s.epochs, warmup=s.warmup if s.way == "head" else None, lr=s.lr, batch=s.batch, width=s.width,
                within_questions=s.within_questions, class_balance=s.class_balance, seed=s.seed,
                checkpoint=self.unfinished / "choose", accelerator=self.accelerator, on_layer=on_layer,
            )  # fmt: skip

    def _chosen(self) -> dict[str, Any]:
        """What the report says of the choice, if there was one."""
        return {"layers": {str(layer): finite(asdict(auc)) for layer, auc in self.choice.items()}} if self.choice else {}

    # -- stages --------------------------------------------------------------------------------------------------------

    @cached_property
    def _questions(self) -> dict[str, list[Question]]:
        s = self.settings
        if s.task in TASKS:
            questions = TASKS[s.task](s.seed)
        elif s.task.startswith(_GYM):
            questions = gym(s.seed, s.task.removeprefix(_GYM))
        elif Path(s.task).is_file():
            questions = read_questions(s.task)
        else:
            raise ValueError(f"task={s.task!r}: none of {', '.join(TASKS)}, {_GYM}<dataset> or a file")
        return dict(zip(("train", "eval"), split(questions, s.questions, s.eval_questions), strict=True))

    def _verifier(self) -> Verifier:
        s = self.settings
        spec = s.verifier or (s.task if s.task.startswith(_GYM) else "answer")
        return verifier(spec, self.model.answer if self.model.config.answer else None)

    def _from_file(self) -> tuple[Rollouts, Rollouts]:
        s, rollouts = self.settings, read_rollouts(self.settings.data, self.model.tokenizer)
        questions = len(rollouts.question.unique())
        held_out = min(s.eval_questions, max(1, questions // 3))
        return split_questions(rollouts, 1 - held_out / questions, s.seed)

    def _answers(self, name: str) -> Rollouts:
        """Rollouts of the model as it is, each process answering its share of the questions."""
        s, part = self.settings, "train" if name in ("train", "settle") else "eval"
        count, index = self.processes.count, self.processes.index
        questions = self._questions[part][: s.settle if name == "settle" else None][index::count]
        sampling = {k: getattr(s, k) for k in ("samples", "temperature", "top_p", "max_new_tokens", "batch_rows")}

        def make(first: int) -> Iterator[dict[str, Rollouts]]:
            for block in roll_out(
                _cast(self.model, s.dtype), questions, **sampling, seed=(2 * s.seed + (part == "eval")) * count + index,
                verify=self._verifier(), tap=self.tap, first=first, progress=tell.advance,
            ):  # fmt: skip
                block.question = block.question * count + index
                yield {"steps": block}

        depends = sampling | {"verifier": s.verifier, "questions": [q.text for q in questions]}
        with self._stage(f"roll out {name}", len(questions) * s.samples) as tell:
            return self._shared(name, depends, make)

    def _features(self, name: str, rollouts: Rollouts) -> Rollouts:
        """``rollouts`` with features of the model as it is, each process reading its share."""
        mine = rollouts.select(torch.arange(len(rollouts)) % self.processes.count == self.processes.index)
        block = torch.arange(len(mine)) // _BLOCK

        def make(first: int) -> Iterator[dict[str, Rollouts]]:
            model = _cast(self.model, self.settings.dtype)
            tell.advance(int((block < first).sum()))
            for number in range(first, -(-len(mine) // _BLOCK)):
                part = mine.select(block == number)
                yield {"steps": record_features(model, part, tap=self.tap, progress=tell.advance)}

        with self._stage(f"read {name}", len(mine)) as tell:
            return self._shared(name, {"of": fingerprint([mine.tokens, mine.length, mine.outcome])}, make)

    def _shared(
        self, name: str, depends: dict[str, Any], make: Callable[[int], Iterator[dict[str, Rollouts]]]
    ) -> Rollouts:
        """What all processes ``make``, kept block by block; what depends on the training only until the run is over."""
        count, home = self.processes.count, self.unfinished if name in ("after", "settle") else self.output / "rollouts"
        shares = [home / (name if count == 1 else f"{name}-{i}-of-{count}") for i in range(count)]
        recorded(shares[self.processes.index], self.policy | depends, make)
        self._wait()
        blocks = [block for share in shares for block in sorted(share.glob("[0-9]*/steps.safetensors"))]
        rollouts = Rollouts.join([Rollouts.load(block) for block in blocks])
        drawn, judged = rollouts.count.float(), ~rollouts.outcome.isnan()
        self.counts[name] = {
            "questions": len(rollouts.question.unique()), "trajectories": int(drawn.sum()), "different": len(rollouts),
            "steps": len(rollouts.trajectory),
            "correct": float((drawn * rollouts.outcome)[judged].sum() / drawn[judged].sum()),
        }  # fmt: skip
        return rollouts

    def _fit(
        self, learnt: Rollouts, held_out: Rollouts, name: str = "fit", *, init: SPRM | None = None, width: int | None = None,
        dropout: float | None = None,
    ) -> SPRM:  # fmt: skip
        s = self.settings
        watched = held_out.select(torch.isin(held_out.question, held_out.question.unique()[:_WATCHED]))

        def on_epoch(epoch: int, loss: float, head: SPRM) -> None:
            now = evaluate(watched, head, n=(), resamples=1)
            tell(epoch + 1, loss=loss, kept=now["kept"].value, gap=now["score_gap"].value)

        with self._stage(name, s.epochs) as tell:
            return fit(
                learnt, epochs=s.epochs, warmup=s.warmup if s.way == "head" else None, lr=s.lr, batch=s.batch,
                width=width, dropout=dropout, within_questions=s.within_questions, class_balance=s.class_balance, seed=s.seed,
                init=init, on_epoch=on_epoch, checkpoint=self.unfinished / name, accelerator=self.accelerator,
            ).use(tap=self.tap)  # fmt: skip

    def _tune(self, learnt: Rollouts) -> "Tuned":
        from .backbone import tune

        s = self.settings

        def on_step(step: "Step") -> None:
            tell(round(100 * step.done, 1), loss=step.loss, kept=step.kept, gap=step.gap)

        with self._stage("tune, %", 100) as tell:
            return tune(
                self.model, learnt, lora=s.lora, epochs=s.backbone_epochs, warmup=s.warmup, backbone_lr=s.backbone_lr,
                head_lr=s.lr, batch=s.batch, autocast=None if s.dtype == "float32" else torch.bfloat16,
                gradient_checkpointing=s.gradient_checkpointing, within_questions=s.within_questions,
                class_balance=s.class_balance, seed=s.seed, on_step=on_step, checkpoint=self.unfinished / "tune",
                accelerator=self.accelerator,
            )  # fmt: skip

    def _joint(self) -> "Tuned":
        from .joint import train_jointly

        with self._stage("joint", self.settings.steps) as tell:
            return train_jointly(
                self.model, self._questions["train"], self._verifier(), self.settings, self.unfinished / "joint",
                processes=self.processes.count, tell=tell,
            )  # fmt: skip

    def _measure(self, rollouts: Rollouts, head: SPRM) -> dict[str, dict[str, float | None]]:
        draws = torch.bincount(rollouts.question.unique(return_inverse=True)[1], rollouts.count)
        with self._stage("evaluate", None):
            found = evaluate(rollouts, head, n=sorted({2, 8, max(2, int(draws.min()))}))
        return {name: finite(asdict(metric)) for name, metric in found.items()}

    # -- what they share -----------------------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str, total: float | None) -> Iterator["_Tell"]:
        began = time.perf_counter()
        tell = _Tell(self.bars, name, total, self.output / "log.jsonl" if self.processes.main else None)
        yield tell
        self.bars.update(tell.bar, total=total or 1, completed=total or 1)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def _write(self, file: Path, content: dict[str, Any]) -> None:
        """As a whole, by the main process."""
        if self.processes.main:
            write_text(file, json_text(content, indent=2) + "\n")

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


class _Tell:
    """A stage's progress bar, and its part of the log."""

    def __init__(self, bars: Progress, name: str, total: float | None, log: Path | None) -> None:
        self.bars, self.name, self.log, self.bar = bars, name, log, bars.add_task(name, total=total)

    def advance(self, n: int) -> None:
        self.bars.advance(self.bar, n)

    def __call__(self, done: float, **numbers: float) -> None:
        text = "  ".join([self.name, *(f"{name} {_text(value)}" for name, value in numbers.items())])
        self.bars.update(self.bar, completed=done, description=text if numbers else None)
        if numbers and self.log is not None:
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(json_text({"stage": self.name, "done": done, **numbers}) + "\n")


def _accelerator() -> "Accelerator | None":
    """None for a CPU alone, where it is not needed."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and not torch.cuda.is_available():
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_DAY)])


def _cast(model: ReflectiveModel, dtype: str) -> ReflectiveModel:
    """``model`` with a backbone of ``dtype``, a copy where it has another: what is trained keeps its own."""
    if dtype == "auto" or getattr(torch, dtype) == model.model.dtype:
        return model
    cast = copy.copy(model)
    cast.model = copy.deepcopy(model.model).to(getattr(torch, dtype))
    return cast


def _versions() -> dict[str, str]:
    found = {"reflective": __version__}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _text(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"
