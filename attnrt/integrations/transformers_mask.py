"""transformers' mask interface: what `AttentionMaskInterface` calls, once per forward and kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.errors import ArgumentError

if TYPE_CHECKING:
    from attnrt.integrations.structured_mask import StructuredMask

ELSEWHERE = frozenset(
    {
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that models pass down to attention though they concern other parts: the rotary embedding, the cache, the
loss, what the model returns. Packed position ids are in the mask by then, if the model makes it with them."""


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | StructuredMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **unknown: Any,
) -> StructuredMask:
    """The mask for one kind of layer, as transformers asks for it: sizes, offsets, a mask function and 2-D padding.

    A causal, bidirectional, sliding, chunked or packed mask function with any padding stays structured; one that does
    something else (blocks of image tokens, say) is evaluated to the dense mask, and reports then show it.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    from attnrt.integrations.mask_arguments import Rules
    from attnrt.integrations.mask_formula import Formula
    from attnrt.integrations.structured_mask import StructuredMask

    if isinstance(attention_mask, StructuredMask):
        return attention_mask  # made ahead of the forward, as for static caches
    refuse_unknown(unknown, "the mask interface")
    mask_function = causal_mask_function if mask_function is None else mask_function
    dense = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    padding = None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch_size:
            raise ArgumentError("attention_mask", attention_mask, f"(B, keys) with B = {batch_size} is needed here")
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if (missing := kv_length - padding.shape[1]) > 0:
            padding = torch.nn.functional.pad(padding, (0, missing))
    formula = _read(mask_function, local_size, allow_is_causal_skip, config)
    rules = Rules(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        Formula() if formula is None else formula,
        padding,
        torch.device(device),
        dense,
        formula is not None,
    )
    return StructuredMask(rules)


def _read(mask_function: Callable[..., Any], local_size: int | None, plain: bool, config: Any) -> Any:
    """What the mask function says; None if it has to be evaluated."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    from attnrt.integrations.mask_formula import Formula, read

    if mask_function is causal_mask_function:
        return Formula(right=0)
    if mask_function is bidirectional_mask_function:
        return Formula()
    if not torch.compiler.is_compiling():
        return read(mask_function)
    # Symbols cannot be traced through a look-up. A sliding window is known by its size, which is not a chunk's.
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if plain and local_size is not None and local_size == sizes[0] != sizes[1]:
        return Formula(left=local_size - 1, right=0)
    return None


def refuse_unknown(others: dict[str, Any], what: str) -> None:
    for name, value in others.items():
        if value is not None and value is not False and name not in ELSEWHERE:
            raise ArgumentError(name, value, f"{what} does not know it, so it cannot be honoured; leave it out")
