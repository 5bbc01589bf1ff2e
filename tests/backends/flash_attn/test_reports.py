"""Absent, too old, too new, broken, built for another GPU: what a user reads of it, and what then runs.

Through `explain` and `attention` alone. The packages are real files; only the GPU's identity and versions are made up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from installing import DENSE, NEW, OLD, OTHERS, VERSION, Install, elf, module

import attnrt
from attnrt.backends.flash_attn.discovery import GENERATIONS
from attnrt.decision import Verdict
from attnrt.environment import PACKAGES, Environment, _installed
from attnrt.errors import BackendUnavailable

PLACES = {2: "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so", 3: "flash_attn_3/_C.abi3.so"}
EVERY = [(n, w) for n in GENERATIONS for w in ("absent", "too old", "too new", "broken")]
CASES = [*EVERY, *((n, "built elsewhere") for n in PLACES)]
REPORTS = {
    "absent": ("INSTALLED", "is not installed", ""),
    "too old": ("VERSION", "or later is needed", "pip install"),
    "too new": ("TOO_NEW", "is a later generation than", "pip install"),
    "broken": ("BROKEN", "is installed and does not load: ImportError: lib.so: undefined symbol: _ZN3c10", ""),
    "built elsewhere": ("BUILT_FOR", "here was built for sm80, and a GPU of sm90 is sm90", "build it again"),
}
q = torch.randn(1, 4, 16, 64, dtype=torch.bfloat16)
Machine = Callable[..., None]


@pytest.fixture
def machine(install: Install, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This one, with a GPU of sm90 and one generation as it is installed; nothing else but torch."""

    def described(number: int, installed: bool = True) -> None:
        package = GENERATIONS[number].package
        packages = dict.fromkeys(set(PACKAGES) - {"torch"}) | {package: _installed(package) if installed else None}
        there = replace(Environment.simulate("sm90", packages=packages, name="a GPU of sm90"), simulated=False)
        monkeypatch.setattr(Environment, "detect", staticmethod(lambda device=None: there))
        attnrt.refresh()

    return described


def put(number: int, what: str, install: Install) -> None:
    unread = {module(number): "raise AssertionError('imported')"}
    if what == "too old":
        install(number, OLD[number], unread)
    elif what == "too new":
        install(number, NEW[number], unread)
    elif what == "broken":
        install(number, VERSION[number], {module(number): "raise ImportError('lib.so: undefined symbol: _ZN3c10')"})
    elif what == "built elsewhere":
        install(number, VERSION[number], {module(number): DENSE + OTHERS, PLACES[number]: elf((2, 80))})


def verdict(number: int) -> Verdict:
    return attnrt.explain(q, q, q, causal=True).verdicts[f"flash_attn_{number}"]


@pytest.mark.parametrize(("number", "what"), CASES)
def test_the_report(number: int, what: str, install: Install, machine: Machine) -> None:
    put(number, what, install)
    machine(number, what != "absent")
    found = verdict(number)
    (reason,) = found.reasons
    rule, message, remedy = REPORTS[what]
    if (number, what) == (3, "too old"):  # it is on no index
        remedy = "build the hopper folder"
    assert not found.eligible and reason.rule == f"FA{number}_{rule}"
    assert message in reason.message
    assert reason.remedy and remedy in reason.remedy
    asked = attnrt.explain(q, q, q, causal=True)
    assert asked.backend == "torch", "another one serves"
    assert reason.rule in asked.to_json() and message in asked.to_markdown().replace("\\_", "_")
    with pytest.raises(BackendUnavailable, match=f"FA{number}_{rule}"):
        attnrt.attention(q, q, q, causal=True, backend=f"flash_attn_{number}")


@pytest.mark.parametrize("number", GENERATIONS)
def test_attention_passes_over_what_does_not_load(number: int, install: Install, machine: Machine) -> None:
    """Preferred, accepted by every rule, broken: the next one runs, without a failure, and the report says why."""
    put(number, "broken", install)
    machine(number)
    with attnrt.override(prefer=(f"flash_attn_{number}", "reference")):
        out = attnrt.attention(q, q, q, causal=True)
    decision = attnrt.last_decision()
    assert decision is not None and decision.backend == "reference"
    (reason,) = decision.verdicts[f"flash_attn_{number}"].reasons
    assert reason.rule == f"FA{number}_BROKEN" and "undefined symbol: _ZN3c10" in reason.message
    torch.testing.assert_close(out, attnrt.attention(q, q, q, causal=True, backend="reference"))


def test_refresh_looks_again(install: Install, machine: Machine) -> None:
    """The same version, repaired."""
    put(2, "broken", install)
    machine(2)
    assert not verdict(2).eligible
    install(2, VERSION[2], {module(2): DENSE + OTHERS + "# longer than before, so that no stale bytecode is read\n"})
    assert not verdict(2).eligible
    attnrt.refresh()
    assert verdict(2).eligible
