"""Compiles what our rules say flash-attn 4 takes, through the adapter, with fake tensors: no GPU, no driver.

    python tests/backends/flash_attn/compiling.py --arch sm90 [--full] [--part 0/2] [--refused]

Each line is a request and how it went; the exit code is the number of surprises. What is compiled is real machine code
for the real arch; that it gives the right numbers is for tests/gpu/test_flash_attn.py.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, partialmethod
from itertools import product
from typing import Any

CODE = {"sm90": ("sm_90a", 132), "sm100": ("sm_100a", 148)}
"""What is compiled for, and how many SMs such a GPU has."""
SAMPLE = 16
"""Requests for each arch and direction in the short run."""


def target(arch: str) -> None:
    """The GPU that flash-attn 4 shall think it is on. It reads this when it is imported."""
    code, sms = CODE[arch]
    os.environ |= {"CUTE_DSL_ARCH": code, "FLASH_ATTENTION_ARCH": code, "FLASH_ATTENTION_NUM_SMS": str(sms)}


def pretend(arch: str) -> None:
    """What else it asks a driver: which device is current, how many SMs it has, and how many clusters fit."""
    import torch
    from cutlass.utils import HardwareInfo
    from flash_attn.cute import interface

    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    sms = CODE[arch][1]
    HardwareInfo.__init__ = lambda self, device_id=0: None
    HardwareInfo.get_device_multiprocessor_count = lambda self: sms
    HardwareInfo.get_max_active_clusters = lambda self, cluster_size, stream=None: sms // cluster_size
    if arch == "sm90":
        from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
        from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90

        for kernel in (FlashAttentionForwardSm90, FlashAttentionBackwardSm90):
            kernel._get_shared_storage_cls = partialmethod(fitting, kernel._get_shared_storage_cls)
    for function in (interface.FlashAttnFunc, interface.FlashAttnVarlenFunc):
        function.apply = partial(by_hand, function)


def fitting(kernel: Any, storage_of: Any) -> Any:
    """The layout of shared memory, if a GPU would launch the kernel with it: that is seen at the launch alone."""
    from attnrt.backends.flash_attn.fa4_sm90 import SHARED

    storage = storage_of(kernel)
    if (size := storage.size_in_bytes()) > SHARED:
        raise MemoryError(f"{type(kernel).__name__} asks for {size} bytes of shared memory, over {SHARED}")
    return storage


class Context:
    """What autograd would keep between forward and backward. Its own asks for a device even of fake tensors."""

    saved_tensors: tuple[Any, ...] = ()
    backward: Any = None
    last: Context

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass


def by_hand(function: Any, *arguments: Any) -> Any:
    """`function.apply(*arguments)` without autograd."""
    Context.last = context = Context()
    context.backward = function.backward
    return function.forward(context, *arguments)


DIMS = (8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 112, 128, 136, 152, 160, 176, 192, 200, 224, 248, 256)
PAIRS = tuple(product((64, 72, 96, 128, 192, 256), (32, 64, 72, 96, 128, 160, 192, 256)))
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window": (100, 0)},
    {"window": (100, 50)},
    {"window": (100, None)},
    {"window": (None, 50)},
)
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"packed": True},
    {"seqlen_q": 64, "seqlen_kv": 64},
    {"seqlen_q": 1, "alignment": "bottom_right"},
    {"seqlen_q": 300, "alignment": "bottom_right"},
    {"padded": "kv", "seqlen_q": 1, "alignment": "bottom_right"},
    {"padded": "kv", "seqlen_q": 7, "alignment": "bottom_right"},
    {"page_size": 16, "seqlen_q": 1, "alignment": "bottom_right"},
    {"page_size": 64, "seqlen_q": 500, "alignment": "bottom_right"},
)
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 30.0},
    {"sinks": True},
    {"return_lse": True},
    {"sinks": True, "return_lse": True},
    {"deterministic": True},
    {"dtype": "fp16"},
)


def requests(training: bool) -> Iterator[Any]:
    """Every combination of the axes above that makes a request."""
    from attnrt.errors import AttnrtError
    from attnrt.request import AttentionRequest

    dims = [(d, d) for d in DIMS] + [p for p in PAIRS if p[0] != p[1]]
    for (dim, dim_v), mask, kind, extra, heads_kv in product(dims, MASKS, KINDS, EXTRAS, (8, 2)):
        if training and ("padded" in kind or "page_size" in kind):
            continue
        sizes: dict[str, Any] = {"batch": 2, "heads_q": 8, "heads_kv": heads_kv, "seqlen_q": 1024, "seqlen_kv": 1024}
        try:
            yield AttentionRequest.from_shape(
                **(sizes | kind | mask | extra), head_dim=dim, head_dim_v=dim_v, training=training
            )
        except AttnrtError:  # an alignment that the combination needs and has not
            continue


def sample(arch: str, count: int | None, refused: bool) -> list[Any]:
    """Those that our rules take, spread over the axes, the same ones each time. With `refused`, those that one rule
    alone refuses because the package asserts or does not compile; others refuse what compiles and is not right."""
    from attnrt.backends.base import reasons
    from attnrt.backends.flash_attn import FlashAttention4
    from attnrt.backends.flash_attn.fa4_rules import API, COMPILED, RULES
    from attnrt.environment import Environment

    backend, there = FlashAttention4(), Environment.simulate(arch)
    uncompiled = {rule.id for rule in RULES if rule.source in (API, COMPILED)}
    chosen: list[Any] = []
    for training in (False, True):
        found: dict[str, list[Any]] = {}
        for r in requests(training):
            broken = reasons(backend.all_rules, r, there)
            if refused and len(broken) == 1 and broken[0].rule in uncompiled:
                found.setdefault(broken[0].rule, []).append(r)
            elif not refused and not broken:
                found.setdefault("", []).append(r)
        for rule, those in sorted(found.items()):
            shuffled = random.Random(f"{rule}{training}").sample(those, len(those))
            chosen += _spread(shuffled, 3 if refused and count else count)
    return chosen


def _spread(those: list[Any], count: int | None) -> list[Any]:
    """`count` of them, each time the one that shares least with those already taken."""
    if count is None or count >= len(those):
        return those
    pool, taken = those[: 60 * count], []
    seen: dict[Any, int] = {}
    for _ in range(count):
        best = min(range(len(pool)), key=lambda i: sum(seen.get(t, 0) for t in _traits(pool[i])))
        taken.append(pool.pop(best))
        for trait in _traits(taken[-1]):
            seen[trait] = seen.get(trait, 0) + 1
    return taken


def _traits(r: Any) -> tuple[Any, ...]:
    kind = (r.packed, r.padded_kv, r.page_size, r.seqlen_q)
    band = (r.causal, r.window)
    extra = (r.softcap, r.sinks, r.needs_lse, r.deterministic, r.dtype)
    dims = (r.head_dim_qk, r.head_dim_v)
    return ("d", dims), ("k", kind), ("b", band), ("e", extra), ("g", r.group), ("kb", kind, band), ("db", dims, band)


def compile_one(r: Any, arch: str) -> None:
    """Forward, and backward if there is one. Raises what flash-attn 4 raises."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from attnrt.backends.flash_attn import fa4
    from attnrt.backends.flash_attn.discovery import Library, load
    from attnrt.environment import Environment
    from attnrt.operands import Operands

    there = replace(Environment.simulate(arch), simulated=False)
    library = load(4, there.version("flash-attn-4") or "")
    assert isinstance(library, Library), library
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[r.dtype]
    with FakeTensorMode(), torch.no_grad():

        def tensor(*shape: int, dtype: Any = dtype, grad: bool = r.needs_grad) -> Any:
            return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_(grad)

        def integers(*shape: int) -> Any:
            return tensor(*shape, dtype=torch.int32, grad=False)

        front_q, front_kv = ((r.tokens_q,), (r.tokens_kv,)) if r.packed else ((2, r.seqlen_q), (2, r.seqlen_kv))
        if r.paged:
            front_kv = (40, r.page_size)
        q = tensor(*front_q, r.heads_q, r.head_dim_qk)
        k, v = (tensor(*front_kv, r.heads_kv, d) for d in (r.head_dim_qk, r.head_dim_v))
        operands = Operands(
            sinks=tensor(r.heads_q, dtype=torch.float32) if r.sinks else None,
            seqlens_kv=integers(2) if r.padded_kv else None,
            cu_seqlens_q=integers(3) if r.packed else None,
            cu_seqlens_kv=integers(3) if r.packed else None,
            page_table=integers(2, r.seqlen_kv // r.page_size) if r.paged else None,
        )
        out = fa4.attend(r, there, library)(q, k, v, operands)[0]
        if r.needs_grad:
            lse_grad = torch.empty((r.heads_q, r.tokens_q) if r.packed else (2, r.heads_q, r.seqlen_q), device="cuda")
            context = Context.last
            context.backward(context, torch.empty_like(out), lse_grad if fa4.sinks_by_lse(r) else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=CODE, required=True)
    parser.add_argument("--full", action="store_true", help="every combination, in random order: hours")
    parser.add_argument("--count", type=int, default=SAMPLE)
    parser.add_argument("--part", default="0/1", help="0/2: the first of two halves")
    parser.add_argument("--refused", action="store_true", help="those that one rule refuses: they should not compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that long")
    options = parser.parse_args()
    target(options.arch)
    warnings.filterwarnings("ignore")
    chosen = sample(options.arch, None if options.full else options.count, options.refused)
    part, parts = map(int, options.part.split("/"))
    chosen = random.Random(0).sample(chosen, len(chosen))[part::parts]
    pretend(options.arch)
    surprises, start = 0, time.monotonic()
    for number, r in enumerate(chosen):
        if time.monotonic() - start > options.seconds:
            print(f"stopped after {number} of {len(chosen)}")
            break
        begun, said = time.monotonic(), "compiles"
        try:
            compile_one(r, options.arch)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if os.environ.get("TRACEBACK"):
                traceback.print_exc()
        surprise = (said == "compiles") == options.refused
        surprises += surprise
        print(f"{'!!' if surprise else 'ok'} {time.monotonic() - begun:5.1f} s  {r.describe()}: {said}", flush=True)
    print(f"{surprises} surprises in {len(chosen)} requests, {time.monotonic() - start:.0f} s")
    sys.exit(min(surprises, 100))


if __name__ == "__main__":
    main()
