"""`make gpu`: everything that needs an NVIDIA GPU, in one command: tests/gpu, then the timings, in gpu-results/.

    python benchmarks/gpu.py [--out gpu-results]

Uses the python that runs it, so take the one that has the machine's CUDA build of torch. Writes tests.txt,
dispatch.json and kernels.json, with the device, driver and versions they were seen on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "torch",
    "pydantic",
    "pydantic_settings",
    "platformdirs",
    "psutil",
    "yaml",
    "rich",
    "typer",
    "pytest",
    "hypothesis",
)
SHAPES: dict[str, dict[str, Any]] = {
    "prefill 4k, MHA": {"batch": 4, "heads": 16, "kv": 16, "q": 4096, "kvlen": 4096, "dim": 128, "causal": True},
    "prefill 16k, GQA 4:1": {"batch": 1, "heads": 32, "kv": 8, "q": 16384, "kvlen": 16384, "dim": 128, "causal": True},
    "short 512, d 64": {"batch": 32, "heads": 16, "kv": 16, "q": 512, "kvlen": 512, "dim": 64, "causal": False},
    "decode, 32k cache": {"batch": 16, "heads": 32, "kv": 8, "q": 1, "kvlen": 32768, "dim": 128, "causal": False},
}


def versions() -> dict[str, Any]:
    import torch

    import attnrt

    environment = attnrt.Environment.detect("cuda").with_free_memory().to_dict()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.strip()
    return {"environment": environment, "driver": driver, "attnrt": attnrt.__version__, "torch": torch.__version__}


def timings() -> list[dict[str, Any]]:
    """attnrt's choice, and each of PyTorch's kernels that would take the call, in one run, forward and backward."""
    return [row for name, shape in SHAPES.items() for row in timings_of(name, **shape)]


def timings_of(
    name: str, batch: int, heads: int, kv: int, q: int, kvlen: int, dim: int, causal: bool
) -> list[dict[str, Any]]:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import attnrt

    def tensor(heads: int, length: int) -> torch.Tensor:
        return torch.randn((batch, heads, length, dim), device="cuda", dtype=torch.bfloat16, requires_grad=True)

    query, key, value = tensor(heads, q), tensor(kv, kvlen), tensor(kv, kvlen)
    flops = 4 * batch * heads * q * kvlen * dim / (2 if causal else 1)

    def pinned(kernel: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    calls: dict[str, Any] = {"attnrt": lambda: attnrt.attention(query, key, value, causal=causal)}
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        calls[kernel.name] = partial(pinned, kernel)
    rows = []
    for label, call in calls.items():
        row: dict[str, Any] = {"shape": name, "kernel": label}
        try:
            grad = torch.randn_like(call())
            row["ran"] = attnrt.last_decision().label if label == "attnrt" else label  # type: ignore[union-attr]
            with torch.no_grad():
                row["forward_ms"] = median_ms(call)
            row["forward_backward_ms"] = median_ms(partial(backward, call, (query, key, value), grad))
            row["forward_tflops"] = flops / row["forward_ms"] / 1e9
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0]
        rows.append(row)
        print(row, flush=True)
    return rows


def backward(call: Any, inputs: Any, grad: Any) -> Any:
    import torch

    return torch.autograd.grad(call(), inputs, grad)


def median_ms(call: Any, warmup: int = 10, repeats: int = 50) -> float:
    """Median of CUDA-event times."""
    import torch

    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    options = parser.parse_args()
    if missing := [m for m in NEEDED if importlib.util.find_spec(m) is None]:
        sys.exit(f"{sys.executable} lacks {', '.join(missing)}: pip install -e '.[dev]', or carry the wheels, first")
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"{sys.executable} (torch {torch.__version__}) sees no NVIDIA GPU; GPU_PYTHON=... names another python"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "tests.txt", "w") as log:
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "tests/gpu", "-ra"], cwd=ROOT, stdout=log, stderr=log
        ).returncode
    print((options.out / "tests.txt").read_text()[-4000:])
    subprocess.run([sys.executable, "benchmarks/dispatch.py", "--json", str(options.out / "dispatch.json")], cwd=ROOT)
    result = {"seen_on": versions(), "tests_exit_code": code, "kernels": timings()}
    (options.out / "kernels.json").write_text(json.dumps(result, indent=2))
    print(f"results in {options.out}")
    sys.exit(code)


if __name__ == "__main__":
    main()
