"""Runs `numerics.py`, one process for each of its tests: whether triton interprets is settled when it is imported, and
other tests of the same process may want it to compile."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = [
    line[4:].partition("(")[0] for line in (HERE / "numerics.py").read_text().splitlines() if line[:8] == "def test"
]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", TESTS)
def test_interpreted(name: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, f"{HERE / 'numerics.py'}::{name}"],
        env={n: v for n, v in environment.items() if not n.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
