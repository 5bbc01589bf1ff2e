"""Where a plan finds the sequences of a padded batch."""

from __future__ import annotations

import pytest
import torch

from attnrt.backends.cudnn import rows
from attnrt.backends.cudnn.launch import Lane
from attnrt.backends.cudnn.layouts import MOST_SEQUENCES, shape_of
from attnrt.backends.cudnn.rows import Constants
from attnrt.request import AttentionRequest


def padded(**options: object) -> AttentionRequest:
    sizes = {"batch": 2, "heads_q": 8, "seqlen_q": 300, "head_dim": 64, "layout": "bhsd", "padded": True}
    return AttentionRequest.from_shape(**(sizes | options))  # type: ignore[arg-type]


def test_heads_of_a_group_begin_where_their_keys_do() -> None:
    assert Lane(100, 10, 2).offsets(2, 4).tolist() == [0, 0, 10, 10, 100, 100, 110, 110, 200]
    assert Lane(100, 0, 1).offsets(3, 1).tolist() == [0, 100, 200, 300]


def test_heads_are_sequences_where_the_length_is_in_their_stride() -> None:
    assert shape_of(padded(), 90).heads_apart and shape_of(padded(), 90).batch == 16
    assert not shape_of(padded(layout="bshd"), 90).heads_apart
    assert not shape_of(padded(sinks=True), 90).heads_apart
    assert not shape_of(padded(batch=MOST_SEQUENCES // 8 + 1), 90).heads_apart
    assert not shape_of(
        padded(seqlen_q=1, seqlen_kv=300), 90
    ).ragged  # a cache's strides do not change from call to call


def test_tables_are_bounded_in_number_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 4000)
    known, cpu = Constants(), torch.device("cpu")
    for i in range(10):
        made = known.get(("table", i), torch.int32, cpu, lambda i=i: torch.full((250,), i, dtype=torch.int32))  # type: ignore[misc]
        assert made.tolist() == [i] * 250
    assert len(known._made) == 4
    assert known.get(("table", 9), torch.int32, cpu, lambda: pytest.fail("made twice")) is made
