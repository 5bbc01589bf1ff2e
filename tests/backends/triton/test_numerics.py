"""Runs `numerics.py` and `decode_numerics.py`, each in a process of its own: whether triton interprets is settled when
it is imported, and other tests of the same process may want it to compile. TRITON_TESTS=full: one for each test."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FULL = os.environ.get("TRITON_TESTS") == "full"


def names_in(file: str) -> list[str]:
    lines = (HERE / file).read_text().splitlines()
    return [f"{file}::{line[4:].partition('(')[0]}" for line in lines if line[:8] == "def test"]


FILES = ("numerics.py", "decode_numerics.py")
PARTS = [test for file in FILES for test in (names_in(file) if FULL else [file])]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(HERE / part)],
        env={n: v for n, v in environment.items() if not n.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
