"""The checks, each by itself: imports, backends, engines and the default model against what is recorded of the known trajectory.

A process of its own runs them (``doctor.apart``): what crashes or hangs ends that process and no other. Nothing heavy is imported but
within a check.
"""

import importlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .known import PROMPT, STEP_IDS, VOCAB, Known
from .report import Check, short

BACKENDS = ("cuda", "triton", "cpu", "torch")
REPORT_IT = "report it with the block below"
Found = tuple[list[int], list[float]]  # columns of the steps that count, and their log-scores


class NotHere(Exception):
    """There is nothing to check; says why."""


@dataclass
class Finding:
    """What a check found, from comparison to comparison: the worst of them is told.

    Attributes: ``facts``: for the report's section of the check.
    """

    measured: float | None = None
    allowed: float | None = None
    wrong: list[str] = field(default_factory=list)
    right: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def close(self, what: str, ours: Sequence[float], truth: Sequence[float], allowed: float) -> None:
        """That numbers are within ``allowed`` of the recorded ones."""
        if len(ours) != len(truth):
            self.wrong.append(f"{what}: {len(ours)} numbers, expected {len(truth)}")
            return
        off = max((abs(a - b) if math.isfinite(a) else math.inf for a, b in zip(ours, truth, strict=True)), default=0.0)
        if self.measured is None or off / allowed > self.measured / self.allowed:
            self.measured, self.allowed = off, allowed
        if off > allowed:
            i = max(range(len(ours)), key=lambda i: abs(ours[i] - truth[i]) if math.isfinite(ours[i]) else math.inf)
            self.wrong.append(f"{what}: number {i + 1} is {ours[i]:.7g}, expected {truth[i]:.7g}; off by {off:.1e}, rounding allows {allowed:.1e}")

    def equal(self, what: str, same: bool, otherwise: str, told: str = "") -> None:
        """That something is exactly as promised; ``told``: in the report, where it is."""
        if not same:
            self.wrong.append(f"{what}: {otherwise}")
        elif told:
            self.right.append(told)

    def check(self, name: str, advice: str) -> Check:
        if self.wrong:
            return Check(name, "differs", "; ".join(self.wrong), advice, self.measured, self.allowed)
        near = [] if self.measured is None else [f"off by {self.measured:.1e}, rounding allows {self.allowed:.1e}"]
        return Check(name, "ok", "; ".join([*near, *dict.fromkeys(self.right)]), "", self.measured, self.allowed)


@dataclass(frozen=True)
class Step:
    """One check. Attributes: ``needs``: names of checks without which there is nothing to try; ``slow``: left out by ``--quick``;
    ``group``: several that are told in one line where there is nothing to check."""

    name: str
    run: Callable[[], Finding]
    advice: str
    needs: tuple[str, ...] = ()
    slow: bool = False

    @property
    def group(self) -> str:
        return self.name.partition(": ")[0]


def plan(quick: bool = False) -> list[Step]:
    """The checks in their order, the same in every process."""
    steps = [
        Step("import torch", _torch, "install torch anew: https://pytorch.org/get-started/locally"),
        Step("import transformers", _transformers, "pip install --upgrade 'transformers>=5.17,<6'", ("import torch",)),
        Step(
            "import reflective", _reflective,
            "install reflective-kernels anew, with the torch that it runs with: pip install --no-build-isolation --force-reinstall --no-deps "
            "reflective-kernels",
            ("import torch",),
        ),
    ]  # fmt: skip
    base, both = ("import torch", "import reflective"), ("import torch", "import transformers", "import reflective")
    for name in BACKENDS:
        advice = ("" if name == "torch" else "until it is mended take another: backend='torch' in Python; ") + _OTHERWISE[name]
        steps += [
            Step(f"{name}: head alone", lambda name=name: head_alone(name), advice, base),
            Step(f"{name}: finished text", lambda name=name: finished_text(name), advice, both),
            Step(f"{name}: stream", lambda name=name: stream(name), advice, both),
        ]
    releases = f"take a release of transformers that is tested (pip install 'transformers>=5.17,<6'), and {REPORT_IT}"
    steps += [
        Step("hf: generate", generate, releases, both),
        Step("hf: engine, batch", lambda: engine("batch"), releases, both),
        Step("hf: engine, seats", lambda: engine("seats"), releases, both),
        Step("vllm: engine", vllm, f"take a release of vLLM that is tested (pip install 'vllm>=0.28,<0.34'), and {REPORT_IT}", both, slow=True),
        Step(
            "default model", default_model,
            f"remove its directory (see [places]: it is unpacked anew), or {REPORT_IT}", both, slow=True,
        ),
    ]  # fmt: skip
    return [step for step in steps if not (quick and step.slow)]


_OTHERWISE = {
    "cpu": "REFLECTIVE_CPU_CAPABILITY=portable takes its plainest kernels, and pip install --no-build-isolation --force-reinstall --no-deps "
    f"reflective-kernels compiles it anew; {REPORT_IT}",
    "cuda": f"compile it anew with the CUDA that torch has (FORCE_CUDA=1), and {REPORT_IT}",
    "triton": f"remove Triton's cache (~/.triton/cache), and {REPORT_IT}",
    "torch": f"it is PyTorch's own arithmetic that differs: check torch, its BLAS and the hardware, and {REPORT_IT}",
}


def carried_out(steps: Sequence[Step], broken: set[str]) -> Iterator[tuple[Step, Check | None, dict[str, str], int]]:
    """Every step twice: before it begins; then with its check, facts that it found, and how many steps that was. What cannot be checked
    at all is one line for all steps of its group.

    Args:
        broken: names of steps of which others need not be tried; added to.
    """
    left = list(steps)
    while left:
        step, took = left[0], 1
        yield step, None, {}, 0
        began = time.perf_counter()
        facts: dict[str, str] = {}
        why = next((f"not tried, as {name!r} failed" for name in step.needs if name in broken), None)
        if why is None:
            try:
                finding = step.run()
                check, facts = finding.check(step.name, step.advice), finding.facts
            except NotHere as error:
                why = str(error)
            except Exception as error:  # noqa: BLE001, whatever it is, the report is to name it and go on
                check = Check(step.name, "broken", short(error), step.advice)
        if why is not None:
            took = next((i for i, other in enumerate(left) if other.group != step.group), len(left))
            check = Check(step.group if took > 1 else step.name, "not here", why)
        if check.status == "broken":
            broken.add(step.name)
        check.seconds = round(time.perf_counter() - began, 3)
        yield step, check, facts, took
        left = left[took:]


def main(given: str) -> None:
    """In the process of its own: checks from number ``skip`` on, a line of JSON each on what was stdout."""
    settings = json.loads(given)
    # Whatever libraries print goes to stderr: stdout is for the lines alone.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        steps = plan(settings["quick"])[settings["skip"] :]
        for step, check, facts, took in carried_out(steps, set(settings["broken"])):
            line = {"begin": step.name, "check": check and asdict(check), "facts": facts, "took": took}
            print(json.dumps(line), file=lines, flush=True)


# -- what is installed ---------------------------------------------------------------------------------------------------


def _torch() -> Finding:
    import torch

    found = Finding()
    half = torch.tensor([0.5])
    found.equal("0.5 + 0.5", float(half + half) == 1.0, f"torch says {float(half + half)}", torch.__version__)
    found.facts = {"threads": str(torch.get_num_threads()), "cuda": torch.version.cuda or torch.version.hip or "none"}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found.facts[f"torch gpu {i}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    return found


def _transformers() -> Finding:
    import transformers
    from transformers import LlamaForCausalLM  # noqa: F401, transformers imports nothing until it is asked

    found = Finding()
    found.right = [transformers.__version__]
    return found


def _reflective() -> Finding:
    import reflective

    found = Finding()
    known = reflective.backends()
    usable = [name for name, info in known.items() if info.available]
    found.right = [f"backends: {', '.join(usable)}"]
    found.facts = {f"backend {name}": f"{'yes' if info.available else 'no'}: {info.detail}" for name, info in known.items()}
    # The extension is there and does not load: that is broken, and no choice.
    if "does not load" in known["cpu"].detail:
        raise RuntimeError(f"the extension is {known['cpu'].detail}")
    return found


# -- backends --------------------------------------------------------------------------------------------------------------


def _device(name: str) -> Any:
    """Where a backend is tried.

    Raises:
        NotHere: it cannot run here.
    """
    import torch

    import reflective

    info = reflective.backends()[name]
    if not info.available:
        raise NotHere(info.detail)
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu")


def head_alone(name: str) -> Finding:
    """Rows of states through the head, in each dtype: within rounding of what is recorded, and the same bits again, and alone."""
    import torch

    from .. import kernels
    from ..scoring.backend import choose_backend
    from . import known

    device, found, truth = _device(name), Finding(), Known.read().rows
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if name in ("cuda", "triton") else [])]
    for dtype in dtypes:
        told = str(dtype).removeprefix("torch.")
        backend = choose_backend(name, device, dtype)
        weights = [weight.to(device) for weight in known.head(dtype).parameters()]
        rows = known.rows(dtype).to(device)
        ours = backend.score_rows(rows, *weights)
        if name == "torch":
            allowed = _rounding(rows, weights)
        else:  # at most twice the error of the same expression in PyTorch, or a few units in the last place
            definition = kernels.score_rows(rows, *weights).tolist()
            ulps = 4 * torch.finfo(torch.float32).eps * max(1.0, *map(abs, truth))
            allowed = max(ulps, 2 * max(abs(a - b) for a, b in zip(definition, truth, strict=True)))
        found.close(told, ours.tolist(), truth, allowed)
        again = torch.equal(backend.score_rows(rows, *weights), ours)
        found.equal(f"{told}, scored again", again, "the bits differ", "the same bits again")
        if name != "torch":  # which leaves it to BLAS
            alone = all(torch.equal(backend.score_rows(rows[i : i + n], *weights), ours[i : i + n]) for i, n in ((0, 1), (31, 1), (40, 17)))
            found.equal(f"{told}, in batches of 1, 17 and 64", alone, "the bits differ", "and in batches of 1, 17 and 64")
    return found


def _rounding(rows: Any, weights: list[Any]) -> float:
    """What rounding in the rows' dtype can do to a log-score, whose slope is 1 at most: as in ``known.allowed``, for the head's two sums."""
    import torch

    w1, b1, w2, b2 = (weight.double() ** 2 for weight in weights)
    size = ((rows.double() ** 2 @ w1.T + b1) @ w2.T + b2) ** 0.5  # of what errors of random sign come to
    return float(size.max()) * 4 * w1.shape[0] ** 0.5 * torch.finfo(rows.dtype).eps / 2


def _small(device: Any) -> tuple[Any, Any, Any]:
    from . import known

    return known.model().to(device), known.head().to(device), known.steps()


def _columns(scores: Any, row: int = 0) -> Found:
    values = scores.step_scores[row].double().clamp_min(1e-300).log().tolist()
    return scores.step_positions[row].tolist(), values


def _compare(found: Finding, what: str, ours: Found, known: Known) -> None:
    found.equal(f"{what}, steps", ours[0] == known.positions, f"at {ours[0]}, expected at {known.positions}", f"{len(known.positions)} steps")
    if ours[0] == known.positions:
        found.close(what, ours[1], known.log_scores, known.tolerance)


def finished_text(name: str) -> Finding:
    """``rf.score`` of the known ids, alone and beside a longer text."""
    import reflective as rf

    known, found = Known.read(), Finding()
    net, sprm, steps = _small(_device(name))
    alone = rf.score(net, sprm, steps, [known.ids], prompt_lengths=[len(PROMPT)], backend=name)
    _compare(found, "log-scores", _columns(alone), known)
    beside = rf.score(net, sprm, steps, [known.ids + known.ids[8:], known.ids], prompt_lengths=[len(PROMPT)] * 2, backend=name)
    _compare(found, "beside a longer text", _columns(beside, 1), known)
    return found


def stream(name: str) -> Finding:
    """``StreamScorer`` of the known ids, token by token, in both schedules at once, which hear the same states."""
    import torch

    known, found = Known.read(), Finding()
    net, sprm, steps = _small(_device(name))
    now, later = _streamed(net, sprm, steps, known.ids, len(PROMPT), name)
    _compare(found, "log-scores", _columns(later), known)
    if name == "torch":  # as above
        _compare(found, "immediate log-scores", _columns(now), known)
    else:
        same = torch.equal(now.step_scores[0], later.step_scores[0]) and float(now.score[0]) == float(later.score[0])
        found.equal("immediate and deferred", same, "the bits differ", "the same bits immediate and deferred")
    return found


def _streamed(net: Any, sprm: Any, steps: Any, ids: list[int], prompt: int, backend: str | None) -> tuple[Any, Any]:
    """Scores of both schedules, the deferred one with a buffer that fills on the way."""
    import torch

    import reflective as rf

    from ..engines.hf.internals import with_cache
    from ..engines.hf.kv import new_cache

    row = torch.tensor([ids], device=net.device)
    with ExitStack() as entered, torch.no_grad():
        scorers = [
            entered.enter_context(rf.StreamScorer(net, sprm, steps, schedule, backend=backend, buffer_rows=4)) for schedule in ("immediate", "deferred")
        ]
        cache = new_cache()
        for begin, end in ((0, prompt), *((i, i + 1) for i in range(prompt, len(ids) - 1))):
            net(row[:, begin:end], use_cache=True, **with_cache(net, cache))
        now, later = (scorer.result(row) for scorer in scorers)
    return now, later


# -- engines ---------------------------------------------------------------------------------------------------------------


def _auto() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generate() -> Finding:
    """transformers' own ``generate``, greedy, with a scorer that hears it."""
    import torch

    import reflective as rf

    known, found = Known.read(), Finding()
    net, sprm, steps = _small(_auto())
    ids = torch.tensor([PROMPT], device=net.device)
    with rf.StreamScorer(net, sprm, steps) as scorer:
        out = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(known.ids) - len(PROMPT))
    _same_tokens(found, out[0].tolist()[len(PROMPT) :], known)
    if not found.wrong:
        _compare(found, "log-scores", _columns(scorer.result(out)), known)
    return found


def _same_tokens(found: Finding, ours: list[int], known: Known) -> None:
    right = known.ids[len(PROMPT) :]
    first = next((i for i, (a, b) in enumerate(zip(ours, right, strict=False)) if a != b), min(len(ours), len(right)))
    told = f"token {first + 1} is {ours[first] if first < len(ours) else 'missing'}, expected {right[first] if first < len(right) else 'none'}"
    found.equal("greedy decoding", ours == right, told, f"the {len(right)} tokens expected")


def engine(decoding: str) -> Finding:
    """The engine that searches drive, two candidates at once."""
    import reflective as rf

    from ..engines.hf.engine import TransformersEngine

    net, sprm, steps = _small(_auto())
    return driven(TransformersEngine(net, rf.StreamScorer(net, sprm, steps), ends=[], batch_rows=4, decoding=decoding))


def driven(made: Any) -> Finding:
    """What comes of the known prompt by the door of ``engines.base``: tokens, and scores when they end."""
    from ..engines.base import Appended, Ended, Prompt, Sampling

    known, found = Known.read(), Finding()
    tokens: dict[int, list[int]] = {}
    scores: dict[int, Any] = {}
    with made:
        (prefix,) = made.open([Prompt(list(PROMPT))])
        both = made.start(prefix, [Sampling((0, i), temperature=0.0, top_p=1.0, max_tokens=len(known.ids) - len(PROMPT)) for i in range(2)])
        while (events := made.advance()) is not None:
            for event in events:
                if isinstance(event, Appended):
                    tokens.setdefault(event.sequence, []).append(event.chance.token)
                elif isinstance(event, Ended):
                    scores[event.sequence] = event.score
        made.close([prefix])
    for sequence in both:
        _same_tokens(found, tokens.get(sequence, []), known)
        if found.wrong:
            return found
        told = scores[sequence]
        if told.error:
            found.wrong.append(told.error)
            return found
        columns = [len(PROMPT) + position for position in told.positions]
        _compare(found, "log-scores", (columns, [math.log(max(s, 1e-300)) for s in told.step_scores]), known)
    return found


def checkpoint(folder: Path) -> None:
    """The small model as a checkpoint, with a tokenizer whose tokens are single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from . import known

    special = ["<pad>", "<s>", "</s>", "<think>", "</think>"]
    letters = [chr(ord("A") + i) for i in range(VOCAB - len(special))]
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate([*special, *letters])}, unk_token="Z"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split(Regex(r"</?think>|."), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", additional_special_tokens=special[3:]).save_pretrained(folder)
    known.model().save_pretrained(folder)
    known.head().save_pretrained(folder)
    rule = {"rule": "contains", "delimiter": [letters[i - len(special)] for i in STEP_IDS], "prompt": "{question}"}
    (folder / "reflective.json").write_text(json.dumps(rule), encoding="utf-8")


def vllm() -> Finding:
    """A vLLM in this process on the small model."""
    if importlib.util.find_spec("vllm") is None:
        raise NotHere("vllm is not installed (pip install 'reflective-kernels[vllm]')")
    import reflective as rf

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    few = {"gpu_memory_utilization": 0.2}  # of a CPU's memory, too, where by default nearly all has to be free
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder))
        model = rf.ReflectiveModel.from_pretrained(folder, engine="vllm", max_model_len=128, enforce_eager=True, dtype="float32", **few)
        try:
            return driven(model.engine())
        finally:
            model.close()


def default_model() -> Finding:
    """SmolLM2-135M with the head that this package ships: finished text, and the same token by token."""
    import reflective as rf

    try:
        model = rf.ReflectiveModel.default()
    except FileNotFoundError as error:
        raise NotHere(" ".join(str(error).split())) from None
    known, found = Known.read(), Finding()
    ids, prompt = known.default_ids, known.default_prompt
    whole = rf.score(model.model, model.head, model.steps, [ids], prompt_lengths=[prompt])
    _, later = _streamed(model.model, model.head, model.steps, ids, prompt, None)
    for what, scores in (("finished text", whole), ("stream", later)):
        columns, values = _columns(scores)
        expected = known.default_positions
        found.equal(f"{what}, steps", columns == expected, f"at {columns}, expected at {expected}", f"{len(expected)} steps")
        if columns == known.default_positions:
            found.close(what, values, known.default_log_scores, known.default_tolerance)
    return found


if __name__ == "__main__":
    main(sys.argv[1])
