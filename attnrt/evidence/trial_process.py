"""The process in which `trials` makes first calls: `python -m attnrt.evidence.trial_process DEVICE BYTES`.

Reads one JSON object a line, {"call": sizes, "kernel": name}, and writes one for each, {"outcome": ..., "said": ...},
after a first one that says that it is ready.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from attnrt import runtime
from attnrt.environment import Environment
from attnrt.evidence.calls import Call, device_of, tensors
from attnrt.evidence.candidates import Candidate, every_candidate, refusals
from attnrt.evidence.measuring import first_calls, lost
from attnrt.evidence.timing import said


def main() -> None:
    device, room = sys.argv[1], int(sys.argv[2])
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    environment = Environment.detect(device)
    torch.zeros(1, device=device)
    kernels = {c.name: c for c in every_candidate(environment)}

    def answer(outcome: str, words: str = "") -> None:
        answers.write(json.dumps({"outcome": outcome, "said": words}) + "\n")
        answers.flush()

    answer("ready")
    for line in sys.stdin:
        task = json.loads(line)
        outcome, words = first(Call.model_validate(task["call"]), kernels.get(task["kernel"]), environment, room)
        answer(outcome, words)
        if outcome == "died":
            return


def first(call: Call, candidate: Candidate | None, environment: Environment, room: int) -> tuple[str, str]:
    """(outcome, what was said) of one first call and its backward."""
    if candidate is None:  # registered by hand in the other process
        return "left", "not known here"
    request = call.request()
    if against := refusals(candidate, request, environment, runtime.settings(None, "default")):
        return "refused", against[0].message
    if bytes_of(request) + candidate.kernel.bytes(request, environment) > room:
        return "left", "it takes too much memory beside the others"
    try:
        given = tensors(call, device_of(environment))
        first_calls(given, candidate.kernel.prepare(given.request, environment))
        if given.q.is_cuda:
            torch.cuda.synchronize()
            del given
            torch.cuda.empty_cache()
    except torch.OutOfMemoryError as error:
        return "left", said(error)
    except Exception as error:
        return ("died" if lost(device_of(environment)) else "failed"), said(error)
    return "ran", ""


def bytes_of(request: Any) -> int:
    """Of the inputs, their gradients, and the float32 that they are drawn in."""
    r = request
    q = r.tokens_q * r.heads_q * (r.head_dim_qk + 2 * r.head_dim_v)
    kv = r.tokens_kv * r.heads_kv * (r.head_dim_qk + r.head_dim_v)
    return int((q + kv) * (2 * r.itemsize + 4))


if __name__ == "__main__":
    main()
