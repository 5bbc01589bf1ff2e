"""Rows of a packed batch that no sequence has: the kernel that clears them beside plain PyTorch, by the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BESIDE = """
import torch
from attnrt.backends.flash_attn import tails

def launch(kernel, grid, *arguments, **options):
    kernel[grid](*arguments, **options)

def both(body, offsets, *sizes):
    found = []
    for how in (launch, tails._mask):
        tensors = [None if size is None else torch.full(size, 7.0) for size in sizes]
        body(how, (*offsets, *tensors))
        found.append(tensors)
    for x, y in zip(*found, strict=True):
        assert x is y is None or torch.equal(x, y), (x, y)
    return found[0]

cu_q, cu_kv = (torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 5], [0, 2, 70]))
out, lse = both(tails._forward, (cu_q,), (80, 2, 24), (2, 80))
assert (out[:5] == 7).all() and (out[5:] == 0).all()
assert (lse[:, :5] == 7).all() and (lse[:, 5:] == -torch.inf).all()
both(tails._forward, (cu_q,), (5, 2, 300), None)
both(tails._backward, (cu_q, cu_kv), (9, 4, 300), (80, 2, 24), (80, 2, 40))
both(tails._backward, (cu_q, cu_kv), None, (80, 2, 24), None)
print("the same")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_the_kernel_does_what_plain_masking_does() -> None:
    environ = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BESIDE], capture_output=True, text=True, env=environ)
    assert done.stdout == "the same\n", done.stderr
