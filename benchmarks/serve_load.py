"""What clients that hang up cost the others: 200 of the server's, a fifth of which send the longest text that it takes and leave.

    python benchmarks/serve_load.py [--clients 200] [--requests 2] [--rounds 2] [--model default] [--out benchmarks/results]

A server process of its own on loopback. Ordinary clients ask, one request after the other, for a short completion, and try again where they
are told to (503); the others post the text to ``/score``, hang up after at most 3 seconds, and begin anew until the ordinary ones are
through. Rounds without and with them alternate, as the machine may have other work. An ordinary request without its answer is lost.
"""

import argparse
import asyncio
import contextlib
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from reflective.benchmarks.record import RESULTS, write

PATIENCE = 3.0  # seconds, at most, after which a client hangs up


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


async def load(
    url: str, ordinary: int, leaving: int, *, requests: int, text: str, tokens: int = 8, patience: float = PATIENCE
) -> dict[str, Any]:
    """Seconds of every ordinary request (``p50``, ``p99``), how many were ``lost`` or told to come back (``again``), and how many
    long texts were ``left`` behind.

    Raises:
        RuntimeError: the long text is refused, so nothing is measured; or what was left behind goes on.
    """
    seconds: list[float] = []
    counts = {"lost": 0, "again": 0, "left": 0}
    through = asyncio.Event()
    limits = httpx.Limits(max_connections=None)

    async def ask(http: httpx.AsyncClient, client: int) -> None:
        for i in range(requests):
            began, body = time.perf_counter(), {"prompt": f"{client} + {i} =", "max_tokens": tokens, "seed": client}
            try:
                while (answer := await http.post("/v1/completions", json=body)).status_code == 503:
                    counts["again"] += 1
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                whole = answer.status_code == 200 and len(answer.json()["choices"]) == 1
            except httpx.HTTPError:
                whole = False
            counts["lost"] += not whole
            seconds.append(time.perf_counter() - began)

    async def leave(http: httpx.AsyncClient, client: int) -> None:
        chance = random.Random(client)
        while not through.is_set():
            try:
                answer = await http.post(
                    "/score", json={"text": text}, timeout=httpx.Timeout(None, read=patience * chance.uniform(0.1, 1))
                )
            except httpx.ReadTimeout:
                counts["left"] += 1
                continue
            if answer.status_code == 503:
                await asyncio.sleep(patience * chance.uniform(0.1, 1))
            elif "error" in answer.json():
                through.set()
                raise RuntimeError(f"the long text is refused: {answer.text}")

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        others = [asyncio.create_task(leave(http, i)) for i in range(leaving)]
        if others:
            await asyncio.sleep(min(1.0, patience))  # so that they are there first
        began = time.perf_counter()
        await asyncio.gather(*(ask(http, i) for i in range(ordinary)))
        whole = time.perf_counter() - began
        through.set()
        await asyncio.gather(*others)
        for _ in range(300):
            metrics = (await http.get("/metrics")).text
            idle = re.search(r"running_requests 0\.0", metrics) and re.search(r"queued_requests 0\.0", metrics)
            if idle:
                break
            await asyncio.sleep(0.1)
        else:
            raise RuntimeError("requests whose clients are gone still run after 30 s")
    return {"p50": quantile(seconds, 0.5), "p99": quantile(seconds, 0.99), "seconds": whole, **counts}


@contextlib.contextmanager
def served(model: str, queue: int) -> Iterator[str]:
    """The address of a server of ``model``, in a process of its own."""
    command = [sys.executable, "-m", "reflective", "serve", "--model", model, "--port", "0", "--max-queue", str(queue)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            found = next(
                (m for line in server.stderr if (m := re.search(r"running on (http://127\.0\.0\.1:\d+)", line))), None
            )
            if found is None:
                raise RuntimeError(f"the server ended with {server.wait()}")
            threading.Thread(target=server.stderr.read, daemon=True).start()  # its log must not fill the pipe
            yield found[1]
        finally:
            server.kill()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2, help="of each ordinary client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default="default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    leaving = args.clients // 5
    rows = []
    with served(args.model, 2 * args.clients) as url:
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        text = "word " * (model["max_model_len"] - 16) + "so.\n\nx.\n\n"
        settings = {"requests": args.requests, "text": text}
        asyncio.run(load(url, 8, 0, **settings))  # what is only done once is done
        for number in range(args.rounds):
            for others in (0, leaving):
                found = asyncio.run(load(url, args.clients - leaving, others, **settings))
                rows.append({
                    "round": number, "clients": args.clients - leaving, "leaving": others, "requests": args.requests,
                    "positions": model["max_model_len"],
                    **{k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()},
                })  # fmt: skip
                print(rows[-1], flush=True)
    write("serve_load", rows, args.out)
    without, among = (max(r["p99"] for r in rows if bool(r["leaving"]) == there) for there in (False, True))
    lost = sum(row["lost"] for row in rows)
    print(
        f"99th percentile {without:.1f} s without, {among:.1f} s among those who leave ({among / without:.2f}x); {lost} lost"
    )


if __name__ == "__main__":
    main()
