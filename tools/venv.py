"""Make the virtual environment that the Makefile uses: torch first, never a CUDA build by accident, then attnrt.

Usage: python tools/venv.py FOLDER EXTRAS [--torch torch==2.13.0] [--index URL] [--cuda]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM = (3, 11)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("extras")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to ask pip for")
    parser.add_argument("--index", default="", help="index with torch wheels")
    parser.add_argument("--cuda", action="store_true", help="a CUDA build is wanted, GPU or not")
    options = parser.parse_args()
    if sys.version_info < MINIMUM:
        sys.exit(
            f"Python {'.'.join(map(str, MINIMUM))} or later is needed, this is {sys.version.split()[0]}; set PYTHON="
        )
    python = options.folder / "bin" / "python"
    stamp = options.folder / f".installed-{options.extras}"
    wanted = f"{options.torch} {options.index} {Path('pyproject.toml').read_text()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not python.exists():
        print(f"making {options.folder}")
        run([sys.executable, "-m", "venv", str(options.folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    index = ["--extra-index-url", options.index] if options.index else []
    if subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode:
        if not (options.cuda or shutil.which("nvidia-smi")):
            refuse_cuda(pip, options.torch, index)
        run([*pip, "install", "-q", options.torch, *index])
    # Torch stays what it is: a constraint keeps another package from replacing it by a CUDA build.
    version = subprocess.check_output([str(python), "-c", "import torch; print(torch.__version__)"], text=True).strip()
    constraint = options.folder / "torch.txt"
    constraint.write_text(f"torch=={version}\n")
    run([*pip, "install", "-q", "-e", f".[{options.extras}]", "-c", str(constraint)])
    stamp.write_text(wanted)


def refuse_cuda(pip: list[str], torch: str, index: list[str]) -> None:
    """Stop before gigabytes come down: without an NVIDIA GPU nothing that pip would install may be NVIDIA's."""
    report = subprocess.run(
        [*pip, "install", "-q", "--dry-run", "--ignore-installed", "--report", "-", torch, *index],
        capture_output=True,
        text=True,
    )
    if report.returncode:
        sys.exit(f"pip cannot find {torch}: {report.stderr.strip()}\nname another one with TORCH= and TORCH_INDEX=")
    names = [entry["metadata"]["name"].lower() for entry in json.loads(report.stdout)["install"]]
    if any(name.startswith(("nvidia-", "nvidia_", "cuda-", "cuda_")) for name in names):
        sys.exit(
            f"{torch} from here is a CUDA build of several gigabytes, and this machine has no NVIDIA GPU.\n"
            "Name an index with CPU builds: TORCH_INDEX=https://download.pytorch.org/whl/cpu TORCH=torch==2.13.0+cpu\n"
            "or take the CUDA build after all: make CUDA=1"
        )


def run(command: list[str]) -> None:
    print(" ".join(command[3:]))
    if code := subprocess.run(command).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
