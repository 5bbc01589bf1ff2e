"""What the device can do at most, measured: a large product of matrices, and a large copy."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from attnrt.evidence.calls import TORCH_DTYPES
from attnrt.evidence.timing import clock_for, interleaved

MATMUL = {"cpu": 1536, "cuda": 8192}
"""Side of the square matrices."""
COPY = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Bytes that are copied: reads and writes count both."""


class Ceiling(BaseModel):
    """TFLOP/s by dtype, and GB/s."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tflops: dict[str, float]
    gbs: float

    def at(self, dtype: str, flops: float, traffic: float) -> tuple[float, str]:
        """(least seconds for so much work, what bounds it: "compute" or "memory"): the roofline."""
        compute = flops / (self.tflops[dtype] * 1e12)
        memory = traffic / (self.gbs * 1e9)
        return (compute, "compute") if compute >= memory else (memory, "memory")


def measure_ceiling(device: torch.device | str, dtypes: tuple[str, ...], seconds: float = 0.5) -> Ceiling:
    """Measure it now; `seconds` for each figure."""
    device = torch.device(device)
    clock = clock_for(device)
    side = MATMUL[device.type]
    tflops = {}
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype]) for _ in range(2))
        best = interleaved({"matmul": lambda a=a, b=b: torch.matmul(a, b)}, clock, seconds)["matmul"]  # type: ignore[misc]
        tflops[dtype] = 2 * side**3 / best.median / 1e12
    source = torch.zeros(COPY[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = interleaved({"copy": lambda: target.copy_(source)}, clock, seconds)["copy"]
    return Ceiling(tflops=tflops, gbs=2 * source.nbytes / best.median / 1e9)
