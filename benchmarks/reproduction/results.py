"""``RESULTS.md`` beside this file: the recipe's CSV files as tables to read."""

from pathlib import Path

from reflective.benchmarks.record import RESULTS, read

from .families import FAMILIES

FILE = Path(__file__).with_name("RESULTS.md")
SELECTION = ("pass@1", *(f"{how}@{n}" for n in (2, 8, 32) for how in ("majority", "weighted_vote", "best_of", "any")))
DIFFERENCES = ("best_of@8 - majority@8", "weighted_vote@8 - majority@8", "best_of@32 - best_of@8")  # paired
QUALITY = ("auc_within", "auc_trajectory", "auc_step", "score_correct", "score_incorrect", "kept", "ece")
ABLATIONS = {
    "rollouts": "How many rollouts the head learns from",
    "weights": "Weights of the loss",
    "layer": "Which hidden state the head reads (`hidden_states[...]`; -1 is after the final norm)",
    "at": "Which token's state is the feature of a step",
    "step rule": "Where steps end",
    "width": "Width of the head",
    "transfer": "Heads on other families than their own",
}
BEYOND = ("auc_covariates", "auc_beyond", "within_covariates", "within_beyond")
LAYERS = """Layers were chosen on a quarter of the training questions, by the AUC within them of heads that learnt from the rest; nothing of the
evaluation had a part in it. {choice}
Heads learn from all of the training questions, with {seeds} seeds, and are measured on {questions} others. `auc_covariates`: a logistic regression on a response's tokens, steps and the share of
right answers among its question's other draws; `auc_beyond`: the score, these taken out. `within_*`: the same within questions, by
tokens and steps (`layers.py` says how).
"""
HEAD = """# The paper's result in miniature

Written by `python -m reflective.benchmarks.reproduction` from `benchmarks/results/reproduction*.csv`, which hold every number with
hardware and versions. SmolLM2-135M-Instruct; {seeds} seeds, {questions} questions a family that nothing was trained on, 32 answers to
each, temperature 0.8. In brackets 95 % intervals, resampled over questions and seeds. Questions and prompts: `families.py`.
"""


def markdown(folder: Path = RESULTS) -> str:
    """The text of ``RESULTS.md``."""
    rows = read("reproduction", folder)
    found: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for r in rows:
        found.setdefault((r["table"], r["variant"]), {})[r["family"], r["measure"]] = r
    first = next(r for r in rows if r["measure"] == "pass@1")
    parts = [HEAD.format(seeds=first["seeds"], questions=first["questions"])]
    for names, title in (
        (("before joint training", "after joint training"), "Choosing by score, before and after joint training"),
        (("outcome head",), "Against a head at the last token alone"),
        (("separate PRM",), "Against a separate PRM, trained on the same rollouts"),
    ):
        for family in FAMILIES:
            variants = [
                (key[1] if len(names) == 1 else f"{key[1]}, {key[0]}", cells)
                for key, cells in found.items()
                if key[0] in names and (family, "pass@1") in cells
            ]
            measures = [m for m in (*SELECTION, *DIFFERENCES, *QUALITY) if any((family, m) in cells for _, cells in variants)]
            if variants:
                lines = [[m, *(_show(cells.get((family, m))) for _, cells in variants)] for m in measures]
                parts += [f"## {title}: {family}\n", _table([family, *(name for name, _ in variants)], lines)]
    costs = found.get(("separate PRM", "cost"), {})
    if costs:
        lines = [[name.replace("_", " "), _number(float(row["value"]))] for (_, name), row in costs.items()]
        parts += ["## What a separate PRM costs\n", _table(["", "median of the seeds"], lines)]
    for table, title in ABLATIONS.items():
        parts += [f"## {title}\n", _by_family(found, table, ("best_of@8", "auc_within"))]
    parts += _layers(read("reproduction_layers", folder))
    parts += _choosing(read("reproduction_choosing", folder))
    parts += ["## How step scores become one\n", _by_family(found, "aggregation", ("best_of@8", "best_of@32"))]
    lines = [
        [
            f"{family}, {how}",
            *(f"{float(cells[family, name]['value']):.2f}" for name in ("limit", "rate")),
            _count(cells[family, "n95"]),
        ]
        for (table, how), cells in found.items()
        if table == "saturation"
        for family in FAMILIES
    ]
    parts += [
        "## Accuracy against N, fitted by limit - gain N^-rate\n",
        _table(["", "limit", "rate", "N with 95 % of the gain"], lines),
    ]
    return "\n".join(parts)


def _layers(rows: list[dict[str, str]]) -> list[str]:
    """The heads of a layer that was chosen for each family, in full size."""
    parts = []
    for family in dict.fromkeys(r["family"] for r in rows):
        found = {(r["variant"], r["measure"]): r for r in rows if r["family"] == family and r["table"] == "full size"}
        told = ""
        for how, when in (("chosen", "as long as the main ones"), ("chosen early", "a quarter as long")):
            each = (f"{r['variant']}: {float(r['value']):.3f}" for r in rows if r["family"] == family and r["table"] == how)
            told += f"Of heads that learnt {when}: {', '.join(each)}. "
        variants, size = list(dict.fromkeys(variant for variant, _ in found)), next(iter(found.values()))
        measures = [m for m in (*SELECTION, *QUALITY, *BEYOND) if any((v, m) in found for v in variants)]
        lines = [[m, *(_show(found.get((v, m))) for v in variants)] for m in measures]
        parts += [f"## A layer chosen on training questions: {family}\n", LAYERS.format(choice=told.strip(), seeds=size["seeds"], questions=size["questions"]), _table([family, *variants], lines)]
    return parts


CHOOSING = """One thing is changed after the other (`choosing.py`): dropout 0.1 in place of 0.5; the layer that heads tell right from wrong best by, within a quarter of
the training questions (here {layer}); 2,048 questions to learn from in place of 1,024, half as many epochs. `select`: votes weighed by a power of the score,
calibrated on 256 questions that nothing else is done with (exponent n^growth: {rules}). {questions} held-out questions, {seeds} seeds.
"""
CHOSEN = ("auc_within", "within_beyond", *(f"{how}@{n}" for how in ("majority", "weighted_vote", "select", "best_of", "any") for n in (2, 8, 32)))


def _choosing(rows: list[dict[str, str]]) -> list[str]:
    """Heads that learn better, and what choosing by them is worth."""
    parts = []
    for family in dict.fromkeys(r["family"] for r in rows):
        own = [r for r in rows if r["family"] == family]
        found = {(r["variant"], r["measure"]): r for r in own if r["table"] == "learning"}
        variants = list(dict.fromkeys(variant for variant, _ in found))
        rule = {(r["variant"], r["measure"]): float(r["value"]) for r in own if r["table"] == "rule"}
        best = variants[-2]  # the last but the seeds together
        rules = ", ".join(f"{rule[best, f'exponent, seed {s}']:.3g} n^{rule[best, f'growth, seed {s}']:g}" for s in range(int(found[best, "pass@1"]["seeds"])))
        layer = next(f"{float(r['value']):.0f}" for r in own if r["table"] == "layer")
        head = CHOOSING.format(layer=layer, rules=rules, questions=found[best, "pass@1"]["questions"], seeds=found[best, "pass@1"]["seeds"])
        lines = [[m, *(_show(found.get((v, m))) for v in variants)] for m in CHOSEN]
        parts += [f"## Heads that learn better, and choosing: {family}\n", head, _table([family, *variants], lines)]
        paired = [[m, _show(found[best, m])] for v, m in found if v == best and " - " in m]
        parts += [f"Paired differences, {best}:\n", _table(["", family], paired)]
        causes = [[r["measure"], _number(float(r["value"]))] for r in own if r["table"] == "causes"]
        parts += [_table(["", family], causes)]
    return parts


def _by_family(found: dict, table: str, measures: tuple[str, ...]) -> str:
    lines = [
        [variant, *(_show(cells.get((family, m))) for family in FAMILIES for m in measures)]
        for (name, variant), cells in found.items()
        if name == table
    ]
    return _table(["", *(f"{family}, {m}" for family in FAMILIES for m in measures)], lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _count(row: dict[str, str]) -> str:
    n = float(row["value"])
    return f"{n:.0f}" if n <= 1000 else "beyond 1,000"


def _show(row: dict[str, str] | None) -> str:
    if row is None:
        return ""
    return f"{float(row['value']):.3f} ({float(row['low']):.3f} – {float(row['high']):.3f})"


def _table(header: list[str], lines: list[list[str]]) -> str:
    cells = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)
