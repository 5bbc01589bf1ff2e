"""Our own kernels, in Triton: every feature of the contract at the speed of a fused kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnrt.backends.base import FEATURE_NAMES, Backend, Kernel, linear_bytes
from attnrt.backends.triton.rules import DECODE_RULES, HOPPER_RULES, RULES, fused_backward
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run


class Portable(Kernel):
    """Runs wherever Triton does from sm80 on. Its backward has two walks without atomics; on Hopper, where that is not
    asked for, one walk with them (rules.fused_backward)."""

    name = "portable"
    title = "the portable Triton kernel"
    prefix = "TRITON_PORTABLE"
    supports = FEATURE_NAMES | {"lse_backward"}
    compiles = True

    def disk_cache(self) -> Path | None:
        """Triton's own."""
        from triton import knobs

        return Path(knobs.cache.dir)

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        bias = request.bias
        grad = bias.elements * 4 if bias is not None and bias.requires_grad else 0  # summed in float32
        return linear_bytes(request) + grad

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        if not request.needs_grad or not fused_backward(request, environment):
            return ()
        return ("the backward adds dq up in an order that changes from run to run; deterministic=True takes another",)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        from attnrt.backends.triton.adapter import prepare  # imports triton

        return prepare(request, environment)

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        from attnrt.backends.triton.adapter import pair

        return pair(request, environment)


class Hopper(Portable):
    """A forward in Gluon that overlaps the softmax with the matrix products; the backward is the portable kernel's."""

    name = "hopper"
    title = "the Hopper kernel"
    prefix = "TRITON_HOPPER"
    supports = FEATURE_NAMES - {
        *("mask", "bias", "bias_grad", "alibi", "softcap", "sinks", "dropout", "unaligned"),
        "unequal_head_dims",
    } | {"lse_backward"}
    rules = HOPPER_RULES

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        from attnrt.backends.triton.adapter import prepare
        from attnrt.backends.triton.hopper import available

        return prepare(request, environment, hopper=available())

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        from attnrt.backends.triton.adapter import pair
        from attnrt.backends.triton.hopper import available

        return pair(request, environment, hopper=available())


class Decode(Portable):
    """For few queries over many keys: splits the keys among programs, and merges the parts by their LSE."""

    name = "decode"
    title = "the Triton decode kernel"
    prefix = "TRITON_DECODE"
    supports = FEATURE_NAMES - {"backward", "deterministic", "dropout", "mask", "bias", "bias_grad"}
    rules = DECODE_RULES

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        from attnrt.backends.triton.adapter import prepare_decode

        return prepare_decode(request, environment)


class TritonBackend(Backend):
    name = "triton"
    title = "the Triton kernel"
    prefix = "TRITON"
    supports = FEATURE_NAMES - {"empty"} | {"lse_backward"}
    rules = RULES

    def __init__(self) -> None:
        self._kernels: tuple[Kernel, ...] = (Decode(), Hopper(), Portable())

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        return self.kernels[-1].bytes(request, environment)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        return self.kernels[-1].notes(request, environment)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        """The first kernel that takes the request."""
        taking = (k for k in self.kernels if not any(rule.fails(request, environment) for rule in k.all_rules))
        return next(taking).prepare(request, environment)

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        taking = (k for k in self.kernels if not any(rule.fails(request, environment) for rule in k.all_rules))
        return next(taking).pair(request, environment)
