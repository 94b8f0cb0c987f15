"""The README's table of measured numbers, made from ``results/*.csv`` and the head's report.

python benchmarks/report.py            # print it
python benchmarks/report.py --write    # put it between the README's markers
"""

import argparse
import json
from pathlib import Path

from reflective.benchmarks.cases import OURS
from reflective.benchmarks.record import RESULTS, read
from reflective.benchmarks.reproduction.choosing import BEST
from reflective.benchmarks.suite import speedups

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
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
ENOUGH = 20  # pairs for a median worth showing
BEGIN, END = "<!-- measured: python benchmarks/report.py --write -->\n", "<!-- end of measured -->\n"


def decode_step() -> list[tuple[str, str, str]]:
    found = read("decode_step")

    def of(implementation: str, dtype: str, H: str) -> dict[int, float]:
        keep = [r for r in found if (r["implementation"], r["dtype"], r["H"]) == (implementation, dtype, H)]
        return {int(r["rows"]): float(r["q50_us"]) for r in keep}

    lines = []
    for dtype in ("float32", "bfloat16"):
        for H in ("576", "1536"):
            ours, expression, compiled = (of(name, dtype, H) for name in ("reflective", "expression", "compile"))
            pairs = ", ".join(f"{ours[n]:.0f} against {expression[n]:.0f} and {compiled[n]:.0f}" for n in (1, 8))
            least = min(min(expression[n], compiled[n]) / ours[n] for n in (1, 2, 4, 8))
            lines.append(
                (
                    f"decode step, 8 sequences, {dtype}, H = {H}",
                    f"idle {ours[0]:.1f} µs; 1 and 8 steps: {pairs} µs (PyTorch, torch.compile)",
                    f"{least:.1f}x at the least, 1 to 8 steps",
                )
            )
    return lines


def decode_modes(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each mode of ``decode_modes.csv``, of its schedules whose scores were right."""
    found = [r for r in read("decode_modes", folder) if r["throughput_kept"]]
    lines = []
    for mode in dict.fromkeys(r["mode"] for r in found):
        rows = [r for r in found if r["mode"] == mode]
        kept = "; ".join(
            f"{r['schedule']} {_percent(r['throughput_kept'])} ({_percent(r['kept_q20'])} to {_percent(r['kept_q80'])})"
            for r in rows
        )
        kept = f"of the tokens/s without scorer: {kept}, medians and 20 to 80 % quantiles"
        if int(rows[0]["pairs"]) < ENOUGH:
            kept = "whole calls take turns, too few of them to tell a few per cent"
        spent = ", ".join(f"{float(r['scorer_us']):.0f}" for r in rows)
        lines.append(
            (
                f"SmolLM2-135M, {MODES[mode]}, batch {rows[0]['batch']}",
                kept,
                f"{spent} µs of {float(rows[0]['plain_ms']):.1f} ms a forward in the scorer",
            )
        )
    return lines


def _percent(share: str, digits: int = 1) -> str:
    return f"{100 * float(share):.{digits}f} %"


def best_of_n(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    found = {r["way"]: r for r in read("best_of_n", folder)}
    if not found:
        return []
    ours, theirs = found["reflective"], found["published"]

    def time(row: dict[str, str]) -> str:
        return f"{float(row['generate_s']):.1f} s + {1e3 * float(row['score_s']):,.0f} ms scoring"

    less = float(theirs["score_s"]) / float(ours["score_s"])
    return [
        (
            f"SmolLM2-135M, best of {ours['n']}, {ours['tokens']} tokens each",
            f"{time(ours)}, {float(ours['score_MiB']):.1f} MiB for it; the published way {time(theirs)}, "
            + f"{float(theirs['score_MiB']):,.0f} MiB",
            f"scoring: {less:,.0f} times less time, "
            + f"{float(ours['score_MiB']) / float(theirs['score_MiB']):.1%} of the memory",
        )
    ]


SHOWN = ("select", "prune", "prune, at random", "replace", "replace, at random", "step_beam", "particles")


def strategies(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each family of ``strategies.csv``, of 16 candidates; of ``auto`` beside best of 8."""
    found = read("strategies", folder)
    exits = {r["family"]: r for r in read("strategies_exit", folder)}
    lines = []
    for family in dict.fromkeys(r["family"] for r in found):
        rows = {(r["strategy"], r["n"]): r for r in found if r["family"] == family}
        best, shown = rows["best_of_n", "16"], [rows[name, "16"] for name in SHOWN if (name, "16") in rows]
        tokens = [f"{r['strategy']} {float(r['tokens_kept']):.0%}" for r in shown if float(r["tokens_kept"]) != 1]
        if auto := rows.get(("auto", "8")):
            tokens.append(f"auto {float(auto['tokens_kept']):.0%} of best of 8's ({_difference(auto)})")
        if family in exits:
            ended = exits[family]
            tokens.append(
                f"exit {float(ended['tokens_kept']):.0%} of one candidate's (answers changed: {float(ended['changed']):.1%}, stated {float(ended['stated_risk']):.0%})"
            )
        lines.append(
            (
                f"strategies on {best['questions']} unseen {family} of 8 to 10 steps, {best['seeds']} heads, n = 16; accuracy less best of 16's, paired",
                f"best of 16 {_accuracy(best)}; " + ", ".join(f"{r['strategy']} {_difference(r)}" for r in shown),
                "tokens: " + ", ".join(tokens),
            )
        )
    return lines


def _difference(row: dict[str, str]) -> str:
    return f"{float(row['difference']):+.3f} ({float(row['difference_low']):+.3f} – {float(row['difference_high']):+.3f})"


def _accuracy(row: dict[str, str]) -> str:
    return f"{float(row['accuracy']):.3f} ({float(row['accuracy_low']):.3f} – {float(row['accuracy_high']):.3f})"


WAYS_IN_VLLM = {
    "reflective_vllm": "scored in vLLM",
    "reflective_hf": "scored with transformers",
    "vllm_published": "stock vLLM, then the published way",
    "vllm_vllm": "stock vLLM, then a second vLLM's prefill",
}


def in_vllm(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each number of sequences of ``in_vllm_overhead.csv``, and one for ``in_vllm_best_of_n.csv``."""
    lines = []
    for r in read("in_vllm_overhead", folder):
        kept = "; ".join(
            f"{of} {_percent(r[key])} ({_percent(r[f'{key}_low'])} to {_percent(r[f'{key}_high'])})"
            for key, of in (("kept", "generations"), ("steps_kept", "neighbouring steps"))
        )
        lines.append((
            f"SmolLM2-135M in vLLM, {r['dtype']}, {r['sequences']} sequences",
            f"of the tokens/s without scorer: {kept}, medians and 95 % intervals",
            f"{float(r['scorer_us']):.0f} µs of {float(r['step_ms']):.1f} ms a step in the scorer ({_percent(r['scorer_share'], 2)}), "
            + f"{float(r['wrapper_us']):.0f} with its bookkeeping",
        ))  # fmt: skip
    rows = read("in_vllm_best_of_n", folder)
    if rows:
        first = rows[0]
        lines.append((
            f"SmolLM2-135M, best of {first['n']} in vLLM, {first['tokens']} tokens each",
            "; ".join(f"{WAYS_IN_VLLM[r['way']]} {float(r['total_s']):.1f} s, {float(r['peak_MiB']):,.0f} MiB" for r in rows),
            "times ours: " + ", ".join(f"{float(r['times_ours']):.2f} ({r['least']} to {r['most']})" for r in rows[1:]),
        ))  # fmt: skip
    return lines


def soak(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    found = read("soak", folder)
    if not found:
        return []
    last = found[-1]

    def grown(run: str) -> float:
        samples = [float(r["resident_MiB"]) for r in found if r["run"] == run]
        return samples[-1] - samples[len(samples) // 4]

    return [
        (
            f"{last['sequences']} sequences of {int(last['tokens']):,} tokens, {int(last['steps']):,} steps scored",
            f"memory over the last three quarters: {grown('scored'):+.1f} MiB, without scorer {grown('plain'):+.1f} MiB "
            + f"(the ids alone take {last['ids_MiB']})",
            f"{last['scorer_seconds']} of {last['seconds']} s in the scorer",
        )
    ]


def finished_text() -> list[tuple[str, str, str]]:
    found = {r["way"]: r for r in read("finished_text")}
    published, forward, ours = (found[way] for way in ("published", "forward", "score"))
    share = float(ours["peak_extra_MiB"]) / float(published["peak_extra_MiB"])
    return [
        (
            f"`rf.score`, one text of {int(ours['tokens']):,} tokens",
            f"{float(ours['peak_extra_MiB']):,.0f} MiB of extra memory at the peak, published way "
            + f"{float(published['peak_extra_MiB']):,.0f} MiB",
            f"{share:.1%} of the memory; {float(ours['median_s']):.1f} s, full forward {float(forward['median_s']):.1f} s",
        )
    ]


def head() -> list[tuple[str, str, str]]:
    report = json.loads(HEAD_REPORT.read_text())
    m = report["metrics"]

    def show(name: str) -> str:
        return f"{m[name]['value']:.3f} ({m[name]['low']:.3f} – {m[name]['high']:.3f})"

    return [
        (
            f"embedded model, {report['questions']} unseen questions, {report['samples']} samples, 95 % intervals",
            f"pass@1 {show('pass@1')}, majority@8 {show('majority@8')}, any@8 {show('any@8')}",
            f"best of 8 by score {show('best_of@8')}, score-weighted vote {show('weighted_vote@8')}",
        )
    ]


def reproduction(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each family and policy of ``reproduction.csv``."""
    rows = [r for r in read("reproduction", folder) if r["table"].endswith("joint training")]
    lines = []
    for key in dict.fromkeys((r["family"], r["table"], r["variant"]) for r in rows):
        at = {r["measure"]: r for r in rows if (r["family"], r["table"], r["variant"]) == key}

        def show(name: str, at: dict[str, dict[str, str]] = at) -> str:
            low, high = (float(at[name][k]) for k in ("low", "high"))
            return f"{float(at[name]['value']):.3f} ({low:.3f} – {high:.3f})"

        family, when, variant = key
        lines.append(
            (
                f"{family}, {when}, {variant}; {at['pass@1']['questions']} unseen questions, {at['pass@1']['seeds']} seeds",
                f"pass@1 {show('pass@1')}, majority@8 {show('majority@8')}, any@8 {show('any@8')}",
                f"best of 2 / 8 / 32 by score {' / '.join(show(f'best_of@{n}') for n in (2, 8, 32))}, "
                + f"score-weighted vote@8 {show('weighted_vote@8')}",
            )
        )
    return lines


def choosing(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each family of ``reproduction_choosing.csv``, of its best heads."""
    rows = [r for r in read("reproduction_choosing", folder) if r["table"] == "learning" and r["variant"] == BEST]
    lines = []
    for family in dict.fromkeys(r["family"] for r in rows):
        at = {r["measure"]: {k: float(r[k]) for k in ("value", "low", "high")} for r in rows if r["family"] == family}
        first = next(r for r in rows if r["family"] == family)

        def of(rule: str, at: dict[str, dict[str, float]] = at) -> str:
            return " / ".join(f"{at[f'{rule}@{n}']['value']:.3f}" for n in (2, 8, 32))

        def less(rule: str, at: dict[str, dict[str, float]] = at) -> str:
            difference = at[f"select@32 - {rule}@32"]
            return f"{difference['value']:+.3f} ({difference['low']:+.3f} – {difference['high']:+.3f})"

        lines.append(
            (
                f"{family}, frozen policy, a head that learnt more; {first['questions']} unseen questions, {first['seeds']} seeds, N = 2 / 8 / 32",
                f"majority {of('majority')}, one of N {of('any')}",
                f"best of N {of('best_of')}, `select` {of('select')}; at 32 `select` less majority {less('majority')}, less best of N {less('best_of')}",
            )
        )
    return lines


def gpu(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each width of ``gpu_suite.csv``, bfloat16, of the fastest of our implementations, and one for its flush."""
    found = read("gpu_suite", folder)

    def best(op: str, variant: str, H: int, n: int, time: str) -> dict[str, str] | None:
        cell = (op, variant, str(H), str(n), "bfloat16", "ok")
        names = ("op", "variant", "H", "rows", "dtype", "status")
        timed = [r for r in found if tuple(r[k] for k in names) == cell and r[f"{time}_q50_us"]]
        return min(
            (r for r in timed if r["implementation"] in OURS), key=lambda r: float(r[f"{time}_q50_us"]), default=None
        )

    def against(row: dict[str, str]) -> str:
        return ", ".join(f"{ratio:.1f}x {NAMES[peer]}" for peer, ratio in speedups(row, found).items())

    lines = []
    for H in sorted({int(r["H"]) for r in found} - {0}):
        idle = best("decode_step", "immediate", H, 0, "warm")
        steps = {n: row for n in (1, 8, 16) if (row := best("decode_step", "immediate", H, n, "cold"))}
        flush = best("flush", "", H, 256, "cold")
        parts = [f"idle {float(idle['warm_q50_us']):.2f} µs"] if idle else []
        parts += [
            f"{n} step{'s' * (n > 1)} {float(r['cold_q50_us']):.1f} µs, {float(r['percent_of_copy']):.0f} % of copy"
            for n, r in steps.items()
        ]
        parts += [f"flush of 256 rows {float(flush['cold_q50_us']):.1f} µs"] if flush else []
        if parts:
            faster = against(steps[1]) if 1 in steps else ""
            lines.append((f"decode step, H = {H}, bfloat16", "; ".join(parts), faster and f"1 step: {faster}"))
    return lines


def gpu_decode(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each model and batch of ``gpu_decode_overhead.csv``, each model of ``gpu_best_of_n.csv``, and generating."""
    lines = []
    found = [r for r in read("gpu_decode_overhead", folder) if r["throughput_kept"]]
    for model, batch in dict.fromkeys((r["model"], r["batch"]) for r in found):
        rows = [r for r in found if (r["model"], r["batch"]) == (model, batch)]
        kept = "; ".join(
            f"{r['schedule']} {_percent(r['throughput_kept'], 2)} (rounds {_percent(r['kept_least'], 2)} to "
            + f"{_percent(r['kept_most'], 2)}), {float(r['added_us']):+.1f} µs"
            for r in rows
        )
        step = f"a step {float(rows[0]['plain_ms']):.2f} ms, {rows[0]['tokens']} tokens a round"
        lines.append(
            (f"decoding by captured graphs, {model} shape, batch {batch}, of the tokens/s without scorer", kept, step)
        )
    for r in read("gpu_best_of_n", folder):
        ours, theirs = float(r["scoring_s"]), float(r["second_pass_s"])
        lines.append((
            f"scoring best of {r['n']}, {r['tokens']} tokens, {r['model']} shape, {r['schedule']}",
            f"{1e3 * ours:.1f} ms, {float(r['scoring_MiB']):.1f} MiB",
            f"second pass {theirs:.2f} s, {float(r['second_pass_MiB']):,.0f} MiB: {theirs / ours:,.0f} times less time",
        ))  # fmt: skip
    ways = {r["way"]: r for r in read("gpu_generate", folder)}
    if first := ways.get("reflective", ways.get("reflective, batch")):
        name = f"ReflectiveModel.generate, {first['n']} candidates, {first['model']} shape, {first['layers']} layers"
        others = ", ".join(
            f"{way.removeprefix('reflective, ') if 'reflective' in way else 'transformers ' + way} {float(r['tokens_per_s']):,.0f}"
            for way, r in ways.items()
            if r is not first
        )
        lines.append((name, f"{float(first['tokens_per_s']):,.0f} tokens/s", others))
    return lines


def gpu_vllm(folder: Path = RESULTS) -> list[tuple[str, str, str]]:
    """A line for each model and number of sequences of ``gpu_vllm_overhead.csv``."""
    return [
        (
            f"in vLLM, {r['model']} shape, {r['sequences']} sequences, of stock vLLM's tokens/s",
            f"{_percent(r['kept'], 2)} ({_percent(r['kept_low'], 2)} to {_percent(r['kept_high'], 2)}), {float(r['added_us']):+.1f} µs",
            f"a step {float(r['step_ms']):.2f} ms",
        )
        for r in read("gpu_vllm_overhead", folder)
    ]


def _gpu_table(folder: Path = RESULTS) -> list[str]:
    lines = gpu(folder)
    if not lines:
        return ["GPU: not yet measured. `benchmarks/gpu.sh` measures it.", ""]
    first = read("gpu_suite", folder)[0]
    versions = f"driver {first['driver']}, CUDA {first['cuda']}, torch {first['torch']}, triton {first['triton']}"
    copy = float(next(r["copy_GB_per_s"] for r in read("gpu_suite", folder) if r["copy_GB_per_s"]))
    return [
        "| GPU | kernel time: CUDA graphs, cold L2, medians | against |", "|---|---|---|",
        *("| " + " | ".join(line) + " |" for line in (*lines, *gpu_decode(folder), *gpu_vllm(folder))), "",
        f"{first['gpu']}, copy {copy:,.0f} GB/s, {versions}. File: `benchmarks/results/gpu_suite.csv`, by `benchmarks/gpu.sh`.",
        "",
    ]  # fmt: skip


def table(folder: Path = RESULTS) -> str:
    first = read("decode_step", folder)[0]
    lines = ["| what | measured | |", "|---|---|---|"]
    lines += [
        "| " + " | ".join(row) + " |"
        for part in (decode_step, decode_modes, best_of_n, in_vllm, soak, finished_text, head, reproduction, choosing, strategies)
        for row in part()
    ]
    where = f"{first['cpu']}, {first['cores']} cores, torch {first['torch']}, transformers {first['transformers']}"
    cpu = f"CPU: {where}. Files: `benchmarks/results`, regenerated by `make bench`."
    return "\n".join([*lines, "", cpu, "", *_gpu_table(folder)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(table())
        return
    text = README.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
