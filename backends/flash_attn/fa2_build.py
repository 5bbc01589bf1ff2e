"""What the flash-attn 2 here was compiled without, read from its file: a build takes an hour, so people cut it down.

Kernels are templates, and each instance for a direction, head dim and dtype is a function with a name of its own. What
its sources can leave out as a whole (`FLASHATTENTION_DISABLE_...`) leaves a sentence in the file that says so.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from attnrt.backends.base import Reason
from attnrt.backends.flash_attn.fatbin import sections
from attnrt.request import AttentionRequest

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Sizes that it has kernels for; others take the next."""
_KERNEL = re.compile(rb"run_mha_(fwd_splitkv|fwd|bwd)\w*?IN7cutlass\d+(half|bfloat16)_tELi(\d+)E")
_SENTENCE = re.compile(rb"This flash attention build does not support ([a-z ]+)")
_DTYPES = {b"half": "fp16", b"bfloat16": "bf16"}
_WORDS = {"fwd": "the forward", "fwd_splitkv": "the split forward", "bwd": "the backward"}


@dataclass(frozen=True)
class Build:
    """kernels: (direction, head dim, dtype), none where the names were stripped. left_out: features in its words."""

    kernels: frozenset[tuple[str, int, str]]
    left_out: frozenset[str]


@lru_cache(maxsize=16)
def build(path: Path, _changed: int) -> Build:
    """Read once for each time of change.

    Raises:
        OSError: it cannot be opened.
    """
    kernels, left_out = set(), set()
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return Build(frozenset(), frozenset())
        with data:
            try:
                for start, end in sections(data, b".dynstr"):
                    for direction, dtype, dim in _KERNEL.findall(data[start:end]):
                        kernels.add((direction.decode(), int(dim), _DTYPES[dtype]))
                for start, end in sections(data, b".rodata"):
                    left_out |= {words.decode() for words in _SENTENCE.findall(data[start:end])}
            except (struct.error, IndexError):  # cut short, or another format
                pass
    return Build(frozenset(kernels), frozenset(left_out))


def against(r: AttentionRequest, found: Build, version: str) -> tuple[Reason, ...]:
    """Reasons against a request from what the build was made without."""
    taken = next((d for d in HEAD_DIMS if r.head_dim <= d), HEAD_DIMS[-1])
    # Also a plain forward is split where it would not fill the GPU.
    directions = {"fwd_splitkv"} | (set() if r.padded or r.paged else {"fwd"}) | ({"bwd"} if r.needs_grad else set())
    lacks = [_WORDS[d] for d in sorted(directions) if found.kernels and (d, taken, r.dtype) not in found.kernels]
    missing = []
    if lacks:
        takes = "" if taken == r.head_dim else f", which head_dim {r.head_dim} takes"
        missing.append(f"{' and '.join(lacks)} for head_dim {taken} in {r.dtype}{takes}")
    wants = {
        "backward": r.needs_grad,
        "dropout": r.dropout_p > 0,
        "alibi": r.alibi is not None,
        "softcap": r.softcap is not None,
        "local attention": r.windowed,
        "headdim not being a multiple of ": r.head_dim % 32 != 0,
    }
    missing += [_PHRASES.get(words, words) for words, wanted in wants.items() if wanted and words in found.left_out]
    return tuple(
        Reason(
            "FA2_LEFT_OUT",
            f"flash-attn {version} here was built without {what}",
            "build it again with it, whole or by tools/build_flash_attn_2.py",
        )
        for what in missing
    )


_PHRASES = {
    "alibi": "ALiBi",
    "local attention": "sliding windows",
    "backward": "a backward",
    "headdim not being a multiple of ": "head dims that are not a multiple of 32",
}
