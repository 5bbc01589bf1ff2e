"""The choice that a traced graph holds as a constant, and when it stands."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from attnrt.decision import Decision
from attnrt.settings import Settings


class Pin(NamedTuple):
    """A choice by its label, and the overrides it was made under, in words; or one of those below."""

    label: str
    overrides: str


TRACED = Pin("being traced", "")
"""The choice is being made for a graph."""
LATE = Pin("at run time", "")
"""The graph leaves it to its runs."""


def overrides_in_words(chosen: Settings) -> str:
    """What contexts and variables have to say about the choice; the same words, the same choice."""
    said = [o for o in chosen.overrides if o.beaten_by is None and not o.source.startswith("the argument")]
    return "; ".join(f"{o.what} {o.value}" for o in said)


def pinned(decision: Decision, pin: Pin | None, chosen: Settings) -> Decision:
    """A graph's own choice stands as long as that kernel takes the call and the overrides are those of then."""
    if pin is None or decision.backend is None:
        return decision
    if pin is LATE:
        late = "a size is dynamic" if decision.request.dynamic else "it could not be made when the graph was traced"
        return replace(decision, why=f"{decision.why}; chosen at run time, since {late}")
    if pin is TRACED:
        return replace(decision, why=f"{decision.why}; chosen when the graph was traced")
    held = next((v for v in decision.verdicts.values() if v.eligible and v.label == pin.label), None)
    if pin.overrides != overrides_in_words(chosen):
        why = f"{decision.why}; the graph was traced for {pin.label} under other overrides"
    elif held is None:
        why = f"{decision.why}; the graph was traced for {pin.label}, which does not take the call now"
    else:
        backend, why = held.backend, "chosen when the graph was traced"
        why = f"{decision.why}; {why}" if backend == decision.backend else f"{why}; now it would be {decision.label}"
        return replace(decision, backend=backend, why=why)
    return replace(decision, why=why)
