"""Compiling ahead: the first call of every kernel that a list of calls will use, made now and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml
from pydantic import ValidationError

from attnrt import runtime
from attnrt.backends.base import Kernel
from attnrt.decision import Decision
from attnrt.environment import Environment
from attnrt.errors import ArgumentError, ArgumentTypeError
from attnrt.settings import Settings

if TYPE_CHECKING:
    from attnrt.evidence.calls import Call

Status = Literal["new", "not kept", "cached", "nothing to compile", "refused", "failed"]
"""new: files were added to the kernel's cache on disk. cached: it had them. not kept: it compiled, and the next process
will again, since its cache is off or cannot be written."""


@dataclass(frozen=True)
class Warmed:
    """What one call needed. `kernel`: as reports name it; `seconds`: of its first call, and of its first backward."""

    call: Call
    status: Status
    kernel: str | None = None
    seconds: float | None = None
    backward_seconds: float | None = None
    files: int = 0
    """How many the kernel's cache on disk has more than before."""
    said: str = ""
    """Why nothing ran."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "call": self.call.sizes(),
            "kernel": self.kernel,
            "status": self.status,
            "seconds": self.seconds,
            "backward_seconds": self.backward_seconds,
            "files": self.files,
            "said": self.said,
        }


def warm(
    calls: Iterable[Call],
    environment: Environment,
    chosen: Settings,
    progress: Callable[[Call, Warmed | None], None] = lambda call, done: None,
) -> list[Warmed]:
    """Choose for each call as `attention` would, and make its first call if its kernel compiles anything.

    Args:
        chosen: a backend named in it is the one that compiles.
        progress: called before each call with None, and after it with what came of it.

    Raises:
        ArgumentError: the environment is a simulated machine, for which nothing can run.
    """
    if environment.simulated:
        raise ArgumentError("environment", environment.name, "is simulated; kernels are compiled where they will run")
    found = []
    for call in calls:
        progress(call, None)
        found.append(_warm(call, environment, chosen))
        progress(call, found[-1])
    return found


def _warm(call: Call, environment: Environment, chosen: Settings) -> Warmed:
    decision = runtime.choose(call.request(), environment, chosen)
    if decision.winner is None:
        return Warmed(call, "refused", said=_against(decision))
    kernel = runtime.kernel_of(decision.winner)
    if not kernel.compiles:
        return Warmed(call, "nothing to compile", decision.label)
    try:
        return _first_call(call, kernel, decision)
    except Exception as error:  # the other calls still count
        lines = str(error).strip().splitlines() or [""]
        return Warmed(call, "failed", decision.label, said=f"{type(error).__name__}: {lines[0]}"[:300])


def _against(decision: Decision) -> str:
    if not decision.forced:
        return decision.why
    return "; ".join(r.message for v in decision.verdicts.values() if v.backend in decision.forced for r in v.reasons)


def _first_call(call: Call, kernel: Kernel, decision: Decision) -> Warmed:
    from attnrt.evidence.calls import device_of, tensors

    given = tensors(call, device_of(decision.environment))
    leaves = list(given.leaves().values())
    folder = kernel.disk_cache()
    before = _files(folder)
    start = time.perf_counter()
    run = kernel.prepare(replace(given.request, may_pad=decision.request.may_pad), decision.environment)
    with torch.set_grad_enabled(bool(leaves)):
        result = run(given.q, given.k, given.v, given.operands)
    out = result[0] if isinstance(result, tuple) else result
    _wait(out)
    forward, backward = time.perf_counter() - start, None
    if leaves:
        start = time.perf_counter()
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        _wait(out)
        backward = time.perf_counter() - start
    after = _files(folder)
    status: Status = "new" if after - before else "cached" if after else "not kept"
    return Warmed(call, status, decision.label, forward, backward, len(after - before))


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _files(folder: Path | None) -> set[Path]:
    return set() if folder is None else {path for path in folder.rglob("*") if path.is_file()}


def read_calls(file: Path) -> list[Call]:
    """The calls in a YAML or JSON file: a list of mappings, each with arguments of `explain_shape`.

    Raises:
        ArgumentError: it cannot be read, or an entry is no call; the message names the entry and what is wrong.
    """
    from attnrt.evidence.calls import Call

    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError("--file", str(file), f"cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, list) or not content:
        raise ArgumentError("--file", str(file), "a list of calls is needed, each a mapping such as {heads_q: 32, ...}")
    found = []
    for number, entry in enumerate(content, 1):

        def wrong(said: str, place: str = f"entry {number}") -> ArgumentError:
            return ArgumentError("--file", str(file), f"{place}: {said}")

        if not isinstance(entry, dict):
            raise wrong(f"a mapping with arguments of explain_shape is needed, not {entry!r}")
        if "environment" in entry:
            raise wrong("it has an environment; kernels are compiled for this machine alone")
        try:
            call = Call.model_validate(entry)
            call.request()
        except ValidationError as invalid:
            first = invalid.errors()[0]
            name = ".".join(map(str, first["loc"]))
            valid = f"; valid are {', '.join(Call.model_fields)}" if first["type"] == "extra_forbidden" else ""
            raise wrong(f"{name}: {first['msg']}{valid}") from None
        except (ArgumentError, ArgumentTypeError) as error:
            raise wrong(str(error)) from None
        found.append(call)
    return found
