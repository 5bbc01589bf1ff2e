"""PyTorch's scaled_dot_product_attention, one kernel at a time: which one runs is named, never left to PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnrt.backends.base import FEATURE_NAMES, Backend, Kernel
from attnrt.backends.torch_sdpa.cpu import FlashCPU
from attnrt.backends.torch_sdpa.cuda import CuDNN, Efficient, Flash
from attnrt.backends.torch_sdpa.math import Math
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run


class TorchSDPA(Backend):
    name = "torch"
    title = "PyTorch's SDPA"
    prefix = "TORCH"
    supports = FEATURE_NAMES | {"lse_backward"}

    def __init__(self) -> None:
        self._kernels: tuple[Kernel, ...] = (FlashCPU(), CuDNN(), Flash(), Efficient(), Math())

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """In PyTorch's own order; `CuDNN` refuses the GPUs where PyTorch puts it after math, so never reaches it."""
        return self._kernels

    def first(self, request: AttentionRequest, environment: Environment) -> Kernel:
        """The first kernel that takes the call, or the last one if none does."""
        for kernel in self._kernels:
            if not any(rule.fails(request, environment) for rule in kernel.all_rules):
                return kernel
        return self._kernels[-1]

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        return self.first(request, environment).bytes(request, environment)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        return self.first(request, environment).notes(request, environment)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        return self.first(request, environment).prepare(request, environment)

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        return self.first(request, environment).pair(request, environment)
