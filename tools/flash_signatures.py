"""Write down the signatures of the public functions of flash-attn 2, 3 and 4, from their sources, for the tests.

    git clone https://github.com/Dao-AILab/flash-attention
    pip download --no-deps flash-attn-4==4.0.0b36
    python tools/flash_signatures.py flash-attention flash_attn_4-4.0.0b36-py3-none-any.whl

Neither flash-attn 2 nor 3 can be installed without a CUDA compiler, so tests/backends/flash_attn/signatures.json holds
what their releases say. flash-attn 3 has no releases: a commit stands for each state of its interface.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "tests" / "backends" / "flash_attn" / "signatures.json"
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
FA2_TAGS = ("2.1.1", "2.2.0", "2.3.0", "2.4.0", "2.4.1", "2.5.0", "2.6.0", "2.7.0", "2.8.3")
FA3_COMMITS = {"3.0.0b1 of 2025-01": "7a802796", "3.0.0b1 of 2025-08": "203b9b3d", "3.0.0 of 2026-08": "0251105a"}
WHEEL_PATH = "flash_attn/cute/interface.py"


def signatures(source: str) -> dict[str, str]:
    """For each function its arguments in order, those that have a default with "=" behind them."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            names = [a.arg for a in node.args.args]
            needed = len(names) - len(node.args.defaults)
            found[node.name] = " ".join(name + ("=" if i >= needed else "") for i, name in enumerate(names))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repository", type=Path, help="a clone of github.com/Dao-AILab/flash-attention")
    parser.add_argument("wheel", type=Path, help="of flash-attn-4")
    options = parser.parse_args()

    def show(revision: str, path: str) -> str:
        command = ["git", "-C", str(options.repository), "show", f"{revision}:{path}"]
        return subprocess.check_output(command, text=True)

    with zipfile.ZipFile(options.wheel) as wheel:
        fa4 = signatures(wheel.read(WHEEL_PATH).decode())
    found = {
        "source": "github.com/Dao-AILab/flash-attention, and flash-attn-4 on PyPI; by tools/flash_signatures.py",
        "flash-attn": {v: signatures(show(f"v{v}", "flash_attn/flash_attn_interface.py")) for v in FA2_TAGS},
        "flash-attn-3": {v: signatures(show(c, "hopper/flash_attn_interface.py")) for v, c in FA3_COMMITS.items()},
        "flash-attn-4": {options.wheel.name.split("-")[1]: fa4},
    }
    TARGET.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
