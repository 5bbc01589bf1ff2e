"""First calls in processes of their own, several at a time: what compiles is then on disk, and what crashes or hangs
does so there and not where the figures are kept.

Only kernels that compile and keep it (`Kernel.compiles`, `Kernel.disk_cache`) are tried. Nothing is timed for a figure.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from attnrt.environment import Environment
from attnrt.errors import AttnrtError
from attnrt.evidence.calls import Call, device_of
from attnrt.evidence.candidates import every_candidate, refusals
from attnrt.policies.kinds import kind_of
from attnrt.settings import Settings

Outcome = Literal["ran", "refused", "failed", "died", "hung", "left"]
"""failed: it raised. died, hung: it took its process along, or was not done in time. left: not come to."""
PROCESSES = 8
WORTH_SECONDS = 15.0
"""In less time the processes would hardly have started: nothing is tried."""
START_SECONDS = 90.0
"""What a process may take until it is ready: it imports torch, and other processes start beside it."""
CALL_SECONDS = 120.0
"""What one first call may take: a dozen kernels at worst, compiled beside others."""
ROOM = 0.7
"""Of the free memory, what all processes together may take."""
CONTEXT = 1 << 30
"""Bytes of device memory that a process takes by itself, about."""
DEATHS = 3
"""Processes that one kernel may take along: after that it is tried no more."""


class Trial(NamedTuple):
    """One kernel's first call."""

    call: Call
    kernel: str
    outcome: Outcome
    seconds: float = 0.0
    said: str = ""


@dataclass
class Trials:
    """What came of them, and how long they took in all, seconds."""

    trials: list[Trial] = field(default_factory=list)
    seconds: float = 0.0
    processes: int = 0

    def count(self, *outcomes: Outcome) -> int:
        return sum(trial.outcome in outcomes for trial in self.trials)

    def against(self, call: Call) -> dict[str, str]:
        """Kernels that are better not run on this call here, and why: they failed on it, or took their process along
        on a call of its kind, or on any where none of its kind is known to run."""
        kind = kind_of(call.request())
        alike = {t for t in self.trials if kind_of(t.call.request()) == kind}
        ran = {t.kernel for t in alike if t.outcome == "ran"}
        lost = [t for t in self.trials if t.outcome in ("died", "hung") and (t in alike or t.kernel not in ran)]
        lost.sort(key=lambda t: t in alike)  # the nearest is told
        found = {t.kernel: f"{t.said} (tried in a process of its own, {t.call})" for t in lost}
        return found | {t.kernel: t.said for t in self.trials if t.call == call and t.outcome == "failed"}

    def __str__(self) -> str:
        lost = self.count("left")
        return (
            f"{self.count('ran')} first calls in {self.seconds:.0f} s, {self.processes} processes"
            + (f", {self.count('failed')} failed" if self.count("failed") else "")
            + (f", {self.count('died', 'hung')} died or hung" if self.count("died", "hung") else "")
            + (f", {lost} not come to" if lost else "")
        )


def planned(calls: Iterable[Call], environment: Environment, settings: Settings) -> list[tuple[Call, str]]:
    """(call, kernel) of each kernel that compiles, keeps that on disk, and is refused by no rule; calls in order."""
    # Rules alone: what the library itself says is asked in the process.
    there = replace(environment, simulated=True)
    compiling = [c for c in every_candidate(environment) if c.kernel.compiles]
    found = []
    for call in dict.fromkeys(calls):
        try:
            request = call.request()
        except AttnrtError:
            continue
        found += [
            (call, c.name)
            for c in compiling
            if (c.backend.built and not refusals(c, request, there, settings) and c.kernel.disk_cache() is not None)
        ]
    return found


def try_calls(
    calls: Iterable[Call],
    environment: Environment,
    settings: Settings,
    *,
    seconds: float,
    processes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trials:
    """Make the first calls, for so many seconds at most; there are none where nothing compiles.

    Args:
        processes: at once; by default half of this process's cores, and at most 8.
        progress: called with (calls done, calls in all).
    """
    tasks = planned(calls, environment, settings)
    if not tasks or seconds < WORTH_SECONDS:
        return Trials([Trial(call, kernel, "left") for call, kernel in tasks])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(processes or max(1, min(PROCESSES, cores // 2)), len(tasks))
    free = environment.with_free_memory().free_memory or 1 << 40
    job = _Job(
        tasks, str(device_of(environment)), int(ROOM * free / count) - CONTEXT, time.monotonic() + seconds, progress
    )
    started = time.monotonic()
    job.run(count)
    return Trials(
        [job.found.get(i) or Trial(call, kernel, "left") for i, (call, kernel) in enumerate(tasks)],
        time.monotonic() - started,
        count,
    )


class _Job:
    """Tasks, and threads that each feed them to a process."""

    def __init__(
        self,
        tasks: Sequence[tuple[Call, str]],
        device: str,
        room: int,
        deadline: float,
        progress: Callable[[int, int], None],
    ) -> None:
        self.tasks, self.deadline, self.progress = tasks, deadline, progress
        self.arguments = [device, str(room)]
        self.found: dict[int, Trial] = {}
        self.waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.children: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        for i in range(len(tasks)):
            self.waiting.put(i)

    def run(self, count: int) -> None:
        threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(count)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):  # a plain join would not see Ctrl-C
                threads[0].join(0.1) if threads[0].is_alive() else time.sleep(0.1)
                self.progress(len(self.found), len(self.tasks))
        finally:
            self.stopped = True
            for child in list(self.children):
                child.kill()
            for thread in threads:
                thread.join(10)

    def _feed(self) -> None:
        again = True
        while again and not self.stopped and time.monotonic() < self.deadline:
            with tempfile.TemporaryFile() as log, self._child(log) as child:
                self.children.add(child)
                try:
                    again = self._serve(child, log)
                finally:
                    child.kill()
                    self.children.discard(child)

    def _child(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        # This attnrt before any other; the script's own folder last, as its files may be called like a package.
        script, *rest = sys.path
        paths = [str(Path(__file__).resolve().parents[2]), *map(os.path.abspath, (*rest, script))]
        return subprocess.Popen(
            [sys.executable, "-m", "attnrt.evidence.trial_process", *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
        )

    def _serve(self, child: subprocess.Popen[bytes], log: IO[bytes]) -> bool:
        """Give it tasks until there are none; True if it is lost and another may go on."""
        if not self._answer(child, START_SECONDS):
            return False  # it cannot even start: its tasks are nobody's fault
        while not self.stopped and time.monotonic() < self.deadline:
            try:
                at = self.waiting.get_nowait()
            except queue.Empty:
                return False
            call, kernel = self.tasks[at]
            if sum(t.kernel == kernel and t.outcome in ("died", "hung") for t in list(self.found.values())) >= DEATHS:
                continue  # it has cost enough
            started = time.monotonic()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps({"call": call.sizes(), "kernel": kernel}).encode() + b"\n")
                child.stdin.flush()
                answer = self._answer(child, CALL_SECONDS)
            except BrokenPipeError:
                answer = {}
            seconds = time.monotonic() - started
            if answer is None:
                if self.stopped or time.monotonic() >= self.deadline:
                    return False  # it may have been on its way
                self.found[at] = Trial(call, kernel, "hung", seconds, f"not done after {seconds:.0f} s")
                return True
            if not answer:
                said = f"its process died: {_how(child, log)}"
                self.found[at] = Trial(call, kernel, "died", seconds, said)
                return True
            self.found[at] = Trial(call, kernel, answer["outcome"], seconds, answer["said"])
            if answer["outcome"] == "died":
                return True
        return False

    def _answer(self, child: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """Its next line; {} if it ended, None if the time is over."""
        assert child.stdout is not None
        until = min(time.monotonic() + seconds, self.deadline)
        while not self.stopped and (left := until - time.monotonic()) > 0:
            if select.select([child.stdout], [], [], min(left, 0.2))[0]:
                line = child.stdout.readline()
                found: dict[str, Any] = json.loads(line) if line else {}
                return found
        return None


def _how(child: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    """How a process ended: its signal, or its last words."""
    try:
        code = child.wait(10)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    if code < 0:
        return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    log.seek(0)
    lines = log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {code}"
