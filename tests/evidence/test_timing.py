"""Who is timed, in which order, and what comes of the samples; by a clock that is made up, so that nothing depends on
how fast this machine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnrt.errors import ArgumentError
from attnrt.evidence import timing
from attnrt.evidence.timing import HostClock, clock_for, interleaved, settled


class Scripted:
    """Says what each call takes, and writes down who was timed. Its own seconds pass only when it times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float | Callable[[int], float]) -> None:
        self.seconds, self.order, self.now = seconds, list[str](), 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def calls(self) -> dict[str, Any]:
        return {name: (lambda name=name: name) for name in self.seconds}

    def once(self, call: Any) -> float:
        return self.sample(call, 0.0)[0]

    def sample(self, call: Any, seconds: float) -> list[float]:
        name = call()
        taken = self.seconds[name]
        taken = taken(self.order.count(name)) if callable(taken) else taken
        self.order.append(name)
        self.now += taken
        return [taken]

    def host(self, call: Any, seconds: float) -> float | None:
        return None


def test_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Scripted(monkeypatch, a=0.010, b=0.011)
    found = interleaved(clock.calls(), clock, 0.1)
    assert clock.order == ["a", "b"] * (len(clock.order) // 2)
    assert (found["a"].median, found["b"].median) == (0.010, 0.011)
    assert found["a"].samples == found["b"].samples >= 3


def test_the_slow_ones_drop_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Scripted(monkeypatch, fast=0.001, slow=0.050)
    found = interleaved(clock.calls(), clock, 1.0)
    assert found["slow"].samples == 3 and found["fast"].samples > 10


def test_one_round_is_enough_of_a_very_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Scripted(monkeypatch, fast=0.001, slow=5.0)
    found = interleaved(clock.calls(), clock, 0.1)
    assert (found["slow"].samples, found["slow"].median) == (1, 5.0) and found["fast"].samples >= 3


def test_longer_where_two_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def restless(i: int) -> float:
        return 0.010 + 0.004 * (i % 3)

    apart = Scripted(monkeypatch, a=0.010, b=0.015)
    interleaved(apart.calls(), apart, 0.1)
    alike = Scripted(monkeypatch, a=restless, b=lambda i: restless(i + 1) * 1.03)
    interleaved(alike.calls(), alike, 0.1)
    assert len(alike.order) > 1.5 * len(apart.order)
    assert alike.now < 1.0


def test_settled() -> None:
    assert settled({"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]})
    assert not settled({"a": [1.0, 1.5, 2.0], "b": [1.2, 1.6, 2.1]})
    assert settled({"a": [1.0, 1.5, 2.0], "b": [1.0, 1.501, 2.0]})  # nobody would notice
    assert settled({"a": [1.0]})


def test_median_and_quartiles() -> None:
    found = timing.timing([5.0, 1.0, 2.0, 4.0, 3.0], host=7.0)
    assert (found.low, found.median, found.high, found.samples) == (2.0, 3.0, 4.0, 5)
    assert found.spread == pytest.approx(2 / 3) and found.host == 7.0
    assert timing.timing([2.0]).spread == 0.0


def test_the_clock_of_the_host_runs() -> None:
    clock = HostClock()
    a = torch.randn(200, 200)
    before = clock.now()
    assert clock.once(lambda: a @ a) > 0
    assert all(s > 0 for s in clock.sample(lambda: a @ a, 1e-6))
    assert clock.now() > before and clock.host(lambda: a, 1.0) is None


def test_other_devices_are_refused() -> None:
    with pytest.raises(ArgumentError, match="'cpu' and 'cuda'"):
        clock_for("meta")
