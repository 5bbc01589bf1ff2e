"""How long a call takes. Several are timed in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from attnrt.errors import ArgumentError

Timed = Callable[[], Any]
SAMPLE = 1e-3
"""Seconds a sample on a CPU should take: below it the clock and the loop would show."""
MOST = 200
"""Calls a sample at most, and samples at most."""
LEAST = 3
LONGEST = 3.0
"""Times the seconds that were asked for, at most, where the two fastest are not told apart by then."""
GIVE_UP = 3.0
"""A call this many times as slow as the fastest is not sampled any further."""
HOPELESS = 100.0
"""A call whose first run was this many times as slow as the fastest's is not sampled at all."""
FLUSH = 256 << 20
"""Bytes read before each call on a GPU: beyond every L2 cache there is. Read, as what waits to be written back would
count as the call's."""
FLUSHES = 16
"""Such reads before a call, at most."""


class Timing(NamedTuple):
    """Seconds a call: the median, the quartiles around it, and how many samples they come from."""

    median: float
    low: float
    high: float
    samples: int
    host: float | None = None
    """Seconds until the call returns to Python, where that is not the whole of it: on a GPU."""

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


class Clock(Protocol):
    """How calls are timed on one kind of device."""

    def once(self, call: Timed) -> float:
        """Seconds of one call from start to end, all of its work included."""

    def sample(self, call: Timed, seconds: float) -> list[float]:
        """Some timings, in seconds a call; `seconds` is about what one call takes."""

    def host(self, call: Timed, seconds: float) -> float | None:
        """Seconds until a call returns to Python; None where that is the same."""


class HostClock:
    """For devices whose calls return when they are done: the CPU.

    While this thread is ready to run and another has its processor, the clock stands still (Linux counts that), so that
    a machine which does other work too gives the same figures, if only more slowly. With several threads the calling
    one may still wait for a sibling that waits.
    """

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def now(self) -> float:
        """Seconds, without those spent waiting for a processor."""
        if self._file < 0:
            return time.perf_counter()
        waited = os.pread(self._file, 100, 0).split()
        return time.perf_counter() - int(waited[1]) * 1e-9

    def once(self, call: Timed) -> float:
        start = self.now()
        call()
        return max(self.now() - start, 1e-9)

    def sample(self, call: Timed, seconds: float) -> list[float]:
        count = max(1, min(MOST, round(SAMPLE / max(seconds, 1e-9))))
        start = self.now()
        for _ in range(count):
            call()
        return [max(self.now() - start, 1e-9) / count]

    def host(self, call: Timed, seconds: float) -> float | None:
        return None


class CudaClock:
    """CUDA events around each call, on a device that has work to do until the host has queued it, and a cold L2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._other = torch.ones(FLUSH // 4, dtype=torch.float32, device=device)
        self._total = torch.empty((), dtype=torch.float32, device=device)
        self._queueing: dict[int, float] = {}
        """Seconds that the host took to queue a call when it was last sampled, by the call's id."""
        self._flush()
        self._flush_seconds = max(1e-6, min(self.once(self._flush) for _ in range(3)))

    def _flush(self) -> None:
        torch.sum(self._other, dim=0, out=self._total)

    def once(self, call: Timed) -> float:
        self._queueing.pop(id(call), None)
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            return time.perf_counter() - start

    def sample(self, call: Timed, seconds: float) -> list[float]:
        count = max(1, min(10, int(0.02 / max(seconds, 1e-9))))
        # Where queueing takes longer than the flush, the device would wait between the two events: flush for longer.
        queueing = self._queueing.get(id(call), seconds)
        flushes = max(1, min(FLUSHES, math.ceil(1.3 * queueing / self._flush_seconds)))
        pairs, queued = [], []
        with torch.cuda.device(self.device):
            for _ in range(count):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                for _ in range(flushes):
                    self._flush()
                start.record()
                before = time.perf_counter()
                call()
                queued.append(time.perf_counter() - before)
                end.record()
                pairs.append((start, end))
            torch.cuda.synchronize()
        self._queueing[id(call)] = statistics.median(queued)
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def host(self, call: Timed, seconds: float) -> float | None:
        count = max(1, min(20, int(0.02 / max(seconds, 1e-9))))
        found = []
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for _ in range(count):
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
            torch.cuda.synchronize()
        return statistics.median(found)


def clock_for(device: torch.device | str) -> Clock:
    """
    Raises:
        ArgumentError: neither the CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return HostClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise ArgumentError("device", str(device), "timing is for 'cpu' and 'cuda'")


def interleaved(
    calls: Mapping[str, Timed], clock: Clock, seconds: float, failed: dict[str, str] | None = None
) -> dict[str, Timing]:
    """Time each call once a round, for about `seconds` in all, after a first run that does not count.

    Those far behind the fastest drop out once they have three samples, or at once where nobody can think of waiting
    for them: their first run is then what is known.

    Args:
        failed: where it goes, by name, what a call raised; without it that comes through.
    """
    estimate: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    hosts: dict[str, float | None] = {}

    @contextlib.contextmanager
    def attempt(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if failed is None:
                raise
            failed[name] = said(error)
            estimate.pop(name, None)
            samples.pop(name, None)

    for name, call in calls.items():
        with attempt(name):
            estimate[name] = clock.once(call)
    limit = HOPELESS * min(estimate.values(), default=0.0)
    samples |= {name: [seconds_] if seconds_ > limit else [] for name, seconds_ in estimate.items()}
    racing = [name for name, found in samples.items() if not found]
    started, rounds = time.perf_counter(), 0
    while racing and rounds < MOST:
        spent = time.perf_counter() - started
        if rounds >= LEAST and spent > seconds and (spent > LONGEST * seconds or settled(samples)):
            break
        for name in racing:
            with attempt(name):
                samples[name] += clock.sample(calls[name], estimate[name])
                estimate[name] = statistics.median(samples[name])
        rounds += 1
        best = min(estimate.values(), default=0.0)
        late = time.perf_counter() - started > seconds
        # A slow one is known well enough by fewer samples, and costs the most.
        racing = [
            n for n in racing if n in estimate and (estimate[n] <= best * GIVE_UP or (rounds < LEAST and not late))
        ]
    for name in list(samples):
        with attempt(name):
            hosts[name] = clock.host(calls[name], estimate[name])
    return {name: timing(samples[name], found) for name, found in hosts.items()}


def said(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def settled(samples: Mapping[str, list[float]]) -> bool:
    """The fastest is faster than the next beyond the quartiles of both, or nobody would notice the difference."""
    first, *others = sorted((timing(found) for found in samples.values()), key=lambda t: t.median)
    if not others:
        return True
    second = others[0]
    return first.high < second.low or second.median < first.median * 1.01


def timing(samples: list[float], host: float | None = None) -> Timing:
    """Median and quartiles of samples, seconds a call."""
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], 1, host)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples), host)
