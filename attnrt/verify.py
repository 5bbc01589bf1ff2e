"""ATTNRT_VERIFY=1: the first run of each new request is compared with the reference, forward and backward.

The reference is plain PyTorch in float64; a call with many scores is compared on some of its sequences, heads and
queries, with all of their keys (`attnrt.evidence.accuracy`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from attnrt.decision import Decision
from attnrt.errors import AdvisoryWarning, VerificationFailed
from attnrt.operands import Operands
from attnrt.report import text

if TYPE_CHECKING:
    from attnrt.backends.base import Run


def check(decision: Decision, run: Run, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> None:
    """Run the call once more on detached copies and compare output, LSE and gradients.

    Raises:
        VerificationFailed: they differ; the message names what, by how much, the call, and a script that shows it.
    """
    if decision.backend == "reference":
        return
    if reason := _cannot(decision, q):
        warnings.warn(f"attnrt: ATTNRT_VERIFY cannot check {decision.label}: {reason}", AdvisoryWarning, stacklevel=4)
        return
    from attnrt.evidence.accuracy import truth_of, worst
    from attnrt.evidence.calls import Tensors

    given = Tensors(q, k, v, operands, decision.request)
    truth = truth_of(given)
    found = worst(truth.check(given, run))
    if not found.wrong:
        return
    from attnrt.evidence.reproducer import write_reproducer

    part = "" if truth.whole else f" (compared on {len(truth.pieces)} of {decision.request.batch} sequences, in part)"
    script, said = write_reproducer(decision, given, str(found))
    raise VerificationFailed(
        f"{decision.label} differs from the reference in {found}{part}; the call was {decision.request.describe()}\n"
        f"{said}\n{text(decision)}",
        decision,
        script,
    )


def _cannot(decision: Decision, q: Tensor) -> str | None:
    from attnrt.evidence.accuracy import TOLERANCES

    request = decision.request
    if request.dropout_p:
        return "dropout draws other random numbers in each backend"
    if request.capturing:
        return "a CUDA graph is being captured"
    if request.dtype not in TOLERANCES:
        return f"there is no bound for {request.dtype}"
    if q.device.type == "mps":
        return "the device has no float64"
    return None
