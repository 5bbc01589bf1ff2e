"""`attn_implementation="attnrt"` for models of Hugging Face transformers.

    import attnrt.integrations.transformers
    attnrt.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="attnrt")

Two of transformers' public interfaces are filled: AttentionInterface, which runs the attention, and
AttentionMaskInterface, which hands the model a `StructuredMask` in place of a (B, 1, Sq, Skv) tensor. Whatever a model
passes is honoured or refused by name; see `attend`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.api import attention
from attnrt.errors import ArgumentError, ArgumentTypeError, IntegrationError
from attnrt.integrations.transformers_mask import make_mask, refuse_unknown

if TYPE_CHECKING:
    from attnrt.integrations.structured_mask import StructuredMask

SUPPORTED = ">=5.20,<6"
"""Versions of transformers whose interfaces are those that this file fills."""

MEANT_FOR_OTHERS = ("flash", "sdpa", "flex_attention", "paged", "/", "|", ":", "@", "eager")
"""Parts of a name that transformers itself gives a meaning to."""


def register(name: str = "attnrt") -> None:
    """Make `attn_implementation=name` work in transformers, in this process. Calling it again changes nothing.

    Raises:
        IntegrationError: transformers is not installed, or its version is not one of `SUPPORTED`.
        ArgumentError: `name` contains a part that transformers gives a meaning of its own.
    """
    if not isinstance(name, str) or not name or any(part in name.lower() for part in MEANT_FOR_OTHERS):
        parts = ", ".join(repr(p) for p in MEANT_FOR_OTHERS)
        raise ArgumentError("name", name, f"a name without any of {parts}, to which transformers gives a meaning")
    from packaging.specifiers import SpecifierSet

    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise IntegrationError(f"transformers is not installed: pip install 'transformers{SUPPORTED}'") from None
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise IntegrationError(f"transformers {found} is installed; {SUPPORTED} is needed")
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StructuredMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, in the form that transformers calls it.

    Args:
        query: (B, Hq, Sq, D). key: (B, Hkv, Skv, D). value: (B, Hkv, Skv, Dv); KV heads are never repeated.
        attention_mask: what `make_mask` made; or a user's own 4-D mask, (B or 1, Hq or 1, Sq, Skv), bool (True =
            attend) or floating (added), which by transformers' contract says everything, causality and windows
            included; or None, and then `is_causal` (the argument, else the module's) and `sliding_window` count.
        dropout, scaling, softcap: dropout_p, scale, softcap. s_aux: sinks. position_bias: bias, (B or 1, Hq, Sq, Skv).
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: sequences packed into one row, as
            DataCollatorWithFlattening gives them.
        others: what concerns other parts of a model (`ELSEWHERE`) is let through; anything else that is set is refused.

    Returns:
        (B, Sq, Hq, Dv), and None for the attention weights, which no fused kernel has.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be honoured; the message names it.
    """
    if output_attentions:
        raise ArgumentError(
            "output_attentions", output_attentions, "fused kernels have no weights; use attn_implementation='eager'"
        )
    if others:
        refuse_unknown(others, "attnrt's attention")
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "softcap": softcap}
    if s_aux is not None:
        options["sinks"] = s_aux
    if deterministic is not None:
        options["deterministic"] = deterministic
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        packing = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        _check_packing(attention_mask, position_bias, packing)
        options |= _band(module, attention_mask, is_causal, sliding_window, key.shape[2])
        return _packed(query, key, value, packing, options), None
    if attention_mask is None:
        options |= _unmasked(module, is_causal, sliding_window, query.shape[2], key.shape[2])
    elif isinstance(attention_mask, Tensor):
        position_bias = _add_users_mask(options, attention_mask, position_bias)
    else:
        mask = _fitting(attention_mask, query.shape[2], key.shape[2])
        _check_agreement(mask, is_causal, sliding_window)
        said = mask.arguments
        if said.packing is not None:
            cu, longest = said.packing.cu_seqlens, said.packing.longest
            if position_bias is not None:
                raise ArgumentError("position_bias", position_bias, "has no meaning across packed sequences")
            options |= {"causal": said.causal, "window": said.window}
            return _packed(query, key, value, (cu, cu, longest, longest), options), None
        if said.start or said.stop != key.shape[2]:
            key, value = key[:, :, said.start : said.stop], value[:, :, said.start : said.stop]
            if position_bias is not None and position_bias.shape[-1] > 1:
                position_bias = position_bias[..., said.start : said.stop]
        options |= {
            "causal": said.causal,
            "window": said.window,
            "alignment": said.alignment,
            "mask": said.mask,
            "seqlens_kv": said.seqlens_kv,
        }
    if position_bias is not None:
        options["bias"] = position_bias
    out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), layout="bshd", **options)
    return out.contiguous(), None


def _unmasked(
    module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None, q_length: int, kv_length: int
) -> dict[str, Any]:
    """No mask was made, as in vision towers: the module's word counts, and one query sees every key."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
        if is_causal is None and (q_length > 1 or sliding_window is not None):
            raise ArgumentError(
                "is_causal", None, f"there is no mask, and {type(module).__name__} does not say whether it is causal"
            )
    banded = (is_causal and q_length > 1) or sliding_window is not None
    if banded and q_length not in (1, kv_length):
        raise ArgumentError(
            "attention_mask", None, f"there is no mask to say where {q_length} queries stand among {kv_length} keys"
        )
    return {
        "causal": bool(is_causal) and q_length > 1,
        "window": _window(bool(is_causal), sliding_window),
        "alignment": "bottom_right",
    }


def _window(causal: bool, sliding_window: int | None) -> tuple[int, int | None] | None:
    if sliding_window is None:
        return None
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, int) or sliding_window < 1:
        raise ArgumentTypeError("sliding_window", sliding_window, "a number of tokens, at least 1, is needed")
    return (sliding_window - 1, None) if causal else (sliding_window - 1, sliding_window - 1)


def _add_users_mask(options: dict[str, Any], mask: Tensor, position_bias: Tensor | None) -> Tensor | None:
    """A 4-D tensor that the user or the model made. Returns the bias there is then."""
    if mask.ndim != 4:
        raise ArgumentError("attention_mask", mask, "a 4-D mask is needed here: (B or 1, Hq or 1, Sq, Skv)")
    if mask.dtype == torch.bool:
        options["mask"] = mask
        return position_bias
    if not mask.is_floating_point():
        raise ArgumentTypeError("attention_mask", mask, "must be bool, True = attend, or floating, to be added")
    return mask if position_bias is None else position_bias + mask


def _fitting(mask: StructuredMask, q_length: int, kv_length: int) -> StructuredMask:
    if mask.shape[2] != q_length or mask.shape[3] < kv_length:
        raise ArgumentError(
            "attention_mask",
            mask,
            f"was made for {mask.shape[2]} queries and {mask.shape[3]} keys, not for {q_length} and {kv_length}",
        )
    return mask if mask.shape[3] == kv_length else mask.first_keys(kv_length)


def _check_agreement(mask: StructuredMask, is_causal: bool | None, sliding_window: int | None) -> None:
    """An argument that says something else than the mask is not overruled in silence."""
    formula = mask.rules.formula
    if not (mask.rules.readable and mask.structured):
        return
    causal = formula.right == 0  # a bidirectional window has as many keys on its right as on its left
    if is_causal is not None and is_causal != causal and mask.shape[2] > 1:
        says = "causal" if causal else "bidirectional"
        raise ArgumentError(
            "is_causal", is_causal, f"the mask that the model made is {says}; set config.is_causal, which it is made by"
        )
    if sliding_window is not None and formula.left is None and sliding_window < mask.shape[3]:
        raise ArgumentError(
            "sliding_window", sliding_window, "the mask that the model made for this layer has no sliding window"
        )


def _check_packing(mask: Any, position_bias: Tensor | None, packing: tuple[Any, ...]) -> None:
    if packing[0] is None or packing[1] is None:
        name = "cu_seq_lens_q" if packing[0] is None else "cu_seq_lens_k"
        raise ArgumentError(name, None, "cu_seq_lens_q and cu_seq_lens_k come together")
    if position_bias is not None:
        raise ArgumentError("position_bias", position_bias, "has no meaning across packed sequences")
    if isinstance(mask, Tensor) or (mask is not None and _padded(mask)):
        raise ArgumentError("cu_seq_lens_q", packing[0], "packed sequences have no padding and no mask of their own")
    found = None if mask is None else mask.arguments.packing
    if found is not None and found.cu_seqlens.shape != packing[0].shape:
        raise ArgumentError("cu_seq_lens_q", packing[0], "the position ids begin another number of sequences")


def _padded(mask: StructuredMask) -> bool:
    return mask.arguments.mask is not None or mask.arguments.seqlens_kv is not None


def _band(
    module: torch.nn.Module, mask: Any, is_causal: bool | None, sliding_window: int | None, kv_length: int
) -> dict[str, Any]:
    """Causality and window of packed sequences, each counted inside its own sequence."""
    if mask is not None:
        _check_agreement(mask, is_causal, sliding_window)
        said = mask.arguments
        return {"causal": said.causal, "window": said.window, "alignment": "bottom_right"}
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise ArgumentError(
            "is_causal", None, f"neither the call nor {type(module).__name__} says whether it is causal"
        )
    return {"causal": causal, "window": _window(causal, sliding_window), "alignment": "bottom_right"}


def _packed(
    query: Tensor, key: Tensor, value: Tensor, packing: tuple[Any, Any, Any, Any], options: dict[str, Any]
) -> Tensor:
    """Rows of sequences laid one after the other, (B, H, S, D), as one packed batch."""
    batch, _, length, _ = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    cu_q, cu_kv = (t if t.dtype == torch.int32 else t.to(torch.int32) for t in packing[:2])
    longest_q, longest_kv = (n if n is None or isinstance(n, int) else int(n) for n in packing[2:])
    out: Tensor = attention(
        q,
        k,
        v,
        layout="thd",
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv,
        max_seqlen_q=longest_q,
        max_seqlen_kv=longest_kv,
        **options,
    )
    return out.reshape(batch, length, *out.shape[1:]).contiguous()
