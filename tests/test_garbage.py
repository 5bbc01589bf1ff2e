"""A first choice collects no garbage, and leaves the collector as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALL = """
import gc, torch, attnrt
from attnrt import runtime
x = torch.ones(1, 1, 2, 8)
if {disabled}:
    gc.disable()
gc.set_threshold(1, 1, 1)  # a collection at nearly every object
seen, decide = [], runtime.decide
def watched(*args, **options):
    before = len(seen)
    decision = decide(*args, **options)
    inside.append(len(seen) - before)
    return decision
inside = []
runtime.decide = watched
gc.callbacks.append(lambda phase, info: seen.append(phase))
attnrt.attention(x, x, x)
attnrt.attention(x, x[:, :, :1], x[:, :, :1])
print(inside[0], inside[1] > 0, gc.isenabled())
"""


@pytest.mark.parametrize("disabled, said", [(False, "0 True True\n"), (True, "0 False False\n")])
def test_the_collector_waits_for_the_first_choice_alone(disabled: bool, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", CALL.format(disabled=disabled)], capture_output=True, text=True)
    assert done.stdout == said, done.stderr


def test_it_collects_again_after_a_choice_that_failed() -> None:
    code = "import gc, torch, attnrt; x = torch.ones(1, 1, 2, 8)\ntry: attnrt.attention(x, x, x, scale='1')\n"
    code += "except attnrt.AttnrtError: print(gc.isenabled())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
