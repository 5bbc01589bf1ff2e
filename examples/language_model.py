"""A small decoder-only language model on `attnrt.nn`, and the same with its attention swapped, to compare with.

Not a script: train_gqa.py, decode.py and benchmarks/model.py use it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnrt.nn import CacheStep, ModelConfig, SelfAttention


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], step: CacheStep | None) -> Tensor:
        x = x + self.attention(self.input_norm(x), rotary=rotary, step=step)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """(B, S) token ids to (B, S, vocabulary) logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if config.share_embeddings_and_output_weights:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, step: CacheStep | None = None) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device) if step is None else step.positions
        rotary = self.blocks[0].attention.rotary(positions)  # the same for every layer
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotary, step)
        return self.output(self.norm(x))


class Eager(nn.Module):
    """Causal attention as plain matrix products, in the place of `DotProductAttention`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None = None, **_: Any) -> Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(-2)


class SDPA(nn.Module):
    """PyTorch's scaled_dot_product_attention, as a model without attnrt would call it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: None = None, **_: Any) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(-2)


def with_attention(model: LanguageModel, core: type[nn.Module]) -> LanguageModel:
    """The model itself, each layer's core attention replaced. Weights stay: the cores have none."""
    for block in model.blocks:
        block.attention.core_attention = core()
    return model
