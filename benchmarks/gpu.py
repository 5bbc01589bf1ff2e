"""`make gpu`: everything that needs an NVIDIA GPU, in one command: tests/gpu, then the timings, in gpu-results/.

    python benchmarks/gpu.py [--out gpu-results] [--quick]

Uses the python that runs it: take the one that has the machine's CUDA build of torch. Writes tests.txt, dispatch.json
and kernels/ (figures and plots, with the device, driver and versions they were seen on).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "torch",
    "filelock",
    "hypothesis",
    "matplotlib",
    "platformdirs",
    "psutil",
    "pydantic",
    "pytest",
    "rich",
    "triton",
    "typer",
    "yaml",
)


def versions() -> dict[str, Any]:
    """What a figure was seen on: device, driver, torch, packages."""
    import torch

    from attnrt.environment import Environment

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return {"environment": Environment.detect("cuda").to_dict(), "driver": driver, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--quick", action="store_true", help="a dozen shapes instead of all")
    options = parser.parse_args()
    if missing := [m for m in NEEDED if importlib.util.find_spec(m) is None]:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}: pip install -e '.[dev,bench,triton]', or carry the wheels"
        )
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"{sys.executable} (torch {torch.__version__}) sees no NVIDIA GPU; GPU_PYTHON=... names another python"
        )
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }

    def python(*arguments: str, log: str | None = None) -> int:
        output = open(out / log, "w") if log else None  # noqa: SIM115
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=output
        ).returncode

    code = python("-m", "pytest", "tests/gpu", "-ra", log="tests.txt")
    print((out / "tests.txt").read_text()[-4000:])
    python("benchmarks/dispatch.py", "--json", str(out / "dispatch.json"))
    quick = ["--quick"] if options.quick else []
    python("benchmarks/kernels.py", *quick, "--out", str(out / "kernels"))
    python("benchmarks/flash_attention.py", "--out", str(out / "flash_attn"))
    if importlib.util.find_spec("cudnn"):
        python("benchmarks/cudnn_sdpa.py", *quick, "--json", str(out / "cudnn.json"))
    python("benchmarks/regret.py", "--device", "cuda", *quick, "--out", str(out / "regret"))
    python("-m", "attnrt", "doctor", "--markdown", log="doctor.md")
    print(f"results in {out}")
    sys.exit(code)


if __name__ == "__main__":
    main()
