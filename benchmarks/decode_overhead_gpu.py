"""What the scorer adds to decoding a 1.5B-shaped model, batch 32, static cache, every step one CUDA graph; random weights.

    python benchmarks/decode_overhead_gpu.py [--out benchmarks/results] [--seconds 120] [--quick]

Modes: ``captured``, the model's eager kernels in a graph; ``compiled``, those of ``torch.compile(fullgraph=True)``; in both
the op of the scorer is part of the graph. ``generate``: transformers' own loop with a ``StreamScorer`` attached, eager. Plain
and scored rounds take turns. Beside them stand the op's own time, by graph replay over the same ids, and the published
pipeline's second pass over 32 texts of as many tokens, one at a time. One token in ``STEP_EVERY`` ends a step.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, StaticCache

import reflective as rf
from reflective.backbone import Backbone
from reflective.backend import choose_backend
from reflective.benchmarks.record import RESULTS, write
from reflective.kernels import layout
from reflective.state import StreamState

STEP_EVERY = 25
ROUND = 64  # decode steps timed together
SCHEDULES = ("deferred", "immediate")
SHAPE_1_5B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip
SHAPE_QUICK = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip


class Decode:
    """Decode steps of ``batch`` sequences from column ``past`` on, reading ids from a table: nothing waits for the host."""

    def __init__(self, model: PreTrainedModel, head: rf.SPRM, steps: rf.StepTokens, batch: int, past: int) -> None:
        self.model, self.batch, self.past = model, batch, past
        self.backbone, device = Backbone.of(model), model.device
        length = past + ROUND
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.columns = torch.arange(length, device=device)
        self.table = random_ids(model.config.vocab_size, batch, ROUND, device)
        self.position = torch.full((1,), past, device=device)
        self.chosen = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.weights = tuple(w.to(device) for w in head.weights())
        self.tables = steps.token_class, steps.transition
        self.op = choose_backend(None, self.backbone.device, self.backbone.dtype, self.weights[0]).decode_step
        self.state = StreamState.allocate(
            batch, self.backbone.hidden_size, head.width, buffer_rows=256, max_steps=16_384, dtype=self.backbone.dtype,
            device=device,
        )  # fmt: skip
        self.ids = self.table[:, :1]
        self.schedule: str | None = None
        # Always there: torch.compile does not notice hooks that come and go, but it does a schedule that changes.
        self.backbone.on_features(self.score)

    def step(self) -> None:
        """One decode step: ids from the table, the model, the next token's argmax."""
        self.ids = self.table.index_select(1, self.position - self.past)
        mask = (self.columns <= self.position)[None, None, None].expand(self.batch, 1, 1, -1)
        logits = self.model(
            self.ids, attention_mask={"full_attention": mask}, position_ids=self.position[None],
            past_key_values=self.cache, use_cache=True,
        ).logits  # fmt: skip
        self.chosen.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1

    def score(self, hidden: Tensor) -> None:
        """The op on the step's ids, if there is a schedule."""
        if self.schedule is not None:
            immediate = self.schedule == "immediate"
            self.op(self.ids, hidden, *self.tables, *self.weights, *self.state.tensors(), True, immediate)

    def seen(self) -> int:
        """Tokens that the op has consumed of each sequence."""
        return int(self.state.seq[0, layout.SEEN])

    def reset(self) -> None:
        self.position.fill_(self.past)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.past)


def random_ids(vocab: int, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Ids [B, T] of which one in ``STEP_EVERY`` is token 1, the step-token."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab, (batch, tokens), generator=g)
    return ids.masked_fill(torch.rand(batch, tokens, generator=g) < 1 / STEP_EVERY, 1).to(device)


def replayed(run: Callable[[], None], reset: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``run`` as a CUDA graph; itself on CPU."""
    reset()
    run()
    run()
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        reset()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rounds(decode: Decode, compiled: bool, until: float, device: torch.device) -> dict[str | None, float]:
    """Median seconds of a decode step, plain (None) and by schedule."""
    step = torch.compile(decode.step, fullgraph=True) if compiled else decode.step
    runs: dict[str | None, Callable[[], None]] = {}
    for decode.schedule in (None, *SCHEDULES[: 1 if compiled else 2]):  # compiling 28 layers takes half a minute
        runs[decode.schedule] = replayed(step, decode.reset, device)

    def once(schedule: str | None) -> float:
        decode.schedule = schedule
        decode.reset()
        seen = decode.seen()
        took = seconds_of(lambda: [runs[schedule]() for _ in range(ROUND)], device) / ROUND
        if decode.seen() - seen != ROUND * (schedule is not None):
            raise RuntimeError(f"{schedule}: {decode.seen() - seen} of {ROUND} steps reached the scorer")
        return took

    seconds: dict[str | None, list[float]] = {schedule: [] for schedule in runs}
    while len(seconds[None]) < 3 or (time.monotonic() < until and len(seconds[None]) < 30):
        for schedule in list(runs) if len(seconds[None]) % 2 else list(runs)[::-1]:
            seconds[schedule].append(once(schedule))
    return {schedule: median(values) for schedule, values in seconds.items()}


def op_seconds(decode: Decode, schedule: str, device: torch.device) -> float:
    """Seconds of the op alone, a step, over the same ids."""
    hidden = torch.randn(decode.batch, 1, decode.backbone.hidden_size, device=device).to(decode.backbone.dtype)

    decode.schedule = schedule

    def run() -> None:
        for j in range(ROUND):
            decode.ids = decode.table[:, j : j + 1]
            decode.score(hidden)

    again = replayed(run, lambda: None, device)
    return median(seconds_of(again, device) for _ in range(20)) / ROUND


def generated(
    model: PreTrainedModel, head: rf.SPRM, steps: rf.StepTokens, schedule: str, batch: int, until: float
) -> tuple[float, float]:
    """Median seconds a token of transformers' own loop, static cache, without and with a StreamScorer."""
    ids = random_ids(model.config.vocab_size, batch, 16, model.device)
    scorer = rf.StreamScorer(model, head, steps, schedule)  # type: ignore[arg-type]

    def run() -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=ROUND, max_new_tokens=ROUND,
            cache_implementation="static", disable_compile=True, pad_token_id=0,
        )  # fmt: skip

    run()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    while len(seconds[True]) < 2 or (time.monotonic() < until and len(seconds[True]) < 5):
        for scored in (False, True) if len(seconds[True]) % 2 else (True, False):
            if scored:
                with scorer:
                    seconds[True].append(seconds_of(lambda: scorer.result(run()), model.device))
            else:
                seconds[False].append(seconds_of(run, model.device))
    return median(seconds[False]) / ROUND, median(seconds[True]) / ROUND


def second_pass(model: PreTrainedModel, head: rf.SPRM, batch: int, tokens: int) -> tuple[float, float]:
    """Seconds and MiB (on a GPU; else 0) of the published way: text by text, every state and every logit."""
    texts = random_ids(model.config.vocab_size, batch, tokens, model.device)

    def run() -> None:
        for ids in texts.split(1):
            hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
            head(hidden[0, (ids[0] == 1).nonzero().flatten() - 1]).squeeze(-1).sigmoid()

    run()
    if model.device.type != "cuda":
        return seconds_of(run, model.device), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = seconds_of(run, model.device)
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=120, help="no further round is begun after these")
    parser.add_argument("--tokens", type=int, default=2048, help="of a text of the second pass")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on CPU where there is no GPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not args.quick:
        parser.error("there is no GPU; --quick runs a tiny model on CPU")
    end = time.monotonic() + args.seconds
    batch, past, tokens = (4, 16, 64) if args.quick else (32, 1024, args.tokens)
    config = Qwen2Config(
        **(SHAPE_QUICK if args.quick else SHAPE_1_5B), pad_token_id=0, bos_token_id=None, eos_token_id=None
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        head = rf.SPRM(config.hidden_size).to(torch.bfloat16).requires_grad_(False).eval()
    steps = rf.StepTokens(step_ids=[1]).resized(config.vocab_size).to(device)
    pass_seconds, pass_mib = second_pass(model, head, batch, tokens)
    decode = Decode(model, head, steps, batch, past)
    scorer = {schedule: op_seconds(decode, schedule, device) for schedule in SCHEDULES}
    scorer_mib = sum(t.nbytes for t in decode.state.tensors()) / 2**20

    rows: list[dict[str, Any]] = []

    def note(mode: str, schedule: str, plain: float, scored: float) -> None:
        rows.append(
            {
                "mode": mode, "schedule": schedule, "batch": batch, "tokens": tokens, "plain_ms": round(1e3 * plain, 4),
                "scored_ms": round(1e3 * scored, 4), "throughput_kept": round(plain / scored, 5),
                "scorer_us": round(1e6 * scorer[schedule], 3), "scorer_s": round(tokens * scorer[schedule], 6),
                "scorer_MiB": round(scorer_mib, 3), "second_pass_s": round(pass_seconds, 4),
                "second_pass_MiB": round(pass_mib, 1),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
        write("gpu_decode_overhead" if device.type == "cuda" else "rehearsed_decode_overhead", rows, args.out, device)

    for number, mode in enumerate(("captured", "compiled", "generate")):
        if time.monotonic() > end:
            break
        until = time.monotonic() + (end - time.monotonic()) / (3 - number)
        if mode == "generate":
            for schedule in SCHEDULES:
                note(mode, schedule, *generated(model, head, steps, schedule, batch, until))
        else:
            seconds = rounds(decode, mode == "compiled", until, device)
            decode.schedule = None
            for schedule in filter(None, seconds):
                note(mode, schedule, seconds[None], seconds[schedule])


if __name__ == "__main__":
    main()
