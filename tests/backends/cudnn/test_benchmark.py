"""benchmarks/cudnn_lengths.py times the calls that it names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import attnrt

PATH = Path(__file__).parents[3] / "benchmarks" / "cudnn_lengths.py"


def benchmark() -> Any:
    if (name := "attnrt_benchmarks_cudnn_lengths") not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, PATH)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.mark.parametrize("kind", ["packed", "packed twice", "padded"])
def test_batches_are_of_their_kind(kind: str) -> None:
    (batch,) = (b for b in benchmark().SMALL if b.kind == kind)
    qkv, options = benchmark().tensors(batch, "cpu")
    request = attnrt.explain(*qkv, **options).request
    assert (request.packed, request.padded) == (kind != "padded", kind == "padded")
    assert request.batch == batch.sequences and request.seqlen_q == batch.longest and request.needs_grad
    assert (options.get("cu_seqlens_q") is options.get("cu_seqlens_kv")) == (kind != "packed twice")
    out = attnrt.attention(*qkv, backend="reference", **options)
    assert isinstance(out, Tensor) and out.shape == qkv[0].shape
