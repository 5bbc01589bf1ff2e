"""Puts this folder on the path, and takes a sample of the large grids: all of them take an hour of CPU time.

    TRITON_TESTS=full make test-triton      # or: make test-triton-full

Nothing here may import triton: see test_numerics.py.
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

FULL = os.environ.get("TRITON_TESTS") == "full"
SAMPLE = {
    "test_alone": 12,
    "test_lengths": 6,
    "test_every_edge": 3,
    "test_pairs": 16,
    "test_dropout": 4,
    "test_packed_heads": 6,
    "test_caches": 4,
    "test_machine_code": 5,
    "test_codegen": 4,
    "test_protocol_and_numerics": 10,
    "test_lengths_of_their_own": 12,
}
"""Cases that are run of a test, spread evenly over its grid; every case of the tests that are not here."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any("[" in str(arg) for arg in config.args)  # one case was asked for
    if FULL or named:
        return
    grids: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        function = getattr(item, "originalname", item.name)
        if function in SAMPLE and Path(__file__).parent in item.path.parents:
            grids.setdefault((item.path.name, function), []).append(item)
    left_out = set()
    for (_, function), cases in grids.items():
        count = min(SAMPLE[function], len(cases))
        chosen = {(2 * i + 1) * len(cases) // (2 * count) for i in range(count)}
        left_out |= {id(case) for i, case in enumerate(cases) if i not in chosen}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]
