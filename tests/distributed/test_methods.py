"""Every method against the float64 oracle: the output, the LSE and all gradients, on 2, 3 and 4 gloo ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from oracle import Answers, answers, assert_agrees
from ranks import spread
from scenarios import METHODS, SCENARIOS, SEQUENCE, Scenario, joined
from torch import Tensor

ALL, CORE_ONLY = True, False
GROUPS: dict[int, dict[str | None, bool]] = {
    2: {None: CORE_ONLY, "reference": CORE_ONLY},
    3: {None: ALL, "reference": CORE_ONLY},
    4: {None: CORE_ONLY},
}
"""Ranks to what they run; None is the choice's own, PyTorch's CPU kernel."""
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@cache
def known(name: str) -> Answers:
    return answers(BY_NAME[name].whole())


def whole(scenario: Scenario, placement: str, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One device's results from every rank's."""
    case, ranks = scenario.whole(), len(parts)
    axis = SEQUENCE[case.layout]
    placed_q = scenario.placed(placement, ranks, case.q.shape[axis])
    placed_kv = scenario.placed(placement, ranks, case.k.shape[axis])
    found = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if name in ("out", "q"):
            found[name] = joined(tensors, axis, placed_q)
        elif name == "lse":
            found[name] = joined(tensors, tensors[0].ndim - 1, placed_q)
        elif name in ("k", "v"):
            found[name] = joined(tensors, axis, placed_kv)
        elif name == "bias" and case.operands.bias is not None and case.operands.bias.shape[-2] > 1:
            found[name] = joined(tensors, tensors[0].ndim - 2, placed_q)
        else:
            found[name] = torch.stack(tensors).sum(0)
    return found


@pytest.mark.parametrize("ranks", GROUPS)
def test_every_method_agrees_with_the_oracle(ranks: int, tmp_path: Path) -> None:
    outcomes = spread("scenario_ranks:run_all", ranks, tmp_path, backends=GROUPS[ranks])
    assert [o.error for o in outcomes] == [""] * ranks
    wrong: list[str] = []
    checked = 0
    for key in outcomes[0].value:
        name, method, placement, _ = key
        scenario, parts = BY_NAME[name], [o.value[key] for o in outcomes]
        expected = scenario.refused.get(method)
        if expected is not None:
            if parts != [[expected]] * ranks:
                wrong.append(f"{key}: {expected} should refuse it, not {parts[0]}")
            continue
        if any(isinstance(part, list) for part in parts):
            wrong.append(f"{key}: refused by {parts}")
            continue
        try:
            assert_agrees(scenario.whole(), whole(scenario, placement, parts), known(name))
        except AssertionError as error:
            wrong.append(f"{key}: {error}")
        checked += 1
    assert not wrong, "\n".join(wrong)
    assert checked > 60 and set(METHODS) == {key[1] for key in outcomes[0].value}
