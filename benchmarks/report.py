"""Every figure that README and docs state, from ``results/*.csv`` and the embedded head's report.

python benchmarks/report.py                    # print all tables
python benchmarks/report.py --write            # write them, and every marked number, into README.md and docs/
python benchmarks/report.py --check            # fail where a text and a file differ, or a measured number has no mark
python benchmarks/report.py --write --check    # both: mend what differs, and fail (make numbers)

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->`` (``TABLES``). A number in a sentence has a mark behind it, which says where it
comes from and how it is written (``figures.py``)::

    the published way took 27.3<!--= best_of_n[way=published].score_s | .1f --> s
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from reflective.benchmarks import figures
from reflective.benchmarks.cases import OURS
from reflective.benchmarks.record import RESULTS, read
from reflective.benchmarks.reproduction.choosing import BEST
from reflective.benchmarks.suite import speedups

HERE = Path(__file__).parent
HEAD_REPORT = HERE.parent / "reflective" / "data" / "smollm2-135m-instruct" / "report.json"
NAMES = {"expression": "PyTorch", "cublas": "cuBLAS", "compile": "torch.compile", "published": "the published way"}
MODES = {
    "dynamic": "eager, dynamic cache",
    "static": "eager, static cache",
    "compiled": "torch.compile, static cache",
    "lookup": "prompt lookup",
    "beams": "beam search",
    "batching": "continuous batching",
}
SCHEDULES = ("deferred", "immediate")
ENOUGH = 20  # pairs for a median worth showing
Row = dict[str, str]
Cells = tuple[str, ...]


# -- how numbers are written -------------------------------------------------------------------------------------------


def _percent(share: str, digits: int = 1) -> str:
    return f"{100 * float(share):.{digits}f} %"


def _time(seconds: str) -> str:
    """In the unit that leaves two or three digits."""
    s = float(seconds)
    return f"{1e6 * s:.0f} µs" if s < 1e-3 else f"{1e3 * s:.1f} ms" if s < 0.1 else f"{s:.2f} s" if s < 10 else f"{s:.1f} s"


def _MiB(value: str) -> str:
    return f"{float(value):,.1f} MiB" if float(value) < 100 else f"{float(value):,.0f} MiB"


def _interval(row: Row, sign: str = "") -> str:
    return f"{float(row['value']):{sign}.3f} ({float(row['low']):{sign}.3f} to {float(row['high']):{sign}.3f})"


# -- against a second pass ---------------------------------------------------------------------------------------------


def second_pass(folder: Path = RESULTS) -> list[Cells]:
    """Scoring alone, in the stream and by the published second pass: ``gpu_best_of_n.csv`` and ``best_of_n.csv``."""
    lines = [
        (
            f"{r['model']} shape, {r['n']} × {int(r['tokens']):,} tokens, {r['gpu']}, {r['schedule']}", _time(r["scoring_s"]), _MiB(r["scoring_MiB"]),
            _time(r["second_pass_s"]), _MiB(r["second_pass_MiB"]), f"{float(r['second_pass_s']) / float(r['scoring_s']):,.0f}",
        )
        for r in read("gpu_best_of_n", folder)
    ]  # fmt: skip
    return lines + [
        (f"SmolLM2-135M, {ours['n']} × {ours['tokens']} tokens, two CPU cores, deferred", _time(ours["score_s"]), _MiB(ours["score_MiB"]),
         _time(theirs["score_s"]), _MiB(theirs["score_MiB"]), f"{float(theirs['score_s']) / float(ours['score_s']):,.0f}")
        for ours, theirs in _best_of_n(folder)
    ]  # fmt: skip


def best_of_n(folder: Path = RESULTS) -> list[Cells]:
    """The whole of best of n on a CPU with transformers, answers and scores: ``best_of_n.csv``."""
    ways = {"reflective": "`ReflectiveModel.generate`", "published": "`generate`, then the published second pass"}
    return [
        (ways[r["way"]], _time(r["generate_s"]), _time(r["score_s"]), f"{float(r['generate_s']) + float(r['score_s']):.1f} s", _MiB(r["score_MiB"]))
        for pair in _best_of_n(folder)
        for r in pair
    ]


def _best_of_n(folder: Path) -> Iterable[tuple[Row, Row]]:
    found = {r["way"]: r for r in read("best_of_n", folder)}
    return [(found["reflective"], found["published"])] if found else []


WAYS_IN_VLLM = {
    "reflective_vllm": "scored in vLLM",
    "reflective_hf": "scored with transformers",
    "vllm_published": "stock vLLM, then the published way",
    "vllm_vllm": "stock vLLM, then a second vLLM's prefill",
}


def in_vllm_best_of_n(folder: Path = RESULTS) -> list[Cells]:
    return [
        (
            WAYS_IN_VLLM[r["way"]], _time(r["generate_s"]), _time(r["score_s"]), f"{float(r['total_s']):.1f} s", f"{float(r['peak_MiB']):,.0f} MiB",
            f"{float(r['times_ours']):.2f}" + (f" ({r['least']} to {r['most']})" if r["way"] != "reflective_vllm" else ""),
        )
        for r in read("in_vllm_best_of_n", folder)
    ]  # fmt: skip


# -- decoding with a scorer --------------------------------------------------------------------------------------------


def decode_modes(folder: Path = RESULTS) -> list[Cells]:
    """A line for each mode of ``decode_modes.csv``, of its schedules whose scores were right."""
    found = [r for r in read("decode_modes", folder) if r["throughput_kept"]]
    lines = []
    for mode in dict.fromkeys(r["mode"] for r in found):
        rows = {r["schedule"]: r for r in found if r["mode"] == mode}
        first = next(iter(rows.values()))
        enough = int(first["pairs"]) >= ENOUGH
        kept = [
            f"{_percent(r['throughput_kept'])} ({_percent(r['kept_q20'])} to {_percent(r['kept_q80'])})" if enough else "too few pairs to tell"
            for s in SCHEDULES
            if (r := rows.get(s)) or not lines
        ]
        spent = " / ".join(f"{float(r['scorer_us']):.0f}" for r in rows.values())
        lines.append((f"{MODES[mode]}, batch {first['batch']}", *kept, f"{spent} µs of {float(first['plain_ms']):.1f} ms"))
    return lines


def in_vllm_overhead(folder: Path = RESULTS) -> list[Cells]:
    return [
        (
            r["sequences"],
            *(f"{_percent(r[key])} ({_percent(r[f'{key}_low'])} to {_percent(r[f'{key}_high'])})" for key in ("kept", "steps_kept")),
            f"{float(r['scorer_us']):.0f} µs of {float(r['step_ms']):.1f} ms ({_percent(r['scorer_share'], 2)})", f"{float(r['wrapper_us']):.0f} µs",
        )
        for r in read("in_vllm_overhead", folder)
    ]  # fmt: skip


def gpu_decode(folder: Path = RESULTS) -> list[Cells]:
    """A line for each model and batch of ``gpu_decode_overhead.csv``, of the schedules whose scores were right."""
    found = [r for r in read("gpu_decode_overhead", folder) if r["throughput_kept"]]
    lines = []
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in found):
        rows = {r["schedule"]: r for r in found if (r["model"], r["batch"]) == (model, batch)}
        kept = [
            f"{_percent(r['throughput_kept'], 2)} ({_percent(r['kept_least'], 2)} to {_percent(r['kept_most'], 2)}), {float(r['added_us']):+.1f} µs"
            if (r := rows.get(s))
            else ""
            for s in SCHEDULES
        ]
        first = next(iter(rows.values()))
        lines.append((f"{model} shape, batch {batch}", *kept, f"{float(first['plain_ms']):.2f} ms", first["tokens"]))
    return lines


def gpu_vllm(folder: Path = RESULTS) -> list[Cells]:
    """A line for each model and number of sequences of ``gpu_vllm_overhead.csv``."""
    return [
        (
            f"{r['model']} shape, {r['sequences']} sequences",
            f"{_percent(r['kept'], 2)} ({_percent(r['kept_low'], 2)} to {_percent(r['kept_high'], 2)}), {float(r['added_us']):+.1f} µs",
            f"{float(r['step_ms']):.2f} ms",
        )
        for r in read("gpu_vllm_overhead", folder)
    ]


def gpu_generate(folder: Path = RESULTS) -> list[Cells]:
    """Whole searches on a GPU beside transformers' own ``generate``."""
    ways = {
        "reflective": "`ReflectiveModel.generate`, best of N", "reflective, prune": "the same, `prune`", "reflective, batch": 'the same, `decoding="batch"`',
        "eager": "transformers, eager", "compiled": "transformers, compiled, static cache",
    }  # fmt: skip
    return [
        (f"{ways[r['way']]}, {r['n']} × {r['tokens']} tokens, {r['model']} shape", f"{float(r['tokens_per_s']):,.0f}", _time(r["seconds"]), _time(r["warm_up_s"]))
        for r in read("gpu_generate", folder)
    ]


def search_loop(folder: Path = RESULTS) -> list[Cells]:
    """The package's own loop beside transformers', without a GPU: ``search_loop.csv``."""
    names = {
        "reflective": "`ReflectiveModel.generate`", "transformers dynamic": "`generate`, dynamic cache",
        "transformers static compiled": "`generate`, static cache, compiled", "transformers generate_batch": "`generate_batch`",
    }  # fmt: skip
    return [
        (
            r["n"], names[r["way"]], f"{float(r['seconds']):.1f} s ({float(r['q20']):.1f} to {float(r['q80']):.1f})", f"{float(r['of_reflective']):.2f}",
            f"{float(r['first_s']):.2f} s", f"{float(r['MiB']):,.0f} MiB",
        )
        for r in read("search_loop", folder)
    ]  # fmt: skip


# -- one step of decoding ----------------------------------------------------------------------------------------------


def decode_step(folder: Path = RESULTS) -> list[Cells]:
    found = read("decode_step", folder)

    def of(implementation: str, dtype: str, H: str) -> dict[int, float]:
        keep = [r for r in found if (r["implementation"], r["dtype"], r["H"]) == (implementation, dtype, H)]
        return {int(r["rows"]): float(r["q50_us"]) for r in keep}

    lines = []
    for dtype in ("float32", "bfloat16"):
        for H in ("576", "1536"):
            ours, expression, compiled = (of(name, dtype, H) for name in ("reflective", "expression", "compile"))
            pairs = (f"{ours[n]:.0f} / {expression[n]:.0f} / {compiled[n]:.0f}" for n in (1, 8))
            least = min(min(expression[n], compiled[n]) / ours[n] for n in (1, 2, 4, 8))
            lines.append((f"H = {H}, {dtype}", f"{ours[0]:.1f}", *pairs, f"{least:.1f}x"))
    return lines


def gpu(folder: Path = RESULTS) -> list[Cells]:
    """A line for each width of ``gpu_suite.csv``, bfloat16, of the fastest of our implementations, and its flush."""
    found = read("gpu_suite", folder)

    def best(op: str, variant: str, H: int, n: int, time: str) -> Row | None:
        cell = (op, variant, str(H), str(n), "bfloat16", "ok")
        names = ("op", "variant", "H", "rows", "dtype", "status")
        timed = [r for r in found if tuple(r[k] for k in names) == cell and r[f"{time}_q50_us"]]
        return min((r for r in timed if r["implementation"] in OURS), key=lambda r: float(r[f"{time}_q50_us"]), default=None)

    lines = []
    for H in sorted({int(r["H"]) for r in found} - {0}):
        idle = best("decode_step", "immediate", H, 0, "warm")
        steps = {n: best("decode_step", "immediate", H, n, "cold") for n in (1, 8, 16)}
        flush = best("flush", "", H, 256, "cold")
        cells = [f"{float(idle['warm_q50_us']):.2f}" if idle else ""]
        cells += [f"{float(r['cold_q50_us']):.1f} ({float(r['percent_of_copy']):.0f} %)" if r else "" for r in steps.values()]
        cells += [f"{float(flush['cold_q50_us']):.1f}" if flush else ""]
        peers = ", ".join(f"{ratio:.1f}x {NAMES[peer]}" for peer, ratio in speedups(steps[1], found).items()) if steps[1] else ""
        if any(cells):
            lines.append((f"H = {H}", *cells, peers))
    return lines


def fp8(folder: Path = RESULTS) -> list[Cells]:
    """What fewer bits of the head's first weights cost: ``fp8_error.csv``."""
    return [
        (
            r["w1"], r["features"], f"{float(r['max_abs_error']):.1e}", f"{float(r['best_of_8']):.3f} ({float(r['best_of_8_low']):.3f} to {float(r['best_of_8_high']):.3f})",
            f"{float(r['auc_within']):.3f} ({float(r['auc_within_low']):.3f} to {float(r['auc_within_high']):.3f})",
        )
        for r in read("fp8_error", folder)
    ]  # fmt: skip


# -- memory, finished text, training -----------------------------------------------------------------------------------


def soak(folder: Path = RESULTS) -> list[Cells]:
    found = read("soak", folder)
    if not found:
        return []
    last = found[-1]

    def grown(run: str) -> str:
        samples = [float(r["resident_MiB"]) for r in found if r["run"] == run]
        return f"{samples[-1] - samples[len(samples) // 4]:+.1f} MiB"

    what = f"{last['sequences']} sequences of {int(last['tokens']):,} tokens, {int(last['steps']):,} steps scored"
    return [(what, grown("scored"), grown("plain"), f"{last['ids_MiB']} MiB", f"{last['scorer_seconds']} of {last['seconds']} s")]


def finished_text(folder: Path = RESULTS) -> list[Cells]:
    ways = {"published": "the published way", "forward": "the model's forward alone", "score": "`rf.score`"}
    return [(ways[r["way"]], f"{int(r['tokens']):,}", _MiB(r["peak_extra_MiB"]), f"{float(r['median_s']):.1f} s") for r in read("finished_text", folder)]


def batch_scoring(folder: Path = RESULTS) -> list[Cells]:
    ways = {"published": "the published way, text by text", "single": "`rf.score`, text by text", "unsorted": "in batches, as they come", "sorted": "in batches by length (`reflective score`)"}
    return [
        (ways[r["way"]], f"{float(r['rows_per_s']):.2f}", f"{float(r['tokens_per_s']):,.0f}", f"{float(r['padding']):.0%}")
        for r in read("batch_scoring", folder)
    ]


def training_speed(folder: Path = RESULTS) -> list[Cells]:
    what = {
        "generate": "sampling: transformers' `generate`", "search loop": "sampling: `ReflectiveModel.generate`", "Sampler": "sampling: `reflective.train.Sampler`",
        "rows whole": "loss: every row whole", "prefix once": "loss: the common prefix once",
    }  # fmt: skip
    return [(what[r["way"]], f"{float(r['seconds']):.1f} s", f"{float(r['tokens_per_s']):,.0f}") for r in read("training_speed", folder)]


# -- what scores are worth ---------------------------------------------------------------------------------------------

MEASURES = {
    "pass@1": "one answer, no head", "majority@8": "majority of 8", "weighted_vote@8": "score-weighted vote of 8", "best_of@2": "best of 2 by score",
    "best_of@8": "best of 8 by score", "best_of@16": "best of 16 by score", "best_of@32": "best of 32 by score", "any@8": "one of 8 is right (ceiling)",
    "auc_within": "a right answer outscores a wrong one to the same question",
}  # fmt: skip


def head() -> list[Cells]:
    found = json.loads(HEAD_REPORT.read_text())["metrics"]
    return [(f"`{m}`", f"{found[m]['value']:.3f}", f"{found[m]['low']:.3f} to {found[m]['high']:.3f}", what) for m, what in MEASURES.items() if m in found]


def train_a_head(folder: Path = RESULTS) -> list[Cells]:
    """The worked example of docs/training.md."""
    return [
        (f"`{r['measure']}`", f"{float(r['value']):.3f}", f"{float(r['low']):.3f} to {float(r['high']):.3f}", MEASURES[r["measure"]])
        for r in read("train_a_head", folder)
    ]


def reproduction(folder: Path = RESULTS) -> list[Cells]:
    """A line for each family and policy of ``reproduction.csv``."""
    rows = [r for r in read("reproduction", folder) if r["table"].endswith("joint training")]
    shown = ("pass@1", "majority@8", "best_of@2", "best_of@8", "best_of@32", "weighted_vote@8", "any@8")
    lines = []
    for key in dict.fromkeys((r["family"], r["table"], r["variant"]) for r in rows):
        at = {r["measure"]: r for r in rows if (r["family"], r["table"], r["variant"]) == key}
        family, when, variant = key
        lines.append((f"{family}, {when.removesuffix(' joint training')}, {variant}", *(_interval(at[m]) for m in shown)))
    return lines


def choosing(folder: Path = RESULTS) -> list[Cells]:
    """A line for each family of ``reproduction_choosing.csv``, of its best heads."""
    rows = [r for r in read("reproduction_choosing", folder) if r["table"] == "learning" and r["variant"] == BEST]
    lines = []
    for family in dict.fromkeys(r["family"] for r in rows):
        at = {r["measure"]: r for r in rows if r["family"] == family}

        def of(rule: str, at: dict[str, Row] = at) -> str:
            return " / ".join(f"{float(at[f'{rule}@{n}']['value']):.3f}" for n in (2, 8, 32))

        less = [_interval(at[f"select@32 - {rule}@32"], "+") for rule in ("majority", "best_of")]
        lines.append((family, *map(of, ("majority", "best_of", "select", "any")), *less))
    return lines


SHOWN = (
    "select", "majority", "weighted_vote", "prune", "prune, at random", "prune, then select", "prune, then select, at random", "replace", "replace, at random",
    "step_beam", "particles",
)  # fmt: skip


def strategies(folder: Path = RESULTS) -> list[Cells]:
    """A line for each strategy of ``strategies.csv``: accuracy less best of 16's on the same questions, and tokens; of each family both."""
    found = read("strategies", folder)
    rows = {(r["strategy"], r["n"], r["family"]): r for r in found}
    families = list(dict.fromkeys(r["family"] for r in found))
    lines = []
    for name, n, other in [*((name, "16", "best of 16") for name in SHOWN), ("auto", "8", "best of 8")]:
        there = [rows.get((name, n, family)) for family in families]
        if any(there):
            cells = ((_difference(r), f"{float(r['tokens_kept']):.0%}") if r else ("", "") for r in there)
            lines.append((f"`{name}`" if "," not in name else f"{name}", other, *(cell for pair in cells for cell in pair)))
    return lines


def _difference(row: Row) -> str:
    return f"{float(row['difference']):+.3f} ({float(row['difference_low']):+.3f} to {float(row['difference_high']):+.3f})"


def machines(folder: Path = RESULTS) -> list[Cells]:
    """Where each file was recorded, by its first row."""
    lines = []
    for path in sorted(folder.glob("*.csv")):
        r = next(iter(read(path.stem, folder)))
        where = f"{r['gpu']}, driver {r['driver']}, CUDA {r['cuda']}, triton {r['triton']}" if r.get("gpu") else f"{r['cpu']}, {r['cores']} cores"
        if copy := r.get("copy_GB_per_s"):
            where += f", copy {float(copy):,.0f} GB/s"
        if r.get("vllm"):
            where += f", {r['vllm'] if 'vllm' in r['vllm'] else 'vllm ' + r['vllm']}"
        lines.append((f"`{path.name}`", where, r["torch"], r["transformers"]))
    return lines


# -- five rows for the README ------------------------------------------------------------------------------------------


def headline(folder: Path = RESULTS) -> list[Cells]:
    gpu7 = next(r for r in read("gpu_best_of_n", folder) if (r["model"], r["schedule"]) == ("7B", "deferred"))
    kept = next(r for r in read("gpu_decode_overhead", folder) if (r["model"], r["batch"], r["schedule"]) == ("7B", "64", "deferred"))
    ((ours, theirs),) = _best_of_n(folder)
    ways = {r["way"]: r for r in read("in_vllm_best_of_n", folder)}
    right = {r["measure"]: r for r in read("reproduction_shipped", folder)}
    value = {name: f"{float(right[name]['value']):.3f}" for name in ("pass@1", "majority@32", "select@32")}
    return [
        (
            f"Scoring best of {gpu7['n']}, {int(gpu7['tokens']):,} tokens each, 7B shape, H200", f"**{_time(gpu7['scoring_s'])}**, {_MiB(gpu7['scoring_MiB'])}",
            f"second pass: {_time(gpu7['second_pass_s'])}, {_MiB(gpu7['second_pass_MiB'])}",
        ),
        (
            "Tokens per second kept while scoring, 7B shape, batch 64, CUDA graphs, H200", f"**{_percent(kept['throughput_kept'], 2)}**",
            f"rounds: {_percent(kept['kept_least'], 2)} to {_percent(kept['kept_most'], 2)}",
        ),
        (
            f"Scoring best of {ours['n']}, SmolLM2-135M, two CPU cores", f"**{_time(ours['score_s'])}**, {_MiB(ours['score_MiB'])}",
            f"second pass: {_time(theirs['score_s'])}, {_MiB(theirs['score_MiB'])}",
        ),
        (
            f"Best of {ways['reflective_vllm']['n']} in stock vLLM, one CPU thread, answers and scores", f"**{_time(ways['reflective_vllm']['total_s'])}**",
            f"vLLM, then a second pass: {_time(ways['vllm_published']['total_s'])}",
        ),
        (
            f"Right answers of the embedded model, {right['pass@1']['questions']} unseen sums, 32 drawn and one chosen by score", f"**{value['select@32']}**",
            f"one answer: {value['pass@1']}; majority of 32: {value['majority@32']}",
        ),
    ]  # fmt: skip


_KEPT = ("", "deferred", "immediate")
TABLES: dict[str, tuple[Cells, Callable[[], list[Cells]]]] = {
    "headline": (("What", "reflective", "Compared with"), headline),
    "second_pass": (("Scoring best of 32", "time", "memory", "second pass: time", "memory", "times less time"), second_pass),
    "best_of_n": (("Way", "generate", "score", "together", "memory of scoring"), best_of_n),
    "in_vllm_best_of_n": (("Way", "generate", "score", "together", "memory, all processes", "times ours"), in_vllm_best_of_n),
    "gpu_decode": ((*_KEPT, "a step without scorer", "tokens a round"), gpu_decode),
    "decode_modes": ((*_KEPT, "in the scorer, deferred / immediate"), decode_modes),
    "in_vllm_overhead": (("Sequences", "whole generations", "neighbouring steps", "in the scorer, a step", "with its bookkeeping"), in_vllm_overhead),
    "gpu_generate": (("Way", "tokens/s", "time", "first call"), gpu_generate),
    "search_loop": (("Candidates", "Way", "time", "times ours", "first token", "memory"), search_loop),
    "gpu": (("µs (% of copy)", "idle", "1 step", "8 steps", "16 steps", "flush of 256 rows", "1 step, against"), gpu),
    "decode_step": (("µs: ours / PyTorch / torch.compile", "idle, ours", "1 step", "8 steps", "times faster, at the least"), decode_step),
    "fp8": (("First weights", "features", "largest error of a log-score", "best of 8", "AUC within questions"), fp8),
    "soak": (("", "grown, scored", "grown, without scorer", "the ids alone", "in the scorer"), soak),
    "finished_text": (("Way", "tokens", "extra memory at the peak", "time"), finished_text),
    "batch_scoring": (("Way", "texts/s", "tokens/s", "padding"), batch_scoring),
    "training_speed": (("", "time", "tokens/s"), training_speed),
    "machines": (("File", "Machine", "torch", "transformers"), machines),
    "head": (("Measure", "value", "95 % interval", ""), head),
    "train_a_head": (("Measure", "value", "95 % interval", ""), train_a_head),
    "reproduction": (("Family, joint training, head", "pass@1", "majority@8", "best of 2", "best of 8", "best of 32", "weighted vote@8", "any@8"), reproduction),
    "choosing": (("Family", "majority", "best of N", "`select`", "one of N is right", "`select` less majority, N = 32", "`select` less best of N, N = 32"), choosing),
    "strategies": (("Strategy", "compared with", "chains: accuracy", "tokens", "crates: accuracy", "tokens"), strategies),
}


def table(name: str) -> str:
    """The table of that name, in Markdown."""
    header, rows = TABLES[name][0], TABLES[name][1]()
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write tables and numbers into README.md and docs/")
    parser.add_argument("--check", action="store_true", help="fail where a text differs from its file, or a number has no mark")
    args = parser.parse_args()
    if not (args.write or args.check):
        print("\n".join(f"{name}\n\n{table(name)}" for name in TABLES))
        return
    differing = figures.update(table, write=args.write)
    wrong = [*differing, *figures.unmarked()] if args.check else []
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} figure(s)" + (": what differed is written anew; look at the difference" if args.write else "; make numbers writes them anew"))


if __name__ == "__main__":
    main()
