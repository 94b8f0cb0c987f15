"""What the scorer adds to decoding a 1.5B-shaped model, batch 32, static cache, every step one CUDA graph; random weights.

    python benchmarks/decode_overhead_gpu.py [--out benchmarks/results] [--seconds 120] [--quick]

``compiled``: transformers' compile configuration (``mode="reduce-overhead"``) with ``fullgraph=True``; a plain and a scored forward
take turns (``decode_modes.py``), a ``StreamScorer``'s op is in the graph of one of them. ``generate``: whole ``generate`` calls with
transformers' own compilation. Beside them stand the op's own time, by graph replay, and the published pipeline's second pass
over 32 texts of ``--tokens``, one at a time. One token in 25 ends a step.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, Qwen2Config

import reflective as rf
from reflective.benchmarks.decode_modes import (
    SAMPLED,
    SCHEDULES,
    STATIC,
    Lockstep,
    Player,
    Subject,
    Tape,
    fixed_length,
    row,
    turns,
    wait,
)
from reflective.benchmarks.record import RESULTS, write
from reflective.published import second_pass
from reflective.scorer import Schedule
from reflective.transformers_internals import compiled_everywhere

ROUND = 64  # tokens of a generation
SHAPE_1_5B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip
SHAPE_QUICK = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip


def replayed(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``run`` as a CUDA graph; itself on CPU."""
    run()
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
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


def op_alone(subject: Subject, schedule: Schedule) -> tuple[float, float]:
    """Seconds of a decode step's op alone, and MiB of the scorer's state."""
    batch, device = len(subject.prompts), subject.prompts.device
    scorer = rf.StreamScorer(subject.net, subject.head, subject.steps, schedule, subject.at, scope="text")
    ids = torch.randint(2, scorer.backbone.vocab_size, (batch, ROUND), device=device)
    hidden = torch.randn(batch, 1, scorer.backbone.hidden_size, device=device).to(scorer.backbone.dtype)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    with scorer:
        scorer.begin(subject.prompts)
        again = replayed(lambda: [scorer.feed(column, hidden, rows) for column in ids.split(1, 1)], device)
        seconds = median(seconds_of(again, device) for _ in range(20)) / ROUND
    return seconds, sum(t.nbytes for t in scorer._state.tensors()) / 2**20


def published(subject: Subject, tokens: int) -> tuple[float, float]:
    """Seconds and MiB (on a GPU; else 0) of the second pass: text by text, every state and every logit."""
    device, batch = subject.prompts.device, len(subject.prompts)
    texts = torch.randint(2, subject.net.config.vocab_size, (batch, tokens), device=device)
    config = SimpleNamespace(at=subject.at)
    model = SimpleNamespace(model=subject.net, head=subject.head, steps=subject.steps, config=config)

    def run() -> None:
        for text in texts.split(1):
            second_pass(model, text, None)

    run()
    if device.type != "cuda":
        return seconds_of(run, device), 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = seconds_of(run, device)
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
    shape = SHAPE_QUICK if args.quick else SHAPE_1_5B
    config = Qwen2Config(**shape, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    subject = Subject.random(config, batch, past, device, torch.bfloat16, rtol=0.05)
    pass_seconds, pass_mib = published(subject, tokens)
    alone = {schedule: op_alone(subject, schedule) for schedule in SCHEDULES}
    tape = Tape.of(subject, subject.prompts, ROUND, **STATIC)
    compiled = compiled_everywhere(CompileConfig(fullgraph=True))
    rows: list[dict[str, Any]] = []

    def note(mode: str, plain: Player, scored: Player) -> None:
        seconds, mib = alone[scored.schedule]
        scored.scorer_us = 1e6 * seconds
        extra = {
            "scorer_s": round(tokens * seconds, 6), "scorer_MiB": round(mib, 3), "second_pass_s": round(pass_seconds, 4),
            "second_pass_MiB": round(pass_mib, 1),
        }  # fmt: skip
        line = row(mode, plain, scored, batch, tokens) | extra
        print(line, flush=True)
        if scored.wrong:
            raise RuntimeError(f"{mode}, {scored.schedule}: {scored.wrong}")
        rows.append(line)
        write("gpu_decode_overhead" if device.type == "cuda" else "rehearsed_decode_overhead", rows, args.out, device)

    def generate(net: PreTrainedModel) -> tuple[Tensor, Tensor]:
        static = SAMPLED | {"cache_implementation": "static", "compile_config": compiled}
        torch.manual_seed(0)
        out = net.generate(subject.prompts, **fixed_length(subject.prompts, ROUND), **static)
        return out, out

    left = 2 * len(SCHEDULES)
    for schedule in SCHEDULES:
        if rows and time.monotonic() > end:
            break
        players = plain, scored = Player(subject, None), Player(subject, schedule)
        for mode in ("compiled", "generate"):
            now = time.monotonic()
            until, left = now + (end - now) / left, left - 1
            if mode == "compiled":
                Lockstep(tape, players, compiled.to_dict()).run(until)
            else:
                turns(players, generate, ROUND, until)
            note(mode, plain, scored)
            for p in players:
                p.seconds.clear()


if __name__ == "__main__":
    main()
