"""The random grids: each is cut into parts, and a part is a process, `python test_x.py --part 3 --seconds 60`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = max(1, min(10, (os.cpu_count() or 1) - 4))
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ


class Parts:
    """Of one test file. They run beside its other tests; but every worker of pytest-xdist would start them all, so
    there a part starts when its own test comes.

    seconds: for each part, besides its start.
    """

    def __init__(self, script: Path, seconds: float, variables: Mapping[str, str] | None = None) -> None:
        self.script, self.seconds = script, seconds
        paths = (str(ROOT), str(ROOT / "tests"), str(script.parent), os.environ.get("PYTHONPATH", ""))
        self.env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
        self.env |= variables or {}
        self.running: dict[int, subprocess.Popen[str]] = {}

    def begin(self, items: Iterable[pytest.Item]) -> None:
        """Start what `test_random` will be asked for."""
        here = [x for x in items if x.path.resolve() == self.script and isinstance(x, pytest.Function)]
        for item in () if IN_WORKER else here:
            if item.originalname == "test_random":
                self._start(item.callspec.params["number"])

    def finish(self, number: int, patience: float) -> None:
        """Wait for a part, `patience` seconds longer than it may run. A failure of its own is one of the test."""
        if number not in self.running:
            self._start(number)
        process, limit = self.running[number], self.seconds + patience
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            pytest.fail(f"not done {limit} s after it was waited for: {_shown(said)}", pytrace=False)
        if process.returncode:
            pytest.fail(_shown(said), pytrace=False)
        print(said[-200:])

    def close(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    def _start(self, number: int) -> None:
        self.running[number] = subprocess.Popen(
            [sys.executable, str(self.script), "--part", str(number), "--seconds", str(self.seconds)],
            cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def _shown(said: str) -> str:
    """A failing case may print megabytes of tensors after what went wrong with it."""
    return said if len(said) <= 6000 else f"{said[:3000]}\n...\n{said[-3000:]}"
