"""Attention modules on `attnrt.attention`: the core alone, with projections, with a KV cache; configured by YAML.

>>> import torch
>>> from attnrt.nn import AttentionConfig, SelfAttention
>>> config = AttentionConfig(hidden_size=64, num_attention_heads=8, num_query_groups=2)
>>> SelfAttention(config)(torch.randn(1, 16, 64)).shape
torch.Size([1, 16, 64])
"""

from attnrt.nn.attention import CrossAttention, SelfAttention
from attnrt.nn.cache import CacheStep, KVCache
from attnrt.nn.config import AttentionConfig, ModelConfig, RopeScaling, load_config, model_names
from attnrt.nn.core import DotProductAttention
from attnrt.nn.megatron import (
    fuse_kv,
    fuse_qkv,
    load_megatron,
    megatron_state,
    merge_tensor_parallel,
    split_kv,
    split_qkv,
    split_tensor_parallel,
)
from attnrt.nn.paged_cache import PagedKVCache
from attnrt.nn.rotary import RotaryEmbedding, apply_rotary

__all__ = [
    "AttentionConfig",
    "CacheStep",
    "CrossAttention",
    "DotProductAttention",
    "KVCache",
    "ModelConfig",
    "PagedKVCache",
    "RopeScaling",
    "RotaryEmbedding",
    "SelfAttention",
    "apply_rotary",
    "fuse_kv",
    "fuse_qkv",
    "load_config",
    "load_megatron",
    "megatron_state",
    "merge_tensor_parallel",
    "model_names",
    "split_kv",
    "split_qkv",
    "split_tensor_parallel",
]
