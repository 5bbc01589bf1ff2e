"""One rank that differs, dies, fails or stays away: a clear error on every rank, and none waits beyond the timeout."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from failure_ranks import TIMEOUT
from filelock import FileLock
from ranks import spread

SLACK = 20.0
"""A loaded machine's, in seconds."""
Found = list[dict[str, tuple[str, str, float]]]
"""By rank and case: how the call ended: type, text, seconds."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One group's results, for all tests here and for all of pytest-xdist's workers."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "failures"
    names = ("found0.pt", "partial.pt", "found2.pt")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            outcomes = spread("failure_ranks:everything", 3, folder, keep=str(folder))
            assert [o.error for o in outcomes] == ["exited with 0", "exited with 7", "exited with 0"]
    return [torch.load(folder / name, weights_only=False) for name in names]


DIFFERENCES = {
    "causal": "causal differs: ranks 0, 2: True; rank 1: False",
    "window": "window differs: ranks 0, 2: (4, 0); rank 1: (3, 0)",
    "method": "method differs: ranks 0, 2: ring; rank 1: gather",
    "placement": "placement differs: ranks 0, 2: contiguous; rank 1: zigzag",
    "dtype": "dtype differs: ranks 0, 2: fp32; rank 1: bf16",
    "heads": "heads_q differs: ranks 0, 2: 4; rank 1: 2",
    "gradients": "gradients for q, k, v, bias, sinks differs",
    "scale": "scale differs",
    "backend": "overrides differs: ranks 0, 2: none; rank 1: force reference (by the argument backend=)",
    "disabled": "overrides differs: ranks 0, 2: none; rank 1: disable torch",
    "registered": "backends differs: ranks 0, 2: ",
    "installed": "installed differs: ranks 0, 2: ",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_is_one_error_on_all_ranks(found: Found, name: str) -> None:
    ends = [rank[name] for rank in found]
    assert {kind for kind, _, _ in ends} == {"RanksDisagree"}
    assert len({text for _, text, _ in ends}) == 1, "the same text everywhere"
    assert DIFFERENCES[name] in ends[0][1]
    assert max(seconds for *_, seconds in ends) < SLACK


def test_one_rank_s_bad_argument_is_named_on_the_others(found: Found) -> None:
    first, odd, last = (rank["bad shape"] for rank in found)
    assert odd[0] == "ArgumentError" and "seqlen_kv=(8, 9)" in odd[1] and "ranks 0, 2 did not run either" in odd[1]
    assert first[:2] == last[:2] and first[0] == "RanksDisagree"
    assert "rank 1 cannot take part: ArgumentError: seqlen_kv=(8, 9)" in first[1]


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("bad argument on every rank", "ArgumentError", "window=(-1, 0)"),
        ("unknown method", "UnknownNameError", "method='spiral'"),
        ("uneven zigzag", "ArgumentError", "length of q by rank=[8, 4, 8]"),
        ("heads not divisible", "MethodUnavailable", "ULYSSES_HEADS"),
    ],
)
def test_a_mistake_of_all_ranks_is_each_one_s_own_error(found: Found, name: str, kind: str, text: str) -> None:
    for rank in found:
        assert rank[name][0] == kind and text in rank[name][1]


def test_a_rank_that_forgot_its_plans_plans_again_with_the_others(found: Found) -> None:
    assert [rank["refreshed"][0] for rank in found] == [""] * 3


@pytest.mark.parametrize("name", ["killed before a call", "killed before a gather's backward", "killed in a ring"])
def test_a_killed_rank(found: Found, name: str) -> None:
    for kind, text, seconds in (found[0][name], found[2][name]):
        assert kind == "RankFailed" and "of 3: " in text and "A rank of this group has died" in text
        assert seconds < TIMEOUT + SLACK


def test_a_kernel_that_fails_on_one_rank(found: Found) -> None:
    ends: list[Any] = [rank["kernel"] for rank in found]
    assert ends[1][0] == "BackendFailed" and "a kernel fault" in ends[1][1]
    for kind, _, seconds in (ends[0], ends[2]):
        assert kind == "RankFailed" and seconds < TIMEOUT + SLACK


def test_a_rank_that_never_calls(found: Found) -> None:
    for rank in (found[0], found[2]):
        kind, text, seconds = rank["absent"]
        assert kind == "RankFailed" and "agreeing on the call failed" in text
        assert seconds < TIMEOUT + SLACK
