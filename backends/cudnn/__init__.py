"""cuDNN's fused attention, through nvidia-cudnn-frontend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnrt.backends.base import FEATURE_NAMES, Backend, Reason, linear_bytes
from attnrt.backends.cudnn.layouts import shape_of
from attnrt.backends.cudnn.memory import apart_bytes, full_matrix_bytes, workspace
from attnrt.backends.cudnn.rules import RULES
from attnrt.environment import Environment
from attnrt.request import ITEMSIZE, AttentionRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnrt.backends.base import Backward, Forward, Run


class CuDNN(Backend):
    """Fast from sm90 on, for training above all; the widest set of features of the vendor kernels."""

    name = "cudnn"
    title = "cuDNN"
    prefix = "CUDNN"
    # What is refused with a remedy has a rule of its own.
    supports = FEATURE_NAMES - {"softcap", "empty"} | {"paged", "lse_backward"}
    rules = RULES
    compiles = True

    def disk_cache(self) -> Path | None:
        """Its built plans."""
        from attnrt.backends.cudnn.plans import default_store

        return default_store().folder

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        r = request
        total = linear_bytes(r)
        if r.needs_grad:
            # The float32 dq and row sums that `linear_bytes` counts are in the workspace.
            total += workspace(r, environment) - r.tokens_q * r.heads_q * (r.head_dim_qk * 4 + 4)
            total += apart_bytes(r, environment)
        if r.bias is not None and r.bias.requires_grad:
            total += r.bias.elements * ITEMSIZE[r.bias.dtype]
        if r.packed:
            total += r.batch * r.heads_q * r.seqlen_q * 4  # its LSE is padded
        return total

    def quadratic_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Of the workspace, what a deterministic backward or a bias gradient makes as large as the scores."""
        return full_matrix_bytes(request, environment)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        r = request
        shape = shape_of(r, environment.sm or 90)
        lengths = shape.ragged and (r.layout != "bhsd" or shape.heads_apart)
        said = [
            "builds a plan once for each "
            + ("bucket of lengths (128, 512, 2048, then powers of two)" if lengths else "shape")
            + ", in 0.4 to 1.6 s; later processes load it from disk"
        ]
        if r.bias is not None and r.bias.strided:
            said.append("copies the bias, whose rows are not contiguous")
        if environment.simulated or environment.device_type != "cuda":
            return tuple(said)
        from attnrt.backends.cudnn.plans import PLANS

        return (*said, f"in this process: {PLANS.counters}")

    def answers(self) -> Mapping[str, str]:
        return {
            "CUDNN_START": "It is installed and does not start; its own words follow.",
            "CUDNN_OTHER_LIBRARY": "The frontend has loaded another libcudnn than torch's.",
            "CUDNN_SUPPORT": "The library's support check refuses the call; its own words follow.",
            "CUDNN_CAPTURE": "A CUDA graph is being captured, and there is no plan for the call yet.",
        }

    def answer(self, request: AttentionRequest, environment: Environment) -> tuple[Reason, ...]:
        """What libcudnn's support check says, in its words."""
        from attnrt.backends.cudnn.answers import answer  # imports cudnn

        return answer(request, environment)

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        from attnrt.backends.cudnn.adapter import prepare

        return prepare(request, environment)

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        from attnrt.backends.cudnn.adapter import pair

        return pair(request, environment)
