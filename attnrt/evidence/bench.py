"""`attnrt bench`: every kernel that can serve each call of a grid, with what the device could do at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnrt.environment import Environment
from attnrt.errors import AttnrtError, DeviceLost
from attnrt.evidence.calls import Call, device_of, tensors
from attnrt.evidence.ceiling import measure_ceiling
from attnrt.evidence.machine import machine_entry
from attnrt.evidence.measuring import measure
from attnrt.evidence.presets import preset_calls
from attnrt.evidence.results import Results, load_results, new_results, rows_of
from attnrt.evidence.timing import Clock, clock_for, said
from attnrt.evidence.trials import Trials, try_calls
from attnrt.evidence.tuning import COMPILING, SECONDS, expected_seconds
from attnrt.settings import Settings

COMPILE_SECONDS = 120.0
"""What first calls may take before anything is measured, where no budget is set."""


@dataclass
class Run:
    """What a run gave, and what it did not come to."""

    results: Results
    left: list[Call] = field(default_factory=list)
    refused: dict[Call, str] = field(default_factory=dict)
    interrupted: bool = False
    lost: str | None = None
    """Why the GPU could not be used any more, where that ended it."""
    trials: Trials = field(default_factory=Trials)


def bench(
    calls: Sequence[Call],
    environment: Environment,
    settings: Settings,
    *,
    file: Path | None = None,
    fresh: bool = False,
    budget: float | None = None,
    seconds: float | None = None,
    only: Iterable[str] | None = None,
    check: bool = True,
    progress: Callable[[Call, bool], None] | None = None,
    compiling: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Measure the calls in their order, saving after each. Calls that the file has are not measured again.

    Ctrl-C keeps what was measured. What compiles does so first, in processes of its own; a kernel that dies or hangs
    there is left out.

    Args:
        file: where the results are kept. fresh: start over. budget: seconds in all. seconds: for timing a call, each
            direction. only: kernel names. progress: called with a call and whether it is done.
        compiling: called with (first calls made, in all).

    Raises:
        ArgumentError: the file is no results file, or of another machine.
    """
    started = time.monotonic()
    device = device_of(environment)
    machine = machine_entry(environment)
    run = Run(new_results(machine) if file is None or fresh else load_results(file, machine))
    waiting = [call for call in dict.fromkeys(calls) if call not in set(run.results.calls())]
    clock: Clock | None = None
    only = None if only is None else tuple(only)
    try:
        limit = COMPILE_SECONDS if budget is None else COMPILING * budget
        run.trials = try_calls(waiting, environment, settings, seconds=limit, progress=compiling)
        while waiting:
            call = waiting[0]
            if progress is not None:
                progress(call, False)
            try:
                request = call.request()
            except AttnrtError as error:
                run.refused[call] = str(error)
                waiting.pop(0)
                continue
            if budget is not None and expected_seconds(request, environment) > budget - (time.monotonic() - started):
                run.left.append(waiting.pop(0))
                continue
            clock = clock or clock_for(device)
            _ceiling(run, request.dtype, environment)
            waiting.pop(0)
            try:
                given = tensors(call, device)
                found = measure(
                    given,
                    environment,
                    settings,
                    seconds=seconds or SECONDS[device.type],
                    clock=clock,
                    only=only,
                    check=check,
                    memory=True,
                    against=run.trials.against(call),
                )
            except torch.OutOfMemoryError as error:  # of the tensors themselves, or of the comparison
                run.refused[call] = said(error)
                continue
            if rows := rows_of(call, given.request, found, run.results.ceiling):
                run.results = run.results.with_rows(rows)
                if file is not None:
                    run.results.save(file)
            else:
                run.refused[call] = "no kernel can serve it"
            del given
            if progress is not None:
                progress(call, True)
    except KeyboardInterrupt:
        run.interrupted = True
        run.left += waiting
    except DeviceLost as error:
        run.lost = str(error)
        run.left += [call, *waiting]
    return run


def _ceiling(run: Run, dtype: str, environment: Environment) -> None:
    """Measured once for each dtype, and kept with the results."""
    known = run.results.ceiling
    if known is not None and dtype in known.tflops:
        return
    found = measure_ceiling(device_of(environment), (dtype,))
    if known is not None:
        found = known.model_copy(update={"tflops": {**known.tflops, **found.tflops}})
    run.results = run.results.model_copy(update={"ceiling": found})


def default_calls(environment: Environment) -> list[Call]:
    """What is measured if nothing is said."""
    if environment.device_type == "cuda":
        return preset_calls(("llama3-8b",), lengths=(1024, 4096, 16384))
    sizes: dict[str, Any] = {"heads_q": 8, "heads_kv": 2, "head_dim": 64, "dtype": "fp32", "layout": "bhsd"}
    lengths = (128, 256, 512, 1024, 2048)
    prefill = [Call(**sizes, seqlen_q=n, causal=True) for n in lengths]
    training = [Call(**sizes, seqlen_q=n, causal=True, training=True) for n in lengths[:-1]]
    return prefill + training + [Call(**sizes, seqlen_q=1, seqlen_kv=n) for n in (512, 2048, 8192)]
