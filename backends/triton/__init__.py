"""Our own kernel, in Triton: every feature of the contract at the speed of a fused kernel."""

from __future__ import annotations

from attnrt.backends.base import FEATURE_NAMES, Backend, linear_bytes
from attnrt.backends.triton.rules import RULES
from attnrt.environment import Environment
from attnrt.request import AttentionRequest


class TritonBackend(Backend):
    """Runs wherever Triton does from sm80 on. Its backward needs no atomics, so it is always deterministic."""

    name = "triton"
    title = "the Triton kernel"
    prefix = "TRITON"
    built = False
    supports = FEATURE_NAMES - {"empty"}
    rules = RULES

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        bias = request.bias
        grad = bias.elements * 4 if bias is not None and bias.requires_grad else 0  # summed in float32
        return linear_bytes(request) + grad
