"""A script that shows a wrong result again, with the tensors it was seen with beside it."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrt import __version__, registry
from attnrt.decision import Decision
from attnrt.evidence.calls import Tensors
from attnrt.report import machine

BYTES = 256 << 20
"""q, k, v and bias larger than this in all are not saved: the script makes random ones of their shapes and strides."""
FOLDER = "reproducers"

SCRIPT = '''\
"""{label} differs from the reference in {difference}

Written by attnrt {version} on {date} (ATTNRT_VERIFY=1). Run it: it raises attnrt.VerificationFailed while the defect is
there. The call: {call}
On: {machine}
"""

import os
from pathlib import Path

os.environ["ATTNRT_VERIFY"] = "1"

import torch

import attnrt
{registration}
SHAPES = {{  # shape, strides, dtype, requires_grad
{shapes}
}}
OPTIONS = {{
{options}
}}
saved = Path(__file__).with_suffix(".pt")
tensors = torch.load(saved, map_location="{device}", weights_only=True) if saved.exists() else {{}}
torch.manual_seed(0)
for name, (shape, strides, dtype, grad) in SHAPES.items():
    if name not in tensors:
        tensors[name] = torch.empty_strided(shape, strides, dtype=dtype, device="{device}").normal_()
    tensors[name].requires_grad_(grad)

with attnrt.override(backend={backend!r}, disable={disable!r}):
    attnrt.attention(**tensors, **OPTIONS)
print("no difference: the defect is gone, or these tensors do not show it")
'''


def write_reproducer(decision: Decision, given: Tensors, difference: str) -> tuple[Path | None, str]:
    """(the script, a sentence that says where it is), in the cache directory. A disk that is full or read-only is no
    error of its own: the sentence says so."""
    from attnrt.runtime import variables

    name = f"{decision.label}-{hashlib.sha256(repr(decision.request).encode()).hexdigest()[:8]}"
    script = variables().cache_dir / FOLDER / f"{name.replace('[', '-').replace(']', '')}.py"
    tensors = _named(given)
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(script_text(decision, given, difference))
        told = f"a script that shows it: {script}"
        if sum(t.nbytes for t in tensors.values()) > BYTES:
            told += " (with random tensors: these are too large to keep)"
            tensors = {n: t for n, t in tensors.items() if not t.is_floating_point()}
        temporary = script.with_suffix(f".{os.getpid()}.tmp")
        torch.save({n: _saved(t) for n, t in tensors.items()}, temporary)
        os.replace(temporary, script.with_suffix(".pt"))
        return script, told
    except OSError as error:
        return None, f"no script could be written to {script.parent}: {error.strerror or error}"


def script_text(decision: Decision, given: Tensors, difference: str) -> str:
    """The script. It forces the very kernel that was wrong."""
    tensors = _named(given)
    shapes = "\n".join(
        f'    "{n}": ({tuple(t.shape)}, {tuple(t.stride())}, {t.dtype}, {t.requires_grad}),' for n, t in tensors.items()
    )
    backend = registry.backends()[decision.backend or ""]
    others = [f"{backend.name}.{k.name}" for k in backend.kernels if k is not backend and k.name != decision.kernel]
    return SCRIPT.format(
        label=decision.label,
        difference=difference,
        version=__version__,
        date=datetime.now(UTC).date(),
        call=decision.request.describe(),
        machine=machine(decision.environment),
        registration=_registration(backend),
        shapes=shapes,
        device=given.q.device.type,
        backend=decision.backend,
        disable=tuple(others),
        options="\n".join(f'    "{name}": {value!r},' for name, value in _options(given).items()),
    )


def _named(given: Tensors) -> dict[str, Tensor]:
    """Every tensor of the call, by the name of its argument."""
    named = {"q": given.q, "k": given.k, "v": given.v, **given.operands._asdict()}
    return {n: t for n, t in named.items() if t is not None}


def _saved(t: Tensor) -> Tensor:
    """Detached; of a view with gaps, such as q in one qkv tensor, a copy with the same strides and nothing else."""
    t = t.detach()
    if t.untyped_storage().nbytes() <= t.nbytes or 0 in t.stride():
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _options(given: Tensors) -> dict[str, Any]:
    r = given.request
    options: dict[str, Any] = {
        "layout": r.layout,
        "causal": r.causal,
        "window": r.window,
        "alignment": r.alignment,
        "softcap": r.softcap,
        "scale": r.scale,
        "return_lse": r.needs_lse,
        "deterministic": r.deterministic,
    }
    if r.packed:
        options |= {"max_seqlen_q": r.seqlen_q, "max_seqlen_kv": r.seqlen_kv}
    return options


def _registration(backend: Any) -> str:
    """How a backend that is not ours comes to be registered there."""
    kind = type(backend)
    if kind.__module__.startswith("attnrt."):
        return ""
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        return f"\n# Register {backend.name!r} here: it was {kind.__module__}.{kind.__qualname__}.\n"
    name = kind.__qualname__.partition(".")[0]
    return (
        f"\nfrom {kind.__module__} import {name}\n\n"
        f'if "{backend.name}" not in attnrt.registry.backends():\n    attnrt.register_backend({kind.__qualname__}())\n'
    )
