"""Scoring inside stock vLLM: what it costs a step, and best of 32 against the ways that there are without it. SmolLM2-135M-Instruct, on CPU.

    OMP_NUM_THREADS=1 python benchmarks/in_vllm.py overhead [--sequences 1 8 32] [--pairs 12] [--dtype float32] [--out benchmarks/results]
    OMP_NUM_THREADS=1 python benchmarks/in_vllm.py best_of_n [--n 32] [--tokens 128] [--rounds 3] [--out benchmarks/results]

``overhead`` (``in_vllm_overhead.csv``): one engine, its worker in this process, with the scorer in it and out of it by turns. Out is out altogether: vLLM's own
sampler, and a forward without the copy of the last layer's input. ``kept`` is the tokens/s with the scorer over those without, the median of
``pairs`` neighbouring generations; a shared machine moves whole generations by several per cent, so the steps of further generations take turns
too, in pairs of random order: ``steps_kept`` by the clock, ``steps_kept_cpu`` by this thread's processor time, which others on the machine do not add
to. The intervals hold the median with 95 %, by bootstrap. ``scorer_us`` is the median host time of the scorer's call in a step, ``scorer_mean_us`` what the worker
itself counts (``reflective_stats``), admissions in it; ``wrapper_us`` all that stands around vLLM's sampler, bookkeeping of requests included. The shares are of
``step_ms``. No figure without scores equal to those of ``rf.score``.

``best_of_n`` (``in_vllm_best_of_n.csv``): one question, candidates of as many tokens each. ``reflective_vllm`` and ``reflective_hf``: ``ReflectiveModel.generate`` with
either engine. ``vllm_published``: stock vLLM without a scorer generates, and a process with a transformers model scores the texts in the published
way. ``vllm_vllm``: the same, and a second vLLM scores them by its prefill, which is the kindest second pass that there is. Every process is started
before the first round and stays, its model loaded; ways take turns, prefix caches are emptied in between. ``peak_MiB`` is the high-water mark of
the resident set, weights and all, of every process that the way needs; ``others_cores`` says how many of the machine's cores others had meanwhile.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reflective.engines.vllm.worker import ReflectiveWorker

WITH_SCORES = "reflective.benchmarks.in_vllm.Switch"  # worker_extension_cls
QUESTION = "8 + 13 + 6"
SAMPLING = {"temperature": 0.6, "top_p": 0.95}
PROCESSES = {
    "reflective_vllm": ("reflective_vllm",),
    "reflective_hf": ("reflective_hf",),
    "vllm_published": ("vllm", "published"),
    "vllm_vllm": ("vllm", "second_vllm"),
}
QUIET = 0.1  # cores that others may have where a figure is to be taken
SPOKEN = "@ "  # before an answer: vLLM says other things on stdout
Row = dict[str, Any]


# -- in the worker -----------------------------------------------------------------------------------------------------


class Timed:
    """A sampler, or something else that is called, and the seconds of host time that every call took."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.times = inner, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = self.inner(*args, **kwargs)
        self.times.append(time.perf_counter() - began)
        return out


class Switch(ReflectiveWorker):
    """A worker's scorer that can be taken out and put back, after ``reflective_start``."""

    def bench_scorer(self, there: bool) -> None:
        """Of a compiled model or one in CUDA graphs the copy of the last layer's input stays, as it is recorded in them."""
        runner = self.model_runner
        model = runner.get_model()
        if not hasattr(self, "bench_timed"):
            scored = runner.sampler
            self.bench_plain = scored.inner
            scored.inner = Timed(scored.inner)
            self.bench_timed = Timed(scored)
            self.bench_consume = model.reflective.consume = Timed(model.reflective.consume)
        runner.sampler = self.bench_timed if there else self.bench_plain
        if state := getattr(runner, "model_state", None):  # Model Runner V2 admits requests there
            from reflective.engines.vllm.runner import ScoredState

            for name in ("add_request", "remove_request", "apply_staged_writes"):
                vars(state).pop(name, None)
                if not there:
                    setattr(state, name, getattr(super(ScoredState, state), name))
        if runner.vllm_config.model_config.enforce_eager:
            plain = type(model).__mro__[2]
            layers = runner.vllm_config.model_config.hf_text_config.num_hidden_layers
            model.set_aux_hidden_state_layers((layers - 1,) if there else ())
            vars(model).pop("forward", None)
            if not there:
                model.forward = plain.forward.__get__(model)

    def bench_stats(self, since: int = 0) -> dict[str, float]:
        """As ``reflective_stats``, and of the calls from number ``since`` on the medians of seconds in the scorer, ``scorer``, and around vLLM's sampler,
        ``wrapper``; ``mean_wrapper`` has admissions in it."""
        timed = self.bench_timed
        around = [o - i for o, i in zip(timed.times[since:], timed.inner.inner.times[since:], strict=True)] or [0.0]
        return self.reflective_stats() | {
            "scorer": statistics.median(self.bench_consume.times[since:] or [0.0]),
            "wrapper": statistics.median(around), "mean_wrapper": statistics.fmean(around),
        }  # fmt: skip


# -- the machine -------------------------------------------------------------------------------------------------------


class Others:
    """Cores that other processes have had since ``begin``. Needs /proc; without it nothing is known, and None comes back.

    Args:
        ours: further processes that are no others, by their ids.
    """

    def __init__(self, ours: Sequence[int] = ()) -> None:
        self._ours = ("self", *map(str, ours))
        self.begin()

    def begin(self) -> None:
        self._before = self._read()

    def cores(self) -> float | None:
        (busy, own, now), (busy_then, own_then, then) = self._read(), self._before
        return None if busy is None else max(0.0, (busy - busy_then - own + own_then) / max(1e-9, now - then))

    def _read(self) -> tuple[float | None, float, float]:
        hertz = os.sysconf("SC_CLK_TCK")
        try:
            user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
            own = 0
            for one in self._ours:
                fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
        except (OSError, ValueError):
            return None, 0.0, time.perf_counter()
        return (user + nice + system + irq + soft + steal) / hertz, own / hertz, time.perf_counter()

    def wait(self, seconds: float) -> None:
        """Until they rest, but no longer than ``seconds``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.begin()
            time.sleep(min(1.0, seconds))
            if (self.cores() or 0.0) < QUIET:
                return


def release(*names: str) -> str:
    """Of the first of these packages that is installed."""
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return ""


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and between which two values it lies with 95 % (bootstrap)."""
    values = torch.tensor(ratios, dtype=torch.float64)
    drawn = torch.randint(len(values), (2000, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[drawn].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistics.median(ratios), low, high


def figures(name: str, ratios: Sequence[float]) -> Row:
    return {
        key: round(v, 5) for key, v in zip((name, f"{name}_low", f"{name}_high"), interval(ratios), strict=True)
    }  # fmt: skip


def surroundings(device: str) -> None:
    """Before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def small(dtype: str, sequences: int, positions: int) -> Row:
    """vLLM's settings on a CPU."""
    return {
        "dtype": dtype, "max_model_len": positions, "max_num_seqs": sequences, "enforce_eager": True, "block_size": 32,
    }  # fmt: skip


# -- overhead ----------------------------------------------------------------------------------------------------------


class Generation:
    """Requests that are decoded to their end; ``seconds`` and ``cpu`` of every step but the first, which is the prefill.

    Args:
        core: ``engines.vllm.core.Core``.
    """

    def __init__(self, core: Any, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.core = core
        self.names = [
            core.add(ids, max_tokens=tokens, temperature=1.0, ignore_eos=True, stop_token_ids=[]) for ids in prompts
        ]
        self.ids = {name: list(p) for name, p in zip(self.names, prompts, strict=True)}

    def step(self) -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.thread_time()
        self.core.step()
        seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
        for name in self.names:
            for output in self.core.fetch(name):
                self.ids[name] += output.outputs[0].token_ids
        return seconds, cpu

    def run(self) -> float:
        """Seconds of its steps."""
        seconds = 0.0
        while self.core.under_way:
            seconds += self.step()[0]
        return seconds


def by_turns(
    core: Any, switch: Callable[[bool], None], prompts: Sequence[Sequence[int]], tokens: int, order: random.Random
) -> list[Row]:
    """A generation whose steps take turns, of which nothing is used but the times: a pair of neighbours a row."""
    switch(True)
    generation, pairs = Generation(core, prompts, tokens), []
    generation.step()
    for _ in range((tokens - 2) // 2):
        pair = {}
        for there in order.sample([True, False], 2):
            switch(there)
            pair[there] = generation.step()
        pairs.append(pair)
    switch(True)
    generation.run()
    core.logs(generation.names, forget=True)
    return pairs


def overhead(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each number of sequences."""
    import reflective as rf
    from reflective.checkpoints import default
    from reflective.checkpoints.vllm import for_vllm
    from reflective.engines.vllm.core import start
    from reflective.engines.vllm.results import collect

    model = rf.ReflectiveModel.default()
    found = for_vllm(default.converted(), head=default.HEAD)
    settings = {"model": str(found.model), **found.settings(), **small(args.dtype, max(args.sequences), 512)}
    core = start(settings | {"worker_extension_cls": WITH_SCORES})

    def switch(there: bool) -> None:
        core.llm.collective_rpc("bench_scorer", args=(there,))

    texts = [model.format(f"{i % 9 + 2} + {9 - i % 8} + {3 * i % 8 + 2}") for i in range(max(args.sequences))]
    prompts = [model.encode("Question:" + "Question:".join(t.split("Question:")[-2:]))[0].tolist() for t in texts]
    others, order = Others(), random.Random(0)
    for n in args.sequences:
        some, busy = prompts[:n], []
        switch(True)
        Generation(core, some, 4).run()  # warm up; their prompts are in the prefix cache from here on
        began = core.llm.collective_rpc("bench_stats")[0]
        seconds: dict[bool, list[float]] = {True: [], False: []}
        checked, steps = "", 0
        for i in range(args.pairs):
            others.wait(args.patience)
            others.begin()
            for there in (True, False) if i % 2 else (False, True):
                switch(there)
                generation = Generation(core, some, args.tokens)
                seconds[there].append(generation.run())
                if not there:
                    continue
                logs = {log.key: log for log in core.logs(generation.names, forget=True)}
                full = list(generation.ids.values())
                starts = [len(p) for p in some]
                scores = collect([logs[name] for name in generation.names], full, starts, model.steps, "predict")
                steps += int(scores.n_steps.sum())
                if i in (0, args.pairs - 1):
                    checked = checked or wrong(model, scores, full, starts, 1e-3 if args.dtype == "float32" else 0.1)
            busy.append(others.cores())
        ended = core.llm.collective_rpc("bench_stats", args=(int(began["calls"]),))[0]
        calls = ended["calls"] - began["calls"]
        pairs = []
        for _ in range(args.stepped):
            others.wait(args.patience)
            others.begin()
            pairs += by_turns(core, switch, some, args.tokens, order)
            busy.append(others.cores())
        step = statistics.median(pair[False][0] for pair in pairs)
        scorer, wrapper = ended["scorer"], ended["wrapper"]
        kept = [without / within for within, without in zip(seconds[True], seconds[False], strict=True)]
        yield {
            "sequences": n, "tokens": args.tokens, "dtype": args.dtype, "runner": "V1", "vllm": release("vllm", "vllm-cpu"),
            "pairs": args.pairs, "plain_tokens_per_s": round(n * args.tokens / statistics.median(seconds[False]), 1),
            **figures("kept", kept), "step_pairs": len(pairs), "step_ms": round(1e3 * step, 3),
            **figures("steps_kept", [p[False][0] / p[True][0] for p in pairs]),
            **figures("steps_kept_cpu", [p[False][1] / p[True][1] for p in pairs]),
            "scorer_us": round(1e6 * scorer, 1), "scorer_share": round(scorer / step, 6),
            "scorer_mean_us": round(1e6 * (ended["seconds"] - began["seconds"]) / calls, 1),
            "wrapper_us": round(1e6 * wrapper, 1), "wrapper_share": round(wrapper / step, 6),
            "wrapper_mean_us": round(1e6 * ended["mean_wrapper"], 1), "steps_scored": steps,
            **cores(busy), "check": checked or ("scores equal" if steps else "no step was decoded"),
        }  # fmt: skip
    core.close()


def cores(busy: Sequence[float | None]) -> Row:
    known = [b for b in busy if b is not None]
    return {
        "others_cores": round(statistics.median(known), 2) if known else "",
        "others_most": round(max(known), 2) if known else "",
    }


def wrong(model: Any, scores: Any, texts: Sequence[Sequence[int]], starts: Sequence[int], rtol: float) -> str:
    """In what ``scores`` differ from ``rf.score``; empty if in nothing."""
    import reflective as rf

    truth = rf.score(
        model.model,
        model.head,
        model.steps,
        [torch.tensor(t) for t in texts],
        at=model.config.at,
        prompt_lengths=list(starts),
    )
    return differ(scores.step_scores, truth.step_scores, rtol)


def differ(ours: Sequence[Any], theirs: Sequence[Any], rtol: float) -> str:
    """In what step scores of as many texts differ."""
    try:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.as_tensor(a).float(), torch.as_tensor(b).float(), rtol=rtol, atol=1e-5)
    except (AssertionError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


# -- best of n ---------------------------------------------------------------------------------------------------------


class Process:
    """One that has a model loaded and answers: ``serve`` of this file, with ``what`` among ``SERVED``."""

    def __init__(self, what: str, given: Row) -> None:
        command = [
            sys.executable,
            "-m",
            "reflective.benchmarks.in_vllm",
            "serve",
            "--what",
            what,
            "--given",
            json.dumps(given),
        ]
        self.what = what
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()  # it is ready

    def answer(self) -> Row:
        for line in self.process.stdout:
            if line.startswith(SPOKEN):
                return json.loads(line.removeprefix(SPOKEN))
        raise RuntimeError(f"{self.what}: its process ended with {self.process.wait()}")

    def ask(self, **asked: Any) -> Row:
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def load(given: Row, engine: str) -> Any:
    """The embedded model, or that of ``given["path"]``, whose candidates end by their length alone."""
    import reflective as rf

    more = dict(given[engine])
    if "path" in given:
        if engine == "hf":
            more = {"device_map": given["device"]}
        model = rf.ReflectiveModel.from_pretrained(
            given["path"], head=given["head"], engine=engine, dtype=getattr(torch, given["dtype"]), **more
        )
    else:
        model = rf.ReflectiveModel.default(engine=engine, **more)
    model.config = replace(model.config, stop=None, answer=None)
    if engine == "vllm":
        model.host.ends = set()
    else:
        model.model.generation_config.eos_token_id = []
    return model


def served(what: str, given: Row) -> Callable[[Row], Row]:
    """What answers a request, loaded."""
    n, tokens = given["n"], given["tokens"]
    if what == "vllm":
        from vllm import LLM, SamplingParams

        llm = LLM(model=given["plain"], dtype=given["dtype"], **given["vllm"])

        def generate(asked: Row) -> Row:
            llm.reset_prefix_cache()
            params = SamplingParams(
                n=n,
                max_tokens=asked.get("tokens", tokens),
                seed=asked["seed"],
                ignore_eos=True,
                detokenize=False,
                **SAMPLING,
            )
            began = time.perf_counter()
            (out,) = llm.generate([{"prompt_token_ids": given["prompt"]}], params, use_tqdm=False)
            return {
                "seconds": time.perf_counter() - began, "texts": [given["prompt"] + list(c.token_ids) for c in out.outputs]
            }  # fmt: skip

        return generate

    model = load(given, "hf" if what in ("reflective_hf", "published") else "vllm")

    def ours(asked: Row) -> Row:
        if model.host is not None:
            model.host.core.llm.reset_prefix_cache()
        began = time.perf_counter()
        found = model.generate(
            given["question"], n=n, max_new_tokens=asked.get("tokens", tokens), seed=asked["seed"], **SAMPLING
        )
        return {
            "seconds": time.perf_counter() - began, "texts": [given["prompt"] + c.token_ids for c in found.candidates],
            "scores": [list(c.step_scores) for c in found.candidates], "scoring": found.scoring_seconds,
        }  # fmt: skip

    def published(asked: Row) -> Row:
        from reflective.published import second_pass

        device = model.model.device
        began = time.perf_counter()
        scores = [
            second_pass(model, torch.tensor([t], device=device), len(given["prompt"])).tolist() for t in asked["texts"]
        ]
        return {"seconds": time.perf_counter() - began, "scores": scores}

    def second(asked: Row) -> Row:
        model.host.core.llm.reset_prefix_cache()
        began = time.perf_counter()
        found = model.host.score([(text, len(given["prompt"])) for text in asked["texts"]])
        return {"seconds": time.perf_counter() - began, "scores": [list(f.step_scores) for f in found]}

    def truth(asked: Row) -> Row:
        import reflective as rf

        texts = [torch.tensor(text, device=model.model.device) for text in asked["truth"]]
        found = rf.score(
            model.model, model.head, model.steps, texts, at=model.config.at, prompt_lengths=len(given["prompt"])
        )
        return {"scores": [s.tolist() for s in found.step_scores]}

    answer = {"reflective_vllm": ours, "reflective_hf": ours, "published": published, "second_vllm": second}[what]
    return lambda asked: truth(asked) if "truth" in asked else answer(asked)


def serve(what: str, given: Row) -> None:
    """Answer requests, a line of JSON each, until there are no more. With every answer ``peak_MiB``, and on a GPU ``gpu_MiB``."""
    from reflective.benchmarks.finished_text import status

    answer = served(what, given)
    print(SPOKEN + "{}", flush=True)
    for line in sys.stdin:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        found = answer(json.loads(line)) | {"peak_MiB": status("VmHWM") / 2**20}
        if torch.cuda.is_available():
            found["gpu_MiB"] = torch.cuda.max_memory_reserved() / 2**20
        print(SPOKEN + json.dumps(found), flush=True)


def best_of_n(given: Row, rounds: int, patience: float = 0.0, rtol: float = 1e-3) -> list[Row]:
    """A row a way.

    Args:
        given: ``plain``: model for stock vLLM; ``path`` and ``head``: of model and head, if they are not the embedded ones; ``device``, ``dtype``; ``question``
            and ``prompt``, its ids; ``n``, ``tokens``; ``vllm``, ``hf``: settings of the engines.
        rtol: of equal step scores.
    """
    processes = {name: Process(name, given) for name in dict.fromkeys(n for names in PROCESSES.values() for n in names)}
    others = Others([p.process.pid for p in processes.values()])
    runs: dict[str, list[Row]] = {way: [] for way in PROCESSES}
    busy, check = [], {way: "" for way in PROCESSES}

    def run(way: str, seed: int, **more: Any) -> Row:
        first, *second = (processes[name] for name in PROCESSES[way])
        found = first.ask(seed=seed, **more)
        run = {"generate_s": found["seconds"], "score_s": found.get("scoring", 0.0), "peak_MiB": found["peak_MiB"]}
        run |= {"gpu_MiB": found["gpu_MiB"]} if "gpu_MiB" in found else {}
        run["total_s"] = found["seconds"]
        scores = found.get("scores")
        if second:
            then = second[0].ask(texts=found["texts"])
            scores = then["scores"]
            run["score_s"] = then["seconds"]
            for name in {"peak_MiB", "gpu_MiB"} & set(run):
                run[name] += then[name]
            run["total_s"] += then["seconds"]
        else:
            run["generate_s"] -= run["score_s"]
        if not more:
            truth = processes["published"].ask(truth=found["texts"])["scores"]
            run["steps"] = sum(map(len, truth))
            lengths = {len(text) - len(given["prompt"]) for text in found["texts"]}
            check[way] = (
                check[way]
                or differ(scores, truth, rtol)
                or ("" if lengths == {given["tokens"]} else f"{lengths} tokens")
            )
        return run

    try:
        for way in PROCESSES:
            run(way, 0, tokens=4)  # warm up
        for i in range(rounds):
            others.wait(patience)
            for way in list(PROCESSES) if i % 2 else list(PROCESSES)[::-1]:
                others.begin()
                runs[way].append(run(way, i + 1))
                busy.append(others.cores())
                print(way, runs[way][-1], flush=True)
    finally:
        for process in processes.values():
            process.close()
    ours = [r["total_s"] for r in runs["reflective_vllm"]]
    rows = []
    for way, found in runs.items():
        ratios = [r["total_s"] / o for r, o in zip(found, ours, strict=True)]
        rows.append(
            {"way": way, "n": given["n"], "tokens": given["tokens"], "dtype": given["dtype"], "rounds": rounds}
            | {name: round(statistics.median(r[name] for r in found), 4) for name in found[0]}
            | {"times_ours": round(statistics.median(ratios), 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3)}
            | {"vllm": release("vllm", "vllm-cpu")} | cores(busy)
            | {"check": check[way] or ("scores equal" if found[-1]["steps"] else "no step was decoded")}
        )  # fmt: skip
    return rows


def embedded(args: argparse.Namespace) -> Row:
    """``given`` of the embedded model."""
    import reflective as rf
    from reflective.checkpoints import default
    from reflective.checkpoints.vllm import for_vllm

    model = rf.ReflectiveModel.default()
    return {
        "plain": str(for_vllm(default.converted(), head=default.HEAD).model), "device": "cpu", "dtype": "float32",
        "question": QUESTION, "prompt": model.encode(model.format(QUESTION))[0].tolist(), "n": args.n, "tokens": args.tokens,
        "hf": {}, "vllm": {k: v for k, v in small("float32", args.n, 1024).items() if k != "dtype"},
    }  # fmt: skip


def main() -> int:
    from reflective.benchmarks.record import RESULTS, write

    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("overhead", "best_of_n", "serve"))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--pairs", type=int, default=12, help="of generations")
    parser.add_argument("--stepped", type=int, default=6, help="generations whose steps take turns")
    parser.add_argument("--tokens", type=int, help="of a sequence: 64, or of a candidate: 128")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for others on the machine to rest")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--what", help="of serve, which the others start")
    parser.add_argument("--given", type=json.loads)
    args = parser.parse_args()
    surroundings("cuda" if torch.cuda.is_available() else "cpu")
    # vLLM's worker in this process, whose time and memory then are all there is; on a CPU it would have one of its own.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if args.part == "serve":
        serve(args.what, args.given)
        return 0
    args.tokens = args.tokens or (64 if args.part == "overhead" else 128)
    rows = []
    for row in overhead(args) if args.part == "overhead" else best_of_n(embedded(args), args.rounds, args.patience):
        rows.append(row)
        print(row, flush=True)
        write(f"in_vllm_{args.part}", rows, args.out)
    return int(any(row["check"] != "scores equal" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
