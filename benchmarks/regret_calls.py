"""The calls that benchmarks/regret.py learns from and judges by: two sets of each class, with no call in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from attnrt.evidence.calls import Call


@dataclass(frozen=True)
class Grid:
    """Calls of one class: those to tune on, and those to judge by."""

    name: str
    learned: tuple[Call, ...]
    judged: tuple[Call, ...]


def lengths(
    name: str, sizes: dict[str, Any], learned: Iterable[int], judged: Iterable[int], key: str = "seqlen_q"
) -> Grid:
    def calls(values: Iterable[int]) -> tuple[Call, ...]:
        return tuple(Call(**{**sizes, key: n}) for n in values)

    return Grid(name, calls(learned), calls(judged))


def cpu_grids(quick: bool) -> Iterator[Grid]:
    for dtype in ("fp32", "bf16"):
        for head_dim in (64,) if quick else (64, 128):
            heads = {"heads_q": 8, "heads_kv": 2, "head_dim": head_dim, "dtype": dtype, "layout": "bhsd"}
            said = f"{dtype} D{head_dim}"
            for causal in (True, False):
                sizes = {**heads, "causal": causal}
                kind = f"{said} {'causal' if causal else 'full'}"
                yield lengths(f"prefill {kind}", sizes, (32, 128, 512), (64, 96, 256, 384))
                yield lengths(f"training {kind}", {**sizes, "training": True}, (32, 64, 128, 512), (48, 96, 256, 384))
            for batch in (1, 8):
                decode = {**heads, "batch": batch, "seqlen_q": 1}
                yield lengths(f"decode {said}", decode, (256, 1024, 4096, 8192), (512, 2048, 6144), "seqlen_kv")


def cuda_grids(quick: bool) -> Iterator[Grid]:
    """In order of worth: a run that is cut short has the first."""
    gqa: dict[str, Any] = {"heads_q": 32, "heads_kv": 8, "head_dim": 128}
    mha: dict[str, Any] = {"heads_q": 16, "heads_kv": 16, "head_dim": 64, "batch": 4}
    causal: dict[str, Any] = {**gqa, "causal": True}
    training: dict[str, Any] = {**causal, "training": True}
    yield lengths("prefill GQA D128 causal", causal, (512, 2048, 8192, 32768), (256, 1024, 4096, 16384))
    yield lengths("training GQA D128 causal", training, (512, 2048, 8192), (256, 1024, 4096, 16384))
    for batch, judged in ((1, (4096, 32768)), (16, (2048, 16384))):
        decode = {**gqa, "batch": batch, "seqlen_q": 1}
        yield lengths(f"decode GQA D128 B{batch}", decode, (1024, 8192, 65536), judged, "seqlen_kv")
    if quick:
        return
    d64 = {**mha, "causal": True, "training": True}
    yield lengths("training MHA D64 causal", d64, (512, 4096), (1024, 2048))
    yield lengths("prefill MHA D64 full", mha, (256, 1024, 4096), (512, 2048))
    yield lengths("prefill GQA D128 window 1k", {**causal, "window": (1023, 0)}, (4096, 16384), (8192,))
    yield lengths("training packed D128 causal", {**training, "packed": True, "batch": 8}, (512, 2048), (1024,))
    padded = {**causal, "padded": True, "batch": 8, "layout": "bshd"}
    yield lengths("prefill padded D128 causal", padded, (512, 2048), (1024,))
    large = {"heads_q": 16, "heads_kv": 8, "head_dim": 256, "causal": True}
    yield lengths("training D256 causal", {**large, "training": True}, (1024, 4096), (2048,))
    yield lengths("training dropout D128 causal", {**training, "dropout_p": 0.1}, (1024, 4096), (2048,))
    yield lengths("prefill GQA D128 full", {**gqa, "batch": 4}, (512, 2048, 8192), (1024, 4096))
    yield lengths("training deterministic D128", {**training, "deterministic": True}, (1024, 4096), (2048,))
    yield lengths("prefill D256 softcap", {**large, "softcap": 50.0}, (1024, 4096), (2048,))
    mla = {"heads_q": 128, "head_dim": 192, "head_dim_v": 128, "causal": True}
    yield lengths("prefill MLA 192/128", mla, (1024, 4096), (2048,))
    yield lengths("prefill MHA D64 bias", {**mha, "bias": True}, (512, 2048), (1024,))
