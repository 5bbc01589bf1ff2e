"""Split-KV decoding: the machine code for GPUs that need not be here, and how many splits a call gets. Its numerics are
in `decode_numerics.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from attnrt.backends.base import reasons
from attnrt.request import AttentionRequest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


# --- Machine code ------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"causal": True, "window": (3000, 0), "alignment": "bottom_right", "softcap": 30.0}
EVERYTHING["operands"] = ("alibi_slopes", "sinks", "seqlens_kv")
CALLS: dict[str, dict[str, Any]] = {
    "MHA": {"heads": (8, 8)},
    "GQA": {"heads": (64, 8)},
    "32 rows": {"heads": (32, 8), "seqlen_q": 8},
    "64 rows": {"heads": (64, 1)},
    "everything": {"heads": (64, 8), **EVERYTHING},
}


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm90", "sm100"])
def test_machine_code(arch: str, dims: tuple[int, int]) -> None:
    """No spills, within the shared memory, and K and V fetched 16 bytes at a time without waiting."""
    from test_codegen import codegen

    for name, options in CALLS.items():
        with codegen().recorded(int(arch[2:])) as found:
            given = {"seqlen_q": 1, "seqlen_kv": 4096, "training": False} | options
            codegen().run_call(arch, dims, **given)
        kernels = dict(found)
        assert set(kernels) == {"attend_split", "merge"}, name
        for kernel in kernels.values():
            usage = codegen().tool("cuobjdump", "-res-usage", binary=kernel.asm["cubin"])
            assert "STACK:0" in usage, (name, usage)
            assert kernel.metadata.shared <= codegen().SHARED_LIMIT[arch] << 10, (name, kernel.metadata.shared)
        copies = [x for x in kernels["attend_split"].asm["ptx"].splitlines() if "cp.async.c" in x and ".global" in x]
        assert copies and all("0x10" in x for x in copies), name


# --- Splits ------------------------------------------------------------------------------------------------------


def request(**sizes: Any) -> AttentionRequest:
    given: dict[str, Any] = {"heads_q": 64, "heads_kv": 8, "seqlen_q": 1, "head_dim": 128}
    return AttentionRequest.from_shape(**(given | sizes))


def decodes(r: AttentionRequest) -> bool:
    """Whether the decode kernel takes it, by its rules."""
    from attnrt.backends.triton import Decode
    from attnrt.environment import Environment

    return not reasons(Decode().all_rules, r, Environment.named("h200"))


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 8, 16, 33, 48, 64, 200])
@pytest.mark.parametrize("keys", [32 << 10, 128 << 10])
def test_splits_fill_the_gpu(batch: int, keys: int) -> None:
    from attnrt.backends.triton.decode import resident, split_count
    from attnrt.backends.triton.tiles import Tile

    for heads_kv in (1, 8, 64):
        r = request(batch=batch, seqlen_kv=keys, heads_kv=heads_kv)
        tile = Tile(64, 64, 4, 4)
        splits = split_count(r, tile, 132)
        waves = batch * heads_kv * splits / (resident(r, tile, 90) * 132)
        wanted = 0.85 if batch * heads_kv > 1 or keys > 64 << 10 else 0.4
        assert waves / -(-waves // 1) >= wanted, (splits, waves)


def test_short_caches_are_not_split() -> None:
    from attnrt.backends.triton.decode import split_count
    from attnrt.backends.triton.tiles import Tile

    tile = Tile(64, 64, 4, 4)
    assert split_count(request(batch=1, seqlen_kv=300), tile, 132) == 1
    near = request(batch=1, seqlen_kv=1 << 17, causal=True, window=(127, 0), alignment="bottom_right")
    assert decodes(near)
    assert split_count(near, tile, 132) == 1


def test_which_requests_decode() -> None:
    from attnrt.backends.triton import TritonBackend
    from attnrt.environment import Environment

    few = {"batch": 2, "seqlen_kv": 4096}
    yes = [{}, {"seqlen_q": 8}, {"softcap": 30.0}, {"sinks": True}, {"padded": "kv"}, {"heads_q": 71, "heads_kv": 1}]
    no = [{"seqlen_q": 9}, {"training": True}, {"mask": True}, {"bias": True}, {"dropout_p": 0.1}]
    for options in yes + no:
        r = request(**(few | options))
        assert not reasons(TritonBackend().all_rules, r, Environment.named("h200"))
        assert decodes(r) == (options in yes), options
