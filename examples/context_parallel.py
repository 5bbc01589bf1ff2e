"""Train the small language model with every sequence cut across processes, and check that nothing else changes.

    python examples/context_parallel.py [--ranks 2 4] [--steps 10] [--method auto] [--placement zigzag]

Each process holds its share of the tokens and all of the weights. One process trains on whole sequences first; then,
from the same start and on the same batches, 2 and 4 of them on gloo. The losses must agree to float32's rounding.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from language_model import LanguageModel, with_attention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from train_gqa import BATCH, LENGTH, RATE, batches

from attnrt.distributed import context_parallel_attention, last_decision, local_positions, shard
from attnrt.nn import ModelConfig

CONFIG = {
    "num_query_groups": 4,
    "num_attention_heads": 8,
    "hidden_size": 64,
    "num_layers": 2,
    "ffn_hidden_size": 192,
    "vocab_size": 256,
    "max_position_embeddings": LENGTH,
}
ALLOWED = 2e-5
"""Largest relative difference between losses: float32 sums in another order, over some steps of training."""


class SharedAttention(nn.Module):
    """Causal attention over a sequence that the mesh's ranks share, in the place of `DotProductAttention`."""

    def __init__(self, mesh: DeviceMesh, method: str, placement: str) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"mesh": mesh, "method": method, "placement": placement}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None = None, **_: Any) -> Tensor:
        return context_parallel_attention(q, k, v, layout="bshd", causal=True, **self.options).flatten(-2)


class SharedModel(LanguageModel):
    """The language model on one rank's tokens: only their positions have to be told, all else is token by token."""

    def __init__(self, config: ModelConfig, mesh: DeviceMesh, method: str, placement: str) -> None:
        super().__init__(config)
        self.mesh, self.placement = mesh, placement
        with_attention(self, lambda: SharedAttention(mesh, method, placement))

    def forward(self, tokens: Tensor, step: None = None) -> Tensor:
        rotary = self.blocks[0].attention.rotary(local_positions(LENGTH, self.mesh, self.placement))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotary, None)
        return self.output(self.norm(x))


def train(model: LanguageModel, data: Tensor, mesh: DeviceMesh | None = None, placement: str = "") -> list[float]:
    """The loss of each step. With a mesh, of this rank's tokens, then summed: gradients too."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    losses = []
    for batch in data:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if mesh is not None:
            inputs, targets = (shard(x, mesh, 1, placement) for x in (inputs, targets))
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if mesh is not None:
            for summed in (loss, *(p.grad for p in model.parameters())):
                dist.all_reduce(summed)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return losses


def rank_of(rank: int, ranks: int, folder: str, options: argparse.Namespace) -> None:
    """One process of several."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    torch.manual_seed(0)
    model = SharedModel(ModelConfig(**CONFIG), mesh, options.method, options.placement)
    losses = train(model, batches(options.steps, torch.device("cpu")), mesh, options.placement)
    decision = last_decision()
    if rank == 0 and decision is not None:
        torch.save((losses, decision.method, decision.backends), f"{folder}/{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--method", default="auto", choices=("auto", "gather", "ulysses", "ring"))
    parser.add_argument("--placement", default="zigzag", choices=("contiguous", "zigzag"))
    options = parser.parse_args()
    torch.manual_seed(0)
    alone = train(LanguageModel(ModelConfig(**CONFIG)), batches(options.steps, torch.device("cpu")))
    print(f"1 process: loss {alone[0]:.6f} to {alone[-1]:.6f} in {options.steps} steps")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            mp.spawn(rank_of, (ranks, folder, options), ranks)
            losses, method, backends = torch.load(Path(folder) / f"{ranks}.pt", weights_only=False)
            apart = max(abs(a - b) / a for a, b in zip(alone, losses, strict=True))
            worst = max(worst, apart)
            by = f"{method} on {', '.join(backends)}"
            print(f"{ranks} ranks, {by}: loss {losses[0]:.6f} to {losses[-1]:.6f}, at most {apart:.1e} apart")
    if worst > ALLOWED:
        raise SystemExit(f"losses differ by {worst:.1e}, over {ALLOWED:.0e}")


if __name__ == "__main__":
    main()
