"""For every GPU test: this folder is on the path, a lost CUDA context is said once, and a run can be given a limit.

GPU_TEST_SECONDS: what has not begun after so many seconds is skipped, by name, so that a run that is cut has a summary.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
LOST = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")
_began = time.monotonic()
_lost: list[str] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    outcome: Any = yield
    said = "" if call.excinfo is None else str(call.excinfo.value)
    if outcome.get_result().failed and not _lost and any(words in said for words in LOST):
        _lost.append(item.nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if Path(__file__).parent not in item.path.parents:
        return
    if _lost:
        pytest.skip(f"the CUDA context was lost in {_lost[0]}")
    limit = os.environ.get("GPU_TEST_SECONDS")
    if limit and time.monotonic() - _began > float(limit):
        pytest.skip(f"{limit} s are over")
