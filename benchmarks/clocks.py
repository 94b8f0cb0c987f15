"""How the suite measures: time on the device and on the host, and the machine's ceilings."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reflective.benchmarks.cases import Subject

GRAPH_CALLS = 24  # at the least, so that what a replay costs by itself is shared out
IDLE_CYCLES = 200_000  # the GPU waits this long while the host queues a replay and its events
WARM_UP = 2


@dataclass(frozen=True)
class Quantiles:
    """Microseconds a call: the 20, 50 and 80 % quantiles of ``n`` samples."""

    q20: float
    q50: float
    q80: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Quantiles":
        values = torch.tensor(seconds, dtype=torch.float64) * 1e6
        return cls(*values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist(), len(seconds))


def host(subjects: dict[str, Subject], seconds: float, device: torch.device) -> dict[str, Quantiles]:
    """Wall time a call, from the call to its end on the device, calls queued back to back.

    The implementations take turns, sample by sample, so that a ratio sees one state of the machine; each gets ``seconds``.
    """
    # A sample is long enough for the clock, and on a GPU for the wait at its end, to weigh nothing.
    synchronize, length = synchronizer(device), 1e-3 if device.type == "cuda" else 5e-5
    calls: dict[str, int] = {}
    for name, subject in subjects.items():
        for _ in range(WARM_UP):
            took = _sample(subject, 1, synchronize)
        calls[name] = max(1, min(subject.calls or 50, int(length / max(took, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    spent = dict.fromkeys(subjects, 0.0)
    while waiting := [n for n in subjects if len(samples[n]) < 5 or (spent[n] < seconds and len(samples[n]) < 2000)]:
        for name in waiting:
            took = _sample(subjects[name], calls[name], synchronize)
            samples[name].append(took)
            spent[name] += took * calls[name]
    return {name: Quantiles.of(values) for name, values in samples.items()}


def _sample(subject: Subject, calls: int, synchronize: Callable[[], None]) -> float:
    subject.reset()
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        subject.call()
    synchronize()
    return (time.perf_counter() - began) / calls


class Graph:
    """Calls of ``subjects``, in turn, ``rounds`` times over, captured as one CUDA graph."""

    def __init__(self, subjects: Sequence[Subject], rounds: int) -> None:
        self.subjects, self.calls = subjects, rounds * len(subjects)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for subject in subjects:  # compiles, and lets the allocator and cuBLAS settle
                subject.reset()
                subject.call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(rounds):
                for subject in subjects:
                    subject.call()

    def reset(self) -> None:
        for subject in self.subjects:
            subject.reset()

    def time(self, seconds: float) -> Quantiles:
        """Device time a call, from replays for ``seconds``."""
        samples = [self._replay() for _ in range(WARM_UP + 3)][WARM_UP:]
        more = int(seconds / max(1e-6, statistics.median(samples) * self.calls))
        samples += [self._replay() for _ in range(min(more, 200))]
        return Quantiles.of(samples)

    def _replay(self) -> float:
        self.reset()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(IDLE_CYCLES)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / self.calls

    def replay_to_end(self, n: int) -> Quantiles:
        """Host time from asking for a replay to its end."""
        samples = []
        for _ in range(n):
            self.reset()
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.graph.replay()
            torch.cuda.synchronize()
            samples.append(time.perf_counter() - began)
        return Quantiles.of(samples)


def rounds(subject: Subject, subjects: int, at_least: int = GRAPH_CALLS) -> int:
    """How many times ``subjects`` like this one go into a graph."""
    wanted = -(-at_least // subjects)
    return max(1, min(wanted, subject.calls or wanted))


def synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def copy_rate(device: torch.device, size: int) -> float:
    """GB/s, read and written, of a copy of ``size`` bytes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device) / 1e9


def matmul_rate(device: torch.device, n: int, dtype: torch.dtype) -> float:
    """TFLOP/s of an ``n`` x ``n`` x ``n`` product of random numbers."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: torch.mm(a, b), device) / 1e12


def _best(call: Callable[[], Tensor | Any], device: torch.device, samples: int = 7) -> float:
    """Seconds of the median call."""
    subject, synchronize = Subject(call), synchronizer(device)
    return statistics.median([_sample(subject, 1, synchronize) for _ in range(WARM_UP + samples)][WARM_UP:])
