"""Whether anything is left of the requests that vLLM's own server was asked, with scores in its answers: 10,000 short ones.

    python benchmarks/vllm_soak.py [--requests 10000] [--clients 32] [--out benchmarks/results]

Stock vLLM and the endpoint plugin in a process of their own, a small random model. A third of the requests are streamed, some have several
choices or prompts, and every tenth client hangs up. After every tenth part all is quiet for a moment, and the worker says how many rows of the
scorer's state are in use (``rows``) and how many results wait for somebody who asks (``kept``): both must be 0. Needs vLLM, and this package
installed with its entry points.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import reflective as rf
import reflective.vllm
from reflective.benchmarks.record import RESULTS, write

PARTS = 10


def model(folder: Path) -> None:
    """A random one, and a head beside its weights."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=288, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        initializer_range=0.15, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    rf.SPRM(128).requires_grad_(False).eval().save_pretrained(folder)


@contextlib.contextmanager
def served(folder: Path, seats: int) -> Iterator[str]:
    """The address of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = {
        **reflective.vllm.settings(folder, delimiter="e"), "served_model_name": "soak", "host": "127.0.0.1", "port": port,
        "dtype": "float32", "max_model_len": 256, "max_num_seqs": seats, "block_size": 32,
    }  # fmt: skip
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    for name, value in said.items():
        words += ["--" + name.replace("_", "-"), json.dumps(value) if isinstance(value, dict) else str(value)]
    # The route that asks the worker is one of the developers' mode.
    usual = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    env = usual | os.environ | {"VLLM_PLUGINS": "reflective", "VLLM_SERVER_DEV_MODE": "1"}
    with subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            while not _healthy(url):
                if server.poll() is not None:
                    raise RuntimeError(f"the server ended with {server.returncode}")
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def resident_mib() -> dict[str, float]:
    """Of the server's process and of all those below it."""
    parents, sizes, names = {}, {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (place / "stat").read_text().rpartition(")")
            pid = int(place.name)
            parents[pid], names[pid] = int(rest.split()[1]), name.partition("(")[2]
            sizes[pid] = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    mine.discard(os.getpid())
    (server,) = (pid for pid in mine if parents[pid] == os.getpid())
    return {"server_MiB": sizes[server], "below_MiB": sum(sizes[pid] for pid in mine if pid != server)}


async def ask(http: httpx.AsyncClient, i: int, counts: dict[str, int]) -> None:
    """One request; what came of it is counted."""
    chance = random.Random(i)
    prompts, n = 1 + (i % 7 == 0), 1 + (i % 5 == 0)
    body = {
        "model": "soak", "prompt": [[1 + i % 200, 7, 8, p] for p in range(prompts)], "max_tokens": 1 + i % 3, "n": n,
        "stream": i % 3 == 0, "seed": i,
    }  # fmt: skip
    leaves = i % 10 == 9
    try:
        answer = await http.post(
            "/v1/completions", json=body | ({"max_tokens": 200} if leaves else {}),
            timeout=chance.uniform(0.001, 0.3) if leaves else 600,
        )  # fmt: skip
    except httpx.TimeoutException:
        counts["left"] += 1
        return
    counts["answered"] += 1
    counts["scored"] += answer.text.count('"error":null}')
    counts["choices"] += prompts * n


async def asked(url: str, requests: range, clients: int) -> dict[str, Any]:
    """One part, and what is left when all is quiet."""
    counts, places = {"answered": 0, "left": 0, "choices": 0, "scored": 0}, asyncio.Semaphore(clients)

    async def placed(http: httpx.AsyncClient, i: int) -> None:
        async with places:
            await ask(http, i, counts)

    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=None)) as http:
        began = time.perf_counter()
        await asyncio.gather(*(placed(http, i) for i in requests))
        counts["seconds"] = round(time.perf_counter() - began, 1)
        for _ in range(100):
            answer = await http.post("/collective_rpc", json={"method": "reflective_stats"}, timeout=60)
            (found,) = answer.json()["results"]
            if not found["rows"] + found["kept"]:
                break
            await asyncio.sleep(0.1)
    return {**counts, **{name: found[name] for name in ("rows", "kept", "free")}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=32, help="at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    version = next(d.version for d in importlib.metadata.distributions() if d.name in ("vllm", "vllm-cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model(Path(folder))
        with served(Path(folder), args.clients) as url:
            for part in range(PARTS):
                of_part = range(part * args.requests // PARTS, (part + 1) * args.requests // PARTS)
                found = asyncio.run(asked(url, of_part, args.clients))
                mib = {name: round(size, 1) for name, size in resident_mib().items()}
                rows.append({"requests": of_part.stop, "clients": args.clients, **found, **mib, "vllm": version})
                print(rows[-1], flush=True)
    write("vllm_soak", rows, args.out)
    if wrong := [r for r in rows if r["rows"] or r["kept"] or r["scored"] != r["choices"]]:
        raise SystemExit(f"rows are left, or choices without scores: {wrong}")


if __name__ == "__main__":
    main()
