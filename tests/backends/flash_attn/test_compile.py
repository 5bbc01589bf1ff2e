"""`make test-flash`: what our rules say flash-attn 4 takes does compile, for sm90 and sm100, without a GPU.

A sample that is the same each time, in minutes. FLASH_TESTS=full goes through all of it, for hours, and tries some of
what one rule alone refuses: the package must refuse that too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ARCHS = ("sm90", "sm100")


FULL = os.environ.get("FLASH_TESTS") == "full"


@pytest.mark.parametrize("options", [["--full"], ["--refused"]] if FULL else [[]], ids=" ".join)
def test_what_the_rules_take_compiles(options: list[str]) -> None:
    """A process for each arch, since the package reads it when it is imported; both at once."""
    try:
        metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        pytest.skip("needs flash-attn-4: make test-flash")
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("FLASH_ATTENTION_", "CUTE_DSL_"))}
    started = {
        arch: subprocess.Popen(
            [sys.executable, str(HERE / "compiling.py"), "--arch", arch, *options],
            cwd=ROOT,
            env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arch in ARCHS
    }
    wrong = []
    for arch, process in started.items():
        said, _ = process.communicate()
        surprises = [line for line in said.splitlines() if line.startswith("!!")]
        print(f"{arch}: {said.splitlines()[-1]}")
        if process.returncode or surprises or " 0 surprises" not in f" {said.splitlines()[-1]}":
            wrong.append("\n".join((arch, *surprises, said[-2000:])))
    assert not wrong, "\n".join(wrong)
