"""DTensors: heads and batch rows work as they lie; a cut sequence is computed across ranks, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import spread

from attnrt.sharded import CONTEXT_PARALLEL


def test_placements(tmp_path: Path) -> None:
    outcomes = spread("dtensor_ranks:placed", 4, tmp_path)
    assert [o.error for o in outcomes] == [""] * 4
    for name, result in outcomes[0].value.items():
        assert max(result["errors"]) < 1e-13, (name, result)
        assert result["shape"][-1] == 8
    found = outcomes[0].value
    assert found["heads"]["placements"] == "(Shard(dim=1),)"
    assert found["sequence and heads"]["placements"] == "(Shard(dim=2), Shard(dim=1))"
    assert found["sequence"]["lengths"] == (6, 6, 6, 4), "as DTensor cuts 22 tokens"


REFUSALS = {
    "mixed": ("ArgumentTypeError", "must all be DTensors"),
    "queries cut, keys whole": ("ArgumentError", "must be cut alike"),
    "keys cut, queries whole": ("ArgumentError", "must be cut alike"),
    "head dim": ("ArgumentError", "q.placements[0]=Shard(dim=3)"),
    "partial": ("ArgumentError", "q.placements[0]=Partial(sum)"),
    "odd heads": ("ArgumentError", "heads_q=3: must divide among the 2 ranks"),
    "mask of a cut sequence": ("ArgumentError", "call context_parallel_attention"),
    "explained": ("ArgumentError", "attnrt.distributed.explain"),
    "inside torch's context_parallel": ("ArgumentError", "torch's context_parallel is in force"),
    "compiled inside it": ("ArgumentError", "torch's context_parallel is in force"),
    "after it": ("", ""),
}


def test_refusals_and_compiled_graphs(tmp_path: Path) -> None:
    outcomes = spread("dtensor_ranks:pair", 2, tmp_path)
    assert [o.error for o in outcomes] == [""] * 2
    found = outcomes[0].value["refused"]
    assert found.pop("explained heads") == 4, "an explanation is of the rank's own call"
    assert found.keys() == REFUSALS.keys()
    for name, (kind, text) in REFUSALS.items():
        assert found[name][0] == kind and text in found[name][1], (name, found[name])
    # ... and the operators that torch.compile puts into a graph.
    found = outcomes[0].value["compiled"]
    kind, text = found.pop("sequence")
    assert kind and "a sequence cut across ranks is not served inside torch.compile" in text
    for name, errors in found.items():
        assert max(errors) < 5e-6, (name, errors)
    found = outcomes[0].value["inferred"]
    assert len(found) == 12
    for name, (operators, kept, errors) in found.items():
        kind = "plain" if name.startswith("plain") else "inference" if name.startswith("mask") else "forward"
        assert operators == [f"attnrt.attention_{kind}.default"], (name, operators)
        assert kept and max(errors) < 5e-6, (name, kept, errors)


def test_helpers(tmp_path: Path) -> None:
    outcomes = spread("dtensor_ranks:helpers", 2, tmp_path)
    assert [o.error for o in outcomes] == [""] * 2
    for outcome in outcomes:
        assert len(outcome.value) == 15 and all(outcome.value.values()), outcome.value


def test_torch_s_module_is_where_the_check_looks_for_it() -> None:
    """The check is silent where it does not find it."""
    module = pytest.importorskip(CONTEXT_PARALLEL)
    assert len(module.custom_ops) == 6
    assert isinstance(module.DTensor._op_dispatcher._custom_op_handlers, dict)
