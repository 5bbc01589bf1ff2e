"""The library's own word on a request, asked before anything runs."""

from __future__ import annotations

from collections import OrderedDict

import torch

from attnrt.backends.base import Reason
from attnrt.backends.cudnn.device import Device, device, started
from attnrt.backends.cudnn.drawing import Unsupported
from attnrt.backends.cudnn.graphs import GraphSpec, forward_spec, specs
from attnrt.backends.cudnn.plans import PLANS
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

MOST_REFUSALS = 1024
WARM_UP = "run the call once before the capture, backward included"
_refused: OrderedDict[tuple[int, GraphSpec], str] = OrderedDict()


def answer(r: AttentionRequest, e: Environment) -> tuple[Reason, ...]:
    """Why cuDNN cannot serve the request on this machine; () if it can. Its support check is asked once for each graph
    (3 ms), and not at all for one whose plan is in memory or on disk."""
    index = e.device_index or 0
    if r.capturing and not started(index):
        return (Reason("CUDNN_CAPTURE", "cuDNN has not been started, and a CUDA graph is being captured", WARM_UP),)
    try:
        gpu = device(index)
    except Exception as error:
        return (Reason("CUDNN_START", f"cuDNN does not start: {type(error).__name__}: {error}"),)
    if reason := _other_library(gpu):
        return (reason,)
    if r.capturing:
        missing = r.strides == "contiguous" and r.bias is None and not r.paged
        missing = missing and not PLANS.has(gpu, forward_spec(r, gpu.sm))
        said = "there is no plan for this call, and none can be built while a CUDA graph is being captured"
        return (Reason("CUDNN_CAPTURE", said, WARM_UP),) if missing else ()
    for spec in specs(r, gpu.sm):
        if (refused := _refusal(gpu, spec)) is not None:
            return (refusal(gpu.cudnn.backend_version_string(), spec, refused),)
    return ()


def refusal(library: str, spec: GraphSpec, said: str) -> Reason:
    """The library's refusal of a graph, in its words."""
    return Reason("CUDNN_SUPPORT", f"cuDNN {library} refuses the {'backward' if spec.backward else 'forward'}: {said}")


def _refusal(gpu: Device, spec: GraphSpec) -> str | None:
    key = (gpu.index, spec)
    if key not in _refused:
        try:
            PLANS.check(gpu, spec)
            return None
        except Unsupported as error:
            _refused[key] = str(error)
            while len(_refused) > MOST_REFUSALS:
                _refused.popitem(last=False)
            return str(error)
    return _refused[key]


def _other_library(gpu: Device) -> Reason | None:
    """Two libcudnn in one process: the frontend found another than torch's, so no version rule holds."""
    ours, torchs = gpu.cudnn.backend_version(), torch.backends.cudnn.version()
    if torchs is None or ours == torchs:
        return None
    return Reason(
        "CUDNN_OTHER_LIBRARY",
        f"nvidia-cudnn-frontend loaded libcudnn {ours}, and torch {torchs}",
        "take LD_LIBRARY_PATH off the other one, or install the version that torch wants",
    )
