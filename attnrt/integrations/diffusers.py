"""attnrt in models of Hugging Face diffusers: a processor, which is the interface that diffusers makes public.

    from attnrt.integrations.diffusers import apply
    apply(unet)

diffusers' own choice of backends is a closed list in a private registry, so it is left alone. `apply` serves the models
whose layers are diffusers' `Attention` with its plain processors (the UNets, autoencoders, many transformers). Models
with processors of their own (Flux, Wan, ...) call PyTorch's SDPA through that registry: `attnrt.patch_sdpa()` serves
those.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from attnrt.api import attention
from attnrt.errors import IntegrationError

SUPPORTED = ">=0.42,<1"
"""Versions of diffusers whose `Attention` is the one that the processor knows."""


def _check_version() -> None:
    from packaging.specifiers import SpecifierSet

    try:
        found = version("diffusers")
    except PackageNotFoundError:
        raise IntegrationError(f"diffusers is not installed: pip install 'diffusers{SUPPORTED}'") from None
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise IntegrationError(f"diffusers {found} is installed; {SUPPORTED} is needed")


class AttnrtProcessor:
    """For `model.set_attn_processor` or `layer.set_processor`: a plain `Attention` layer, its attention by attnrt.

    It has no state, so one serves any number of layers. diffusers warns of cross_attention_kwargs it does not take.
    """

    def __init__(self) -> None:
        """Raises IntegrationError if diffusers is absent or of a version other than `SUPPORTED`."""
        _check_version()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            attn: the layer. hidden_states: (B, S, C), or (B, C, H, W). encoder_hidden_states: (B, T, C'), what to
                attend to; None: hidden_states. attention_mask: bool, True = attend, or added to the scores, in any
                shape that `Attention.prepare_attention_mask` takes.

        Returns:
            hidden_states' shape.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image = hidden_states.shape if hidden_states.ndim == 4 else None
        if image is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        q, k, v = (
            linear(x).unflatten(-1, (attn.heads, -1))
            for linear, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        dtype = v.dtype
        if attn.upcast_attention:
            q, k, v = q.float(), k.float(), v.float()
        options: dict[str, Any] = {}
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
            mask = mask.view(context.shape[0], attn.heads, -1, mask.shape[-1])
            options = {"mask": mask} if mask.dtype == torch.bool else {"bias": mask.to(q.dtype)}
        out = attention(q, k, v, layout="bshd", scale=attn.scale, **options).flatten(-2).to(dtype)
        for layer in attn.to_out:
            out = layer(out)
        if image is not None:
            out = out.transpose(-1, -2).reshape(image)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor  # type: ignore[no-any-return]


def apply(model: torch.nn.Module, strict: bool = True) -> tuple[str, ...]:
    """Give every plain `Attention` layer of a model an `AttnrtProcessor`.

    Args:
        strict: a layer with another processor is an error, and nothing is changed. False leaves such layers alone.

    Returns:
        The names of the layers that were left alone.

    Raises:
        IntegrationError: diffusers is absent or too old, no layer can be served, or with `strict` some cannot.
    """
    processor = AttnrtProcessor()
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    served, others = [], {}
    for name, module in model.named_modules():
        if not hasattr(module, "set_processor"):
            continue
        current = getattr(module, "processor", None)
        plain = isinstance(module, Attention) and module.added_kv_proj_dim is None
        if plain and type(current) in (AttnProcessor, AttnProcessor2_0, AttnrtProcessor):
            served.append(module)
        else:
            others[name] = type(current).__name__
    if not served or (strict and others):
        kinds = ", ".join(sorted(set(others.values()))) or "none"
        raise IntegrationError(
            f"{type(model).__name__} has {len(served)} plain Attention layers and {len(others)} with processors of "
            f"their own ({kinds}); attnrt.patch_sdpa() serves those, strict=False leaves them alone"
        )
    for module in served:
        module.set_processor(processor)
    return tuple(others)
