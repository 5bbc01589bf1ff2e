"""attnrt.nn's layers with the weights of transformers' give transformers' outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnrt.nn import AttentionConfig, RopeScaling, RotaryEmbedding, SelfAttention, fuse_qkv

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from families import DECODER  # noqa: E402

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "theirs", "ours"),
    [
        ("Llama", {}, {}),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}}, "llama3"),
        ("Qwen3", {"head_dim": 12}, {"kv_channels": 12, "qk_layernorm": True, "layernorm_epsilon": 1e-6}),
        ("Mistral", {"sliding_window": 5}, {"window_size": (4, 0)}),
    ],
)
def test_the_same_layer(kind: str, theirs: dict[str, Any], ours: Any) -> None:
    torch.manual_seed(0)
    fields = {**DECODER, "num_hidden_layers": 1, **theirs}
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="eager").eval()
    layer = model.layers[0].self_attn
    if ours == "llama3":
        ours = {"rotary_base": 5e5, "rope_scaling": RopeScaling(type="llama3", **SCALING)}
    mine = AttentionConfig(hidden_size=48, num_attention_heads=6, num_query_groups=2, **ours)
    module = SelfAttention(mine).eval()
    assert module.rotary is not None
    torch.testing.assert_close(module.rotary.inv_freq, model.rotary_emb.inv_freq)
    parts = (layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight)
    module.linear_qkv.weight.data = fuse_qkv(*parts, groups=2).detach()
    module.linear_proj.weight.data = layer.o_proj.weight.detach()
    if mine.qk_layernorm:
        for norm, source in ((module.q_layernorm, layer.q_norm), (module.k_layernorm, layer.k_norm)):
            torch.nn.init.normal_(source.weight)
            norm.weight.data = source.weight.detach()  # type: ignore[union-attr]
    x = torch.randn(2, 17, 48)
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    if kind == "Mistral":
        seen = seen.triu(-4)
    mask = torch.zeros(1, 1, 17, 17).masked_fill(~seen, torch.finfo(torch.float32).min)
    rotary = model.rotary_emb(x, torch.arange(17)[None])
    want = layer(x, position_embeddings=rotary, attention_mask=mask)[0]
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)


def test_linear_scaling_of_frequencies() -> None:
    parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    config = transformers.LlamaConfig(**{**DECODER, "rope_parameters": parameters})
    theirs = transformers.LlamaModel(config).rotary_emb.inv_freq
    ours = RotaryEmbedding(8, scaling=RopeScaling(type="linear", factor=4.0)).inv_freq
    torch.testing.assert_close(ours, theirs)
