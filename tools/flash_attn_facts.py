"""Which head dims flash-attn 4, 3 and 2 get right on the GPU that is here, asked of the packages themselves, whatever
our rules say: forward and backward against float64, one line for each pair of head dims.

    PYTHONPATH=.:tests python tools/flash_attn_facts.py [--only fa4] [--workers 12] [--seconds 55] [--json facts.json]

"ok"; "dq 1.2" is by how much a result is off beyond what is allowed; "launch" with the shared memory in KB, where the
GPU refused the kernel; "address" where it touched memory that is not its own, after which its process starts again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import deque
from importlib import metadata
from typing import Any

DIMS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 104, 112, 128, 160, 192, 256)
PAIRS = (
    (64, 192), (64, 256), (16, 64), (96, 160), (96, 192), (128, 256), (192, 256), (128, 192), (64, 128), (72, 40),
    (40, 72), (32, 64), (64, 32), (96, 64), (128, 64), (192, 128), (256, 128),
)  # fmt: skip
PAIRS_OF_3 = (
    (64, 128), (64, 192), (64, 256), (64, 512), (40, 24), (24, 40), (56, 72), (192, 128), (160, 104), (136, 128),
    (184, 120),
)  # fmt: skip
"""What flash-attn 3 says it has kernels for."""
NAMES = {"fa4": "flash-attn-4", "fa3": "flash-attn-3", "fa2": "flash-attn"}
HEADS = {"MHA": (4, 4), "GQA": (4, 2)}
MARK = "RESULT "
LONGEST = 25.0
"""Seconds that one question may take; it compiles for 2 to 8."""


def questions(only: str) -> list[dict[str, Any]]:
    """Most telling first, in case the time runs out: unequal head dims, then each of the others once, then again."""

    def ask(package: str, dims: tuple[int, int], heads: str, causal: bool) -> dict[str, Any]:
        return {"package": package, "dim": dims[0], "dim_v": dims[1], "heads": heads, "causal": causal}

    found = [
        ask("fa3", dims, heads, causal) for dims in PAIRS_OF_3 for heads, causal in (("MHA", True), ("GQA", False))
    ]
    equal = [((d, d), heads) for d in DIMS for heads in HEADS]
    found += [ask("fa4", dims, "MHA", causal) for dims in PAIRS for causal in (False, True)]
    found += [ask("fa4", dims, heads, heads == "GQA") for dims, heads in equal]
    found += [
        ask(fa, dims, heads, causal) for fa in ("fa3", "fa2") for dims, heads in equal for causal in (False, True)
    ]
    found += [ask("fa4", dims, heads, heads == "MHA") for dims, heads in equal]
    return [question for question in found if only in (question["package"], "")]


# --- A worker: one line of JSON in, lines of JSON out -----------------------------------------------------------------


def work() -> None:
    """Answer what stands on stdin until it ends, or until the CUDA context is lost."""
    import torch
    from devices import call
    from oracle import answers

    functions = {}
    libc = ctypes.CDLL(None)

    def say(half: str, answer: str) -> None:
        libc.fflush(None)  # what the CUDA side printed comes before
        print(f"\n{MARK}{json.dumps([half, answer])}", flush=True)

    def wrong(found: dict[str, Any], truth: dict[str, Any], plain: dict[str, Any]) -> str:
        said = []
        for name, x in found.items():
            want = truth[name]
            error, usual = ((y.double() - want).abs().max().item() for y in (x, plain[name]))
            if not error <= 2 * usual + 0.016 * max(1.0, want.abs().max().item()):
                said.append(f"{'d' * (name in 'qkv')}{name} {error:.2g}")
        return " ".join(said) or "ok"

    for line in sys.stdin:
        ask = json.loads(line)
        for half in ("forward", "backward"):
            try:
                if ask["package"] not in functions:
                    if ask["package"] == "fa4":
                        from flash_attn.cute import flash_attn_func
                    elif ask["package"] == "fa3":
                        from flash_attn_interface import flash_attn_func
                    else:
                        from flash_attn import flash_attn_func
                    functions[ask["package"]] = flash_attn_func
                if half == "forward":
                    case = call(
                        200, batch=2, dim=ask["dim"], dim_v=ask["dim_v"], heads=HEADS[ask["heads"]],
                        causal=ask["causal"],
                    )  # fmt: skip
                    with torch.device("cuda"):
                        truth, plain = answers(case)
                    torch.cuda.synchronize()
                    out = functions[ask["package"]](case.q, case.k, case.v, causal=ask["causal"])
                    out = out[0] if isinstance(out, tuple) else out
                    torch.cuda.synchronize()
                    say(half, wrong({"out": out}, truth, plain))
                else:
                    grads = torch.autograd.grad(out, (case.q, case.k, case.v), case.grad)
                    torch.cuda.synchronize()
                    say(half, wrong(dict(zip("qkv", grads, strict=True)), truth, plain))
            except Exception as error:
                text = " ".join(str(error).split())
                launch = "INVALID_CONFIG" in text or "cudaErrorInvalidValue" in text
                say(half, "launch" if launch else f"{type(error).__name__}: {text[:160]}")
                try:
                    torch.cuda.synchronize()
                except Exception as lost:
                    text = str(lost)
                    say("lost", "address" if "illegal" in text else " ".join(text.split())[:60])
                    os._exit(3)
                if half == "forward":
                    break
        say("end", "")


# --- The parent -------------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers, started again where it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any], until: float) -> dict[str, str]:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        found: dict[str, str] = {}
        kept, memory, deadline = b"", "", min(time.monotonic() + LONGEST, until)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.end()
                return found | {"backward" if "forward" in found else "forward": "no answer in time"}
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                half = "backward" if "forward" in found else "forward"
                return {half: f"process died ({process.wait()})"} | found
            *lines, kept = (kept + chunk).split(b"\n")
            for text in (line.decode(errors="replace") for line in lines):
                if allocated := re.search(r"Allocated: (\d+) bytes", text):
                    memory = f" {int(allocated[1]) / 1024:.0f} KB"
                if not text.startswith(MARK):
                    continue
                half, answer = json.loads(text.removeprefix(MARK))
                if half == "end":
                    return found
                if half == "lost":  # it came out in the half that was answered last
                    found[list(found)[-1]] = answer
                    self.end()
                    return found
                found[half] = answer + memory * (answer == "launch")

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run(asked: list[dict[str, Any]], workers: int, seconds: float) -> list[dict[str, Any]]:
    waiting, done, until = deque(asked), list[dict[str, Any]](), time.monotonic() + seconds

    def serve() -> None:
        worker = Worker()
        while time.monotonic() < until:
            try:
                question = waiting.popleft()
            except IndexError:
                break
            start = time.monotonic()
            answer = worker.ask(question, until)
            done.append(question | answer | {"seconds": round(time.monotonic() - start, 1)})
        worker.end()

    threads = [threading.Thread(target=serve) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def table(done: list[dict[str, Any]]) -> list[str]:
    """One line for each pair of head dims and heads: forward and backward, where they differ full | causal."""
    rows: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
    for d in done:
        rows.setdefault((d["package"], d["heads"], d["dim"] != d["dim_v"], d["dim"], d["dim_v"]), {})[d["causal"]] = d
    lines = []
    for (package, heads, _, dim, dim_v), of in sorted(rows.items()):
        halves = []
        for half in ("forward", "backward"):
            said = [of.get(causal, {}).get(half, "-") for causal in (False, True)]
            halves.append(said[0] if said[0] == said[1] else " | ".join(said))
        lines.append(f"{package} {heads} {f'{dim}/{dim_v}':8} {halves[0]:24} {halves[1]}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("fa4", "fa3", "fa2", ""), default="")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--json", help="a file for every answer with its seconds")
    options = parser.parse_args()
    if options.worker:
        work()
        return
    from attnrt.backends.flash_attn import FlashAttention4
    from attnrt.backends.flash_attn.discovery import CACHE_DIR, CACHE_ENABLED

    os.environ |= {CACHE_ENABLED: "1", CACHE_DIR: str(FlashAttention4().disk_cache()), "OMP_NUM_THREADS": "1"}
    installed = {d.metadata["Name"].replace("_", "-"): d.version for d in metadata.distributions()}
    here = {fa: installed.get(name) for fa, name in NAMES.items()}
    start = time.monotonic()
    asked = [q for q in questions(options.only) if here[q["package"]]]
    done = run(asked, options.workers, options.seconds)
    print("\n".join(table(done)))
    print(f"{here}: {len(done)} of {len(asked)} questions in {time.monotonic() - start:.0f} s; forward, then backward")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(done, file)


if __name__ == "__main__":
    main()
