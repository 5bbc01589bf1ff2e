"""What ranks do in tests/distributed/test_failures.py: calls that end badly on one rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import attnrt
from attnrt.backends.reference import Reference
from attnrt.distributed import context_parallel_attention
from attnrt.environment import Environment

TIMEOUT = 4.0
"""Of the groups that break, in seconds."""


def ended(call: Callable[[], Any]) -> tuple[str, str, float]:
    """(type, text and notes, seconds) of a call's exception."""
    begun = time.monotonic()
    try:
        call()
    except Exception as error:
        text = "\n".join((str(error), *getattr(error, "__notes__", ())))
        return type(error).__name__, text, time.monotonic() - begun
    return "", "", time.monotonic() - begun


def shards(**changes: Any) -> list[torch.Tensor]:
    options = {"heads": 4, "length": 8, "dim": 8, "dtype": torch.float32} | changes
    return [
        torch.randn(1, options["heads"], options["length"], options["dim"]).to(options["dtype"]).requires_grad_()
        for _ in range(3)
    ]


def mismatched() -> dict[str, tuple[str, str, float]]:
    """One difference after the other on rank 1; between them a call that all agree on: nothing is stuck."""
    group = dist.group.WORLD
    assert group is not None
    odd = group.rank() == 1
    found = {}

    def call(method: str = "ring", tensors: Any = None, **options: Any) -> Any:
        q, k, v = tensors or shards()
        return context_parallel_attention(q, k, v, mesh=group, **{"causal": True, "method": method, **options})

    cases: dict[str, Callable[[], Any]] = {
        "causal": lambda: call(causal=not odd),
        "window": lambda: call(window=(3 if odd else 4, 0)),
        "method": lambda: call("gather" if odd else "ring"),
        "placement": lambda: call(placement="zigzag" if odd else "contiguous"),
        "dtype": lambda: call(tensors=shards(dtype=torch.bfloat16 if odd else torch.float32)),
        "heads": lambda: call(tensors=shards(heads=2 if odd else 4)),
        "gradients": lambda: call(tensors=[t.detach() for t in shards()] if odd else None),
        "scale": lambda: call(scale=0.1 if odd else None),
        "backend": lambda: call(backend="reference" if odd else None),
        "bad shape": lambda: call(tensors=[*shards()[:2], torch.randn(1, 4, 9, 8)] if odd else None),
        "bad argument on every rank": lambda: call(window=(-1, 0)),
        "unknown method": lambda: call("spiral"),
        "uneven zigzag": lambda: call(placement="zigzag", tensors=shards(length=4 if odd else 8)),
        "heads not divisible": lambda: call("ulysses", tensors=shards(heads=5)),
    }
    for name, case in cases.items():
        found[name] = ended(case)
        assert call().shape == (1, 4, 8, 8)
    with attnrt.override(disable=("torch",) if odd else ()):
        found["disabled"] = ended(call)

    class Extra(attnrt.Backend):
        name, title, prefix = "extra", "Extra", "EXTRA"

    if odd:
        attnrt.register_backend(Extra())
    found["registered"] = ended(call)
    if odd:
        attnrt.unregister_backend("extra")
    assert call().shape == (1, 4, 8, 8)
    here = Environment.detect("cpu")
    packages = tuple((n, "9.9.9" if n == "triton" else v) for n, v in here.packages) if odd else here.packages
    with mock.patch.object(Environment, "detect", staticmethod(lambda device=None: replace(here, packages=packages))):
        found["installed"] = ended(call)
    if odd:
        attnrt.refresh()
    found["refreshed"] = ended(call)
    return found


def everything(keep: str) -> dict[str, Any]:
    """All ways to end badly, each on a group of its own; in the end rank 1 goes away, leaving its results in a file."""
    names = ("absent", "kernel", "killed before a call", "killed before a gather's backward", "killed in a ring")
    groups = {name: dist.new_group(timeout=timedelta(seconds=TIMEOUT)) for name in names}
    found: dict[str, Any] = mismatched()
    rank = dist.get_rank()
    if rank == 1:
        time.sleep(TIMEOUT + 2)
    else:
        found["absent"] = ended(lambda: attend("gather", groups["absent"]))
    dist.barrier()  # over the default group, which has time
    found["kernel"] = broken_kernel(groups["kernel"])
    dist.barrier()
    outs = {
        "killed before a gather's backward": attend("gather", groups["killed before a gather's backward"]),
        "killed in a ring": attend("ring", groups["killed in a ring"]),
    }
    attend("ring", groups["killed before a call"])
    dist.barrier()
    if rank == 1:
        torch.save(found, f"{keep}/partial.pt")
        os._exit(7)
    found["killed before a call"] = ended(lambda: attend("ring", groups["killed before a call"]))
    for name, out in outs.items():
        found[name] = ended(lambda out=out: out.sum().backward())  # type: ignore[misc]
    torch.save(found, f"{keep}/found{rank}.pt")
    os._exit(0)  # the default group is broken


def attend(method: str, group: Any, backend: str | None = None) -> torch.Tensor:
    q, k, v = shards()
    return context_parallel_attention(q, k, v, mesh=group, method=method, backend=backend)


def broken_kernel(group: Any) -> tuple[str, str, float]:
    """Rank 1's kernel raises while it runs."""

    def fail(*args: Any) -> Any:
        raise RuntimeError("a kernel fault")

    kept = Reference.pair
    if dist.get_rank() == 1:
        Reference.pair = lambda *args: (fail, fail)  # type: ignore[method-assign,assignment]
    try:
        return ended(lambda: attend("ring", group, "reference").sum().backward())
    finally:
        Reference.pair = kept  # type: ignore[method-assign]
