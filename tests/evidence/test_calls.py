"""Calls by their sizes: the tensors they make, and how much work they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrt.errors import UnknownNameError
from attnrt.evidence.calls import Call, flops, pairs, tensors, traffic
from attnrt.evidence.presets import PHASES, PRESETS, preset_calls

BASE = Call(batch=2, heads_q=4, heads_kv=2, head_dim=16, seqlen_q=48, dtype="fp32")
CALLS = {
    "plain": BASE,
    "bhsd": BASE.changed(layout="bhsd", causal=True),
    "sbhd": BASE.changed(layout="sbhd"),
    "packed": BASE.changed(packed=True, layout="thd", causal=True, training=True),
    "packed, cross": BASE.changed(packed=True, layout="thd", seqlen_kv=64),
    "padded": BASE.changed(padded=True, causal=True),
    "padded kv": BASE.changed(padded="kv"),
    "paged": BASE.changed(seqlen_q=1, seqlen_kv=64, page_size=16),
    "paged bhsd": BASE.changed(seqlen_q=1, seqlen_kv=64, page_size=16, layout="bhsd"),
    "mask and bias": BASE.changed(mask=True, bias=True, bias_grad=True, training=True),
    "the rest": BASE.changed(alibi=True, softcap=5.0, sinks=True, return_lse=True, window=(7, 2), training=True),
    "dims": BASE.changed(head_dim_v=24, deterministic=True, training=True),
    "bf16": BASE.changed(dtype="bf16"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_tensors_make_the_request(call: Call) -> None:
    made = tensors(call)
    assert made.request == call.request()
    assert bool(made.leaves()) == call.training


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_written_and_read_again(call: Call) -> None:
    assert Call.model_validate_json(call.model_dump_json()) == call
    assert Call.model_validate(call.sizes()) == call
    assert str(call) == call.request().describe()


def test_the_same_tensors_again_and_others_by_another_seed() -> None:
    assert tensors(BASE).q.equal(tensors(BASE).q)
    assert not tensors(BASE).q.equal(tensors(BASE, seed=1).q)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.one_of(st.none(), st.tuples(st.one_of(st.none(), st.integers(0, 12)), st.one_of(st.none(), st.integers(0, 12)))),
    st.sampled_from(("top_left", "bottom_right")),
)
def test_pairs_are_those_that_are_seen(q: int, kv: int, causal: bool, window: object, alignment: str) -> None:
    call = Call(
        batch=3, heads_q=2, head_dim=8, seqlen_q=q, seqlen_kv=kv, causal=causal, window=window, alignment=alignment
    )
    left, right = window or (None, None)  # type: ignore[misc]
    shift = kv - q if alignment == "bottom_right" else 0
    seen = 0
    for i in range(q):
        for j in range(kv):
            ok = (left is None or j >= i + shift - left) and (right is None or j <= i + shift + right)
            seen += ok and (not causal or j <= i + shift)
    assert pairs(call.request()) == 3 * seen


def test_flops_and_traffic() -> None:
    full = Call(heads_q=8, heads_kv=2, head_dim=64, seqlen_q=1024, dtype="bf16").request()
    assert flops(full) == 4 * 8 * 1024 * 1024 * 64
    causal = Call(heads_q=8, heads_kv=2, head_dim=64, seqlen_q=1024, dtype="bf16", causal=True).request()
    assert flops(causal) == pytest.approx(flops(full) / 2, rel=1e-3)
    assert flops(full, "backward") == 2.5 * flops(full)
    assert flops(full, "both") == 3.5 * flops(full)
    assert traffic(full) == 2 * 1024 * 64 * (8 + 2 + 2 + 8)
    assert traffic(full, "both") == traffic(full) + traffic(full, "backward")


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"window": (255, 0), "alignment": "bottom_right"}, 256),
        ({"window": (255, None), "alignment": "bottom_right"}, 256),
        ({"causal": True, "alignment": "top_left"}, 1),
        ({"causal": True, "alignment": "bottom_right"}, 4096),
        ({"seqlen_q": 16, "window": (255, 0), "alignment": "bottom_right"}, 271),
    ],
)
def test_keys_that_no_query_sees_need_not_move(changes: dict[str, Any], keys: int) -> None:
    """A window of a decode step would otherwise seem to read faster than memory can."""
    sizes = {"heads_q": 8, "heads_kv": 2, "head_dim": 64, "seqlen_q": 1, "seqlen_kv": 4096, "dtype": "bf16"}
    call = Call(**{**sizes, **changes})
    assert traffic(call.request()) == 2 * 64 * (2 * 8 * call.seqlen_q + 2 * 2 * keys)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_calls(name: str) -> None:
    calls = preset_calls([name])
    assert calls and len(set(calls)) == len(calls)
    assert {c.training for c in calls} == {"training" in PRESETS[name].phases, False}
    for call in calls:
        call.request()
    if "decode" in PRESETS[name].phases:
        decode = preset_calls([name], ["decode"], "fp16", lengths=(4096,), batches=(2,))
        assert [(c.batch, c.seqlen_q, c.seqlen_kv, c.dtype) for c in decode] == [(2, 1, 4096, "fp16")]


def test_a_window_bounds_the_keys_of_a_decode() -> None:
    (short,) = preset_calls(["mistral-7b"], ["decode"], lengths=(1024,), batches=(1,))
    (long,) = preset_calls(["mistral-7b"], ["decode"], lengths=(16384,), batches=(1,))
    assert not short.request().banded
    assert pairs(long.request()) == 4096


def test_unknown_presets_and_phases() -> None:
    with pytest.raises(UnknownNameError, match="llama3-8b"):
        preset_calls(["lama3-8b"])
    with pytest.raises(UnknownNameError, match="prefill"):
        preset_calls(["llama3-8b"], ["prefil"])
    assert PHASES == ("prefill", "decode", "training")
