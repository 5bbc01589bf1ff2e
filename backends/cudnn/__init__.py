"""cuDNN's fused attention, through nvidia-cudnn-frontend."""

from __future__ import annotations

from attnrt.backends.base import FEATURE_NAMES, Backend, linear_bytes
from attnrt.backends.cudnn.rules import RULES, full_matrix_bytes, workspace
from attnrt.environment import Environment
from attnrt.request import ITEMSIZE, AttentionRequest


class CuDNN(Backend):
    """Fast from sm90 on, for training above all; the widest set of features of the vendor kernels."""

    name = "cudnn"
    title = "cuDNN"
    prefix = "CUDNN"
    built = False
    # What is refused with a remedy has a rule of its own.
    supports = FEATURE_NAMES - {"softcap", "empty"}
    rules = RULES

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        r = request
        total = linear_bytes(r)
        if r.needs_grad:
            # The float32 dq and row sums that `linear_bytes` counts are in the workspace.
            total += workspace(r, environment) - r.tokens_q * r.heads_q * (r.head_dim_qk * 4 + 4)
        if r.bias is not None and r.bias.requires_grad:
            total += r.bias.elements * ITEMSIZE[r.bias.dtype]
        if r.packed:
            total += r.batch * r.heads_q * r.seqlen_q * 4  # its LSE is padded
        return total

    def quadratic_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Of the workspace, what a deterministic backward or a bias gradient makes as large as the scores."""
        return full_matrix_bytes(request, environment)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        return ("builds a plan once per shape, in 0.4 to 1.6 s",)
