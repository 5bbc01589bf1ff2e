"""Modules that call attention() under DDP and FSDP2, two gloo processes on the CPU, eager and compiled."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import attnrt

HEADS, DIM, WIDTH, LENGTH, BATCH, RANKS = 4, 8, 32, 12, 4, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in self.qkv(x).chunk(3, -1))
        attended = attnrt.attention(q, k, v, layout="bshd", causal=True, sinks=self.sinks)
        return x + self.out(attended.flatten(2))  # type: ignore[no-any-return]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def batch() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def trained(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Each parameter's gradient after two steps of accumulation, by its name in the bare model."""
    for _ in range(2):
        module(x).square().mean().backward()
    named = module.named_parameters()
    return {
        n.removeprefix("_orig_mod.").removeprefix("module."): p.grad.clone() for n, p in named if p.grad is not None
    }


def work(rank: int, folder: str) -> None:
    """One process: all four ways, each gradient saved in full."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    x = batch().chunk(RANKS)[rank]
    found: dict[str, Any] = {}
    for compiled in (False, True):
        for way in ("ddp", "fsdp2"):
            torch._dynamo.reset()
            module: nn.Module = model()
            if way == "fsdp2":
                mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
                for block in module.children():
                    if compiled:
                        block.compile(backend="aot_eager")
                    fully_shard(block, mesh=mesh)
                module = fully_shard(module, mesh=mesh)
            else:
                module = DistributedDataParallel(module)
                module = torch.compile(module, backend="aot_eager") if compiled else module  # type: ignore[assignment]
            grads = trained(module, x)
            full = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
            decision = attnrt.last_decision()
            assert decision is not None
            found[f"{way}, {'compiled' if compiled else 'eager'}"] = (full, decision.request.compiled)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data_parallel")
    sys.path.insert(0, str(Path(__file__).parent))  # the children import this file by its name
    mp.spawn(work, args=(str(folder),), nprocs=RANKS)
    return torch.load(folder / "found.pt")  # type: ignore[no-any-return]


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(found: dict[str, Any], way: str, compiled: str) -> None:
    want = trained(model(), batch())
    got, was_compiled = found[f"{way}, {compiled}"]
    assert was_compiled == (compiled == "compiled")
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
