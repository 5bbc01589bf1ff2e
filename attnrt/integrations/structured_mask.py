"""The mask that attnrt hands to transformers' models: rules and lengths instead of a (B, 1, Sq, Skv) tensor."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from attnrt.errors import ArgumentError
from attnrt.integrations.mask_arguments import Packing, Rules, work_out


class StructuredMask:
    """What queries may attend to. Models pass it on to `attnrt`; one that calculates with it is told so by an error.

    Neither a Tensor, whose values a model could use, nor a BlockMask, which some models take as a sign that another
    kernel does the masking.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.device = rules.device
        self.arguments = work_out(rules)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the dense mask."""
        return self.rules.batch, 1, self.rules.q_length, self.rules.kv_length

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    @property
    def structured(self) -> bool:
        """It holds nothing of size Sq * Skv."""
        mask = self.arguments.mask
        return mask is None or mask.shape[2] == 1

    def contiguous(self) -> StructuredMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> StructuredMask:
        """With its tensors on another device. A dtype is ignored: there is nothing to cast."""
        wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, (torch.device, str, int))]
        device = torch.device(wanted[0]) if wanted else self.device
        if device == self.device:
            return self
        moved, said = copy(self), self.arguments
        moved.device = device
        packing = said.packing and Packing(said.packing.cu_seqlens.to(device), said.packing.longest)
        mask = None if said.mask is None else said.mask.to(device)
        lengths = None if said.seqlens_kv is None else said.seqlens_kv.to(device)
        moved.arguments = replace(said, packing=packing, mask=mask, seqlens_kv=lengths)
        return moved

    def dense(self) -> Tensor:
        """(B, 1, Sq, Skv) bool, True = attend: what it stands for, for a look at it."""
        return self.rules.dense()

    def first_keys(self, kv_length: int) -> StructuredMask:
        """The mask of the first `kv_length` keys alone, for a layer that holds fewer than the mask was made for."""
        rules = self.rules
        padding = None if rules.padding is None else rules.padding[:, :kv_length]
        fewer = replace(rules, kv_length=kv_length, padding=padding, dense=lambda: rules.dense()[..., :kv_length])
        return StructuredMask(fewer).to(self.device)

    def __getitem__(self, index: Any) -> StructuredMask:
        """Cropping the keys, as in `mask[:, :, :, :n]`, keeps the structure."""
        everything = slice(None)
        match index:
            case (first, second, third, slice(start=None, step=None) as keys) if (
                first == second == third == everything and (keys.stop is None or keys.stop >= 0)
            ):
                return self.first_keys(min(self.shape[3], self.shape[3] if keys.stop is None else keys.stop))
        _refuse(f"[{index}]")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(func, "__name__", str(func)))

    def __repr__(self) -> str:
        said = self.arguments
        words = [f"causal={said.causal}", f"window={said.window}", f"alignment={said.alignment}"]
        words += [n for n in ("mask", "seqlens_kv", "packing") if getattr(said, n) is not None]
        return f"StructuredMask({list(self.shape)}, {', '.join(words)})"

    __str__ = __repr__


def _refuse(what: str) -> NoReturn:
    raise ArgumentError(
        "attention_mask",
        what,
        "the model calculates with its mask instead of handing it to transformers' attention interface, so attnrt "
        "cannot serve it; use attn_implementation='eager' or 'sdpa'",
    )


def _no_arithmetic(name: str) -> Any:
    def refuse(self: StructuredMask, *_: Any) -> NoReturn:
        _refuse(name)

    return refuse


_OPERATIONS = "add radd sub rsub mul rmul truediv and rand or ror xor rxor invert neg lt le gt ge"
for _name in _OPERATIONS.split():
    setattr(StructuredMask, f"__{_name}__", _no_arithmetic(_name))
