"""Small randomly initialised models of transformers, each with another kind of attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

LENGTH = 17
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 98, "vocab_size": 99}
DECODER = {
    **TOKENS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TWO_STACKS = {
    **TOKENS,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}
CHUNKED = {
    "head_dim": 8,
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 64,
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "no_rope_layers": [1, 0, 1],
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral, sliding window": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 7}),
    "qwen2, window in some layers": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**DECODER, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3, q and k norms": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "gemma2, softcap": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
            "layer_types": MIXED,
        },
    ),
    "gpt-oss, sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": MIXED,
        },
    ),
    "llama4, chunks": ("Llama4ForCausalLM", "Llama4TextConfig", {**DECODER, **CHUNKED}),
    "deepseek v3, latent attention": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**DECODER, **LATENT, **EXPERTS, "num_key_value_heads": 6, "first_k_dense_replace": 1},
    ),
    "bart, cross-attention": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**TWO_STACKS, "max_position_embeddings": 128},
    ),
    "t5, position bias": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**TOKENS, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 6, "decoder_start_token_id": 0},
    ),
    "bert, bidirectional": ("BertForMaskedLM", "BertConfig", DECODER),
    "modernbert, two-sided window": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**DECODER, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
ENCODERS = ("bert, bidirectional", "modernbert, two-sided window")
WITHOUT_SDPA = ("gemma2, softcap", "gpt-oss, sinks")
"""transformers itself refuses these to sdpa."""


def make(name: str) -> Any:
    """A model in evaluation mode, its weights large enough that attention is far from uniform."""
    model, config, fields = FAMILIES[name]
    torch.manual_seed(0)
    found = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    for parameter in found.parameters():
        parameter.data.mul_(2 if parameter.ndim > 1 else 1)
        if parameter.ndim == 1 and parameter.shape == (6,):  # sinks
            torch.nn.init.normal_(parameter)
    return found


def padding(kind: str) -> Tensor | None:
    """(3, LENGTH), 1 where a token is."""
    if kind == "none":
        return None
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    for row, count in ((0, 5), (1, 2)):
        mask[row, slice(count) if kind == "left" else slice(-count, None)] = 0
    return mask


def inputs(model: Any, kind: str) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, 98, (3, LENGTH))
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": padding(kind)}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = ids[:, :9]
    return found
