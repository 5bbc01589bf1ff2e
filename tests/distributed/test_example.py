"""examples/context_parallel.py: a model trained on cut sequences has the losses of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_ranks import alone
from ranks import spread

STEPS = 4
WAYS = {
    2: [("ring", "zigzag"), ("ulysses", "contiguous")],
    4: [("gather", "zigzag"), ("ring", "zigzag"), ("auto", "contiguous")],
}


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return alone(STEPS)


@pytest.mark.parametrize("ranks", WAYS)
def test_losses_do_not_depend_on_the_ranks(expected: list[float], ranks: int, tmp_path: Path) -> None:
    outcomes = spread("example_ranks:together", ranks, tmp_path, steps=STEPS, ways=WAYS[ranks])
    assert [o.error for o in outcomes] == [""] * ranks
    assert expected[-1] < expected[0], "it learns"
    for way in WAYS[ranks]:
        for outcome in outcomes:
            assert outcome.value[way] == pytest.approx(expected, rel=1e-6), way
