"""Runs a function in several processes that form one gloo group, once for many cases: starting them is what costs."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Outcome(NamedTuple):
    """What a rank's function returned, or how it ended."""

    value: Any = None
    error: str = ""
    """The exception's type and text."""
    seconds: float = 0.0


def spread(
    job: str, ranks: int, folder: Path, timeout: float = 60.0, backend: str = "gloo", **arguments: Any
) -> list[Outcome]:
    """`job` is "module:function", called as function(**arguments) in every rank; its group's timeout is in seconds.

    backend: "gloo", or "nccl", where rank r has GPU r.

    A rank that exits by itself (os._exit) has the error "exited with CODE".
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("forkserver")  # imports torch once, not in every rank
    context.set_forkserver_preload(["torch.distributed.tensor.experimental", "attnrt.distributed", "hypothesis"])
    started = [
        context.Process(target=_start, args=(job, rank, ranks, str(folder), timeout, backend, arguments))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    limit = time.monotonic() + 240
    for process in started:
        process.join(max(0.0, limit - time.monotonic()))
    found = []
    for rank, process in enumerate(started):
        if process.is_alive():
            process.kill()
            process.join()
            found.append(Outcome(error="did not end"))
            continue
        file = folder / f"{rank}.pt"
        if file.exists():
            found.append(torch.load(file, weights_only=False))
        else:
            found.append(Outcome(error=f"exited with {process.exitcode}"))
    return found


def _start(
    job: str, rank: int, ranks: int, folder: str, timeout: float, backend: str, arguments: dict[str, Any]
) -> None:
    for name in [n for n in os.environ if n.startswith(("ATTNRT_", "NVTE_"))]:
        del os.environ[name]
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    module, _, name = job.partition(":")
    run: Callable[..., Any] = getattr(importlib.import_module(module), name)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    begun = time.monotonic()
    try:
        outcome = Outcome(value=run(**arguments), seconds=time.monotonic() - begun)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome(error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - begun)
    file = Path(folder) / f"{rank}.pt"
    torch.save(outcome, file.with_suffix(".tmp"))
    os.replace(file.with_suffix(".tmp"), file)
    if outcome.error:
        os._exit(0)  # the group may be broken: nobody waits for the others
    dist.barrier()
    dist.destroy_process_group()
