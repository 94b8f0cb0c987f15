"""What scoring costs on a GPU: models of random weights, shaped as 1.5B and 7B ones, in bfloat16.

    python benchmarks/decode_overhead_gpu.py PART [--seconds 90] [--out benchmarks/results] [--quick]

``decode`` (``gpu_decode_overhead.csv``): a decode step is one CUDA graph, captured by hand over a static cache, once without a
scorer and once with the op of each schedule in it. Each replay takes the next column of a fixed tape of ids, on the device;
sampling, which would make the scorer's share smaller, is left out. Whole rounds take turns: a new prompt, not timed, then all
tokens and the scorer's ``result``, timed to their end on the device. So flushes are in it as often as decoding has them.
``throughput_kept`` is the ratio of the sums; ``added_us`` a token, ``result_ms`` a round. One token in 25 ends a step. The cache has no more
room than the round needs, which is the fastest that the plain step can be. No figure without scores equal to ``rf.score``'s.

``best_of_n`` (``gpu_best_of_n.csv``): all ops and the result of 32 texts, against the published pipeline's second pass over them, text by
text; seconds, and how far ``max_memory_allocated`` rose.

``generate`` (``gpu_generate.csv``): 32 candidates by ``ReflectiveModel.generate``, each way that it decodes, by transformers' ``generate``,
eager, and by its compiled one with a static cache, sampling alike. Ours besides with ``prune``, which looks at every step and
lets nobody go. Compiling comes last: what was written before stays if time ends it. ``layers`` says of how many of the shape's layers
the model was made.

The last column but the environment's, ``check``, says what is wrong with a row; exit code 1 if anything is.
"""

import argparse
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import CompileConfig, PreTrainedTokenizerFast, Qwen2Config, StaticCache

import reflective as rf
from reflective.benchmarks.decode_modes import SCHEDULES, STEP_EVERY, Player, Subject, another, fixed_length, wait
from reflective.benchmarks.record import RESULTS, write
from reflective.engines.hf.internals import compiled_everywhere, with_cache
from reflective.engines.hf.scorer import Schedule
from reflective.published import second_pass
from reflective.search.strategies import by_name

CHUNK = 64  # tokens whose ops are one graph where they are timed by themselves
PAST = 16  # tokens of a prompt
SHAPES: dict[str, dict[str, int]] = {
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "quick": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
TOKENS = {"1.5B": 512, "7B": 256, "quick": 24}  # of a round: half a second to two
BATCHES = {"1.5B": (1, 8, 64), "7B": (1, 8, 64), "quick": (1, 4)}
Row = dict[str, Any]


def made(shape: str, batch: int, device: torch.device, **changes: int) -> Subject:
    """A model of ``shape``, a head whose logits vary by 0.5 from step to step, and ``batch`` prompts.

    As they are initialised, all scores of a random model lie within one or two per cent: equal to those of any other rows.
    """
    config = Qwen2Config(
        **SHAPES[shape] | changes, max_position_embeddings=32768, pad_token_id=0, bos_token_id=None, eos_token_id=None
    )
    subject = Subject.random(config, batch, PAST, device, torch.bfloat16, rtol=0.1)
    text = torch.randint(2, config.vocab_size, (1, 1024), device=device)
    scores = rf.score(subject.net, subject.head, subject.steps, text, at=subject.at, prompt_lengths=0)
    subject.head[3].weight.mul_(0.5 / float(scores.step_scores[0].logit().std()))
    return subject


def replayed(run: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """``run`` as a CUDA graph; itself on CPU. It runs twice for that."""
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


@contextlib.contextmanager
def memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Tells by how many MiB the memory allocated on a GPU rose at its highest since; on CPU 0."""
    if device.type != "cuda":
        yield lambda: 0.0
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: (torch.cuda.max_memory_allocated() - before) / 2**20


class Captured:
    """A player's decode step over the tape ``ids`` [B, T + 1], of which the last column is never fed, as of a generation."""

    def __init__(self, player: Player, ids: Tensor) -> None:
        self.player, self.prompts, self.device = player, player.subject.prompts, ids.device
        self.texts = torch.cat([self.prompts, ids], 1)
        self.columns = ids.t()[:, :, None].contiguous()  # [T + 1, B, 1]
        self.count = torch.zeros(1, dtype=torch.int64, device=ids.device)  # columns fed
        self.places = torch.arange(self.texts.shape[1] - 1, device=ids.device)
        self.cache = StaticCache(config=player.net.config, max_cache_len=len(self.places))
        self.seconds: list[float] = []
        self.result_seconds = 0.0
        self.prefill()
        self.step = replayed(self.forward, self.device)
        if scorer := player.scorer:  # the first result of a process takes 10 ms more than those after it
            self.prefill()
            self.step()
            scorer.unheard = True
            scorer.result(self.texts[:, : self.prompts.shape[1] + 2])

    def prefill(self) -> None:
        self.cache.reset()
        self.count.zero_()
        self.player.net(self.prompts, logits_to_keep=1, **with_cache(self.player.net, self.cache))

    def forward(self) -> None:
        """Everything that depends on the column is computed from ``count``, so that a replay needs nothing of the host."""
        ids, place = self.columns.index_select(0, self.count)[0], self.count + self.prompts.shape[1]
        mask = (self.places <= place).expand(len(ids), 1, 1, -1)
        positions = place.expand(len(ids), 1)
        self.player.net(ids, attention_mask=mask, position_ids=positions, **with_cache(self.player.net, self.cache))
        self.count += 1

    def round(self) -> None:
        self.prefill()
        wait(self.device)
        began = time.perf_counter()
        for _ in range(len(self.columns) - 1):
            self.step()
        wait(self.device)
        decoded = time.perf_counter()
        if scorer := self.player.scorer:
            scorer.unheard = True  # replays tell the host nothing: it must ask the device how far they came
            scores = scorer.result(self.texts)
            wait(self.device)
        ended = time.perf_counter()
        self.seconds.append(ended - began)
        self.result_seconds += ended - decoded
        if scorer:
            self.player.wrong = self.player.wrong or self.player.subject.wrong(scores, self.texts)


def decode(subject: Subject, tokens: int, until: float) -> list[Row]:
    """A row a schedule."""
    batch, device = len(subject.prompts), subject.prompts.device
    ids = torch.randint(2, subject.net.config.vocab_size, (batch, tokens + 1), device=device)
    ids[:, tokens // 2] = 1  # a step-token in every text, however short
    with contextlib.ExitStack() as stack:
        players = []
        for schedule in (None, *SCHEDULES):
            player = Player(subject, schedule)
            stack.enter_context(player.attached)
            players.append(Captured(player, ids))
        order, rounds, began = random.Random(0), 0, time.monotonic()
        while rounds < 2 or another(rounds, began, until):
            for captured in order.sample(players, len(players)):
                captured.round()
            rounds += 1
    plain, *scored = players
    return [_decode_row(plain, captured, tokens) for captured in scored]


def _decode_row(plain: Captured, scored: Captured, tokens: int) -> Row:
    pairs = torch.tensor([plain.seconds, scored.seconds], dtype=torch.float64)
    (before, after), kept, n = pairs.sum(1).tolist(), pairs[0] / pairs[1], pairs.shape[1]
    figures = {
        "plain_ms": round(1e3 * before / n / tokens, 5),
        "scored_ms": round(1e3 * after / n / tokens, 5),
        "throughput_kept": round(before / after, 5),
        "kept_least": round(float(kept.min()), 5),
        "kept_most": round(float(kept.max()), 5),
        "added_us": round(1e6 * (after - before) / n / tokens, 2),
        "result_ms": round(1e3 * scored.result_seconds / n, 3),
    }
    wrong = scored.player.wrong
    where = {
        "mode": "captured", "schedule": scored.player.schedule, "by": scored.player.scorer.backend.name,
        "batch": len(scored.prompts), "tokens": tokens, "rounds": n,
    }  # fmt: skip
    return where | (dict.fromkeys(figures, "") if wrong else figures) | {"check": wrong or "scores equal"}


def scoring(subject: Subject, schedule: Schedule, tokens: int) -> tuple[float, float]:
    """Seconds of all that scoring ``tokens`` of each text takes beside the model, and MiB at its highest."""
    prompts, (batch, past), device = subject.prompts, subject.prompts.shape, subject.prompts.device
    ids = torch.randint(2, subject.net.config.vocab_size, (batch, CHUNK), device=device)
    texts = torch.cat([prompts, ids.repeat(1, tokens // CHUNK), ids[:, :1]], 1)
    rows = torch.arange(batch, dtype=torch.int32, device=device)
    hidden = torch.randn(batch, 1, subject.head.hidden_size, device=device).to(subject.head.dtype)
    with memory(device) as peak:
        scorer = rf.StreamScorer(
            subject.net, subject.head, subject.steps, schedule, subject.at, max_steps=tokens
        )  # as ReflectiveModel.generate makes it
        with scorer:
            scorer.begin(prompts)
            again = replayed(lambda: [scorer.feed(column, hidden, rows) for column in ids.split(1, 1)], device)
            # The first result of a process takes 10 ms more than those after it: a chunk by itself warms up.
            for chunks in (1, tokens // CHUNK):
                scorer.begin(prompts)
                scorer.feed(prompts, scorer.no_hidden(batch, past), rows)
                wait(device)
                began = time.perf_counter()
                for _ in range(chunks):
                    again()
                scorer.unheard = True  # what was fed by hand, the host was not told
                scores = scorer.result(texts[:, : past + chunks * CHUNK + 1])
                wait(device)
                seconds = time.perf_counter() - began
    if not int(scores.n_steps.sum()):
        raise RuntimeError("no step was scored")
    mib = peak() or sum(t.nbytes for t in scorer.stream.state.tensors()) / 2**20
    return seconds, mib


def published(subject: Subject, tokens: int) -> tuple[float, float]:
    """Seconds and MiB (on a GPU; else 0) of the second pass: text by text, every state and every logit."""
    device, batch = subject.prompts.device, len(subject.prompts)
    texts = torch.randint(2, subject.net.config.vocab_size, (batch, tokens), device=device).split(1)
    config = SimpleNamespace(at=subject.at)
    model = SimpleNamespace(model=subject.net, head=subject.head, steps=subject.steps, config=config)
    for _ in range(2):
        second_pass(model, texts[0], None)
    with memory(device) as peak:
        wait(device)
        began = time.perf_counter()
        for text in texts:
            second_pass(model, text, None)
        wait(device)
        return time.perf_counter() - began, peak()


def best_of_n(subject: Subject, tokens: int) -> list[Row]:
    """A row a schedule."""
    seconds, mib = published(subject, tokens)
    rows = []
    for schedule in SCHEDULES:
        mine, my_mib = scoring(subject, schedule, tokens)
        rows.append({
            "schedule": schedule, "n": len(subject.prompts), "tokens": tokens, "scoring_s": round(mine, 6),
            "scoring_MiB": round(my_mib, 3), "second_pass_s": round(seconds, 5), "second_pass_MiB": round(mib, 1),
            "times_less": round(seconds / mine, 1), "check": "",
        })  # fmt: skip
    return rows


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each id; one in ``STEP_EVERY`` ends a step."""
    words = {f"w{i}.\n\n" if i % STEP_EVERY == 1 else f"w{i}": i for i in range(vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0")


def generate(subject: Subject, n: int, tokens: int, device: torch.device) -> Iterator[Row]:
    """A row a way, as soon as it is measured."""
    net, config = subject.net, rf.model.Config(rule="contains", stop=None, answer=None)
    model = rf.ReflectiveModel(net, word_tokenizer(net.config.vocab_size), subject.head, config)
    prompt = subject.prompts[:1]
    question = " ".join(f"w{i}" for i in prompt[0].tolist() if i % STEP_EVERY != 1)
    prompt = model.encode(question)
    sampling = {"temperature": 0.6, "top_p": 0.95}
    compiled = compiled_everywhere(CompileConfig() if device.type == "cuda" else CompileConfig(backend="eager", mode=None))

    def ours(length: int, decoding: str = "auto", strategy: Any = None) -> int:
        found = model.generate(
            question, n=n, max_new_tokens=length, seed=0, decoding=decoding, strategy=strategy, **sampling
        )
        if not all(c.score > 0 for c in found.candidates) and length >= tokens >= 4 * STEP_EVERY:
            raise RuntimeError("a candidate has no score")
        return found.tokens

    def theirs(length: int, **more: Any) -> int:
        given = fixed_length(prompt, length) | {"do_sample": True, "top_k": 0, "num_return_sequences": n} | sampling
        return net.generate(prompt, **given, **more)[:, prompt.shape[1] :].numel()

    prune = lambda: by_name("prune", n=n, threshold=1e6)  # nobody lags so far as to leave
    ways: dict[str, Callable[[int], int]] = {
        "reflective": ours,
        "reflective, prune": lambda length: ours(length, strategy=prune()),
        "reflective, batch": lambda length: ours(length, "batch"),
        "eager": theirs,
        "compiled": lambda length: theirs(length, cache_implementation="static", compile_config=compiled),
    }
    if device.type == "cuda":
        ways |= {
            "reflective, compiled": lambda length: ours(length, "compiled"),
            "reflective, compiled, prune": lambda length: ours(length, "compiled", prune()),
        }
    for way, run in ways.items():
        began = time.perf_counter()
        # A static cache is as long as the text, and forwards are compiled for it.
        run(min(tokens, 8) if way in ("eager", "reflective, batch") else tokens)
        wait(device)
        warmed = time.perf_counter()
        done = run(tokens)
        wait(device)
        seconds = time.perf_counter() - warmed
        yield {
            "way": way, "n": n, "tokens": tokens, "layers": net.config.num_hidden_layers, "seconds": round(seconds, 4),
            "tokens_per_s": round(done / seconds, 1), "warm_up_s": round(warmed - began, 2),
            "check": "" if done == n * tokens or "prune" in way else f"{done} tokens instead of {n * tokens}",
        }  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("decode", "best_of_n", "generate"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=90, help="nothing further is begun after these")
    parser.add_argument("--model", choices=SHAPES, action="append", help="one or several; by default both")
    parser.add_argument("--batch", type=int, action="append", help="sequences that decode, one or several; by default all")
    parser.add_argument("--tokens", type=int, help="of a round, a text or a candidate")
    parser.add_argument("--layers", type=int, help="of the model that generates; by default all of its shape")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on CPU where there is no GPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not args.quick:
        parser.error("there is no GPU; --quick runs a tiny model on CPU")
    end = time.monotonic() + args.seconds
    name = {"decode": "gpu_decode_overhead", "best_of_n": "gpu_best_of_n", "generate": "gpu_generate"}[args.part]
    rows: list[Row] = []

    def note(shape: str, *found: Row) -> None:
        for row in found:
            rows.append({"model": shape} | row)
            print(rows[-1], flush=True)
        write(name if device.type == "cuda" else f"rehearsed_{name}", rows, args.out, device)

    shapes = ["quick"] if args.quick else args.model or (["1.5B"] if args.part == "generate" else ["1.5B", "7B"])
    batches = {shape: args.batch or BATCHES[shape] for shape in shapes}
    cells = sum(map(len, batches.values()))
    for shape in shapes:
        if rows and time.monotonic() > end:
            break
        changes = {"num_hidden_layers": args.layers} if args.layers else {}
        n = {"decode": max(batches[shape]), "best_of_n": 4 if args.quick else 32, "generate": 1}[args.part]
        subject = made(shape, n, device, **changes)
        if args.part == "best_of_n":
            note(shape, *best_of_n(subject, args.tokens or (128 if args.quick else 2048)))
        elif args.part == "generate":
            for row in generate(subject, 4 if args.quick else 32, args.tokens or (24 if args.quick else 64), device):
                note(shape, row)
        else:
            prompts = subject.prompts
            for batch in batches[shape]:
                now = time.monotonic()
                if rows and now > end:
                    break
                subject.prompts = prompts[:batch]
                note(shape, *decode(subject, args.tokens or TOKENS[shape], now + (end - now) / cells))
                cells -= 1
        del subject
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any(row["check"] not in ("", "scores equal") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
