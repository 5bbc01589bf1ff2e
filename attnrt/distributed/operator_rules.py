"""How the operators that torch.compile puts into a graph may be cut across ranks: by batch rows and by heads.

Importing this registers it with DTensor. A cut sequence is refused: the operator could only gather it whole, or answer
for one rank's share.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from attnrt.distributed.dtensor import DIMS, LSE
from attnrt.errors import ArgumentError
from attnrt.execution import Options, settled
from attnrt.operands import Operands
from attnrt.operators import BACKWARD, FORWARD, FORWARD_DROPOUT, INFERENCE, OPTIONS, PLAIN, TENSORS

_NAMES = ("q", "k", "v", *Operands._fields)
Rule = tuple[list[Any], list[Any]]
"""(placements of the outputs, placements of the inputs) along one mesh dim."""


def _forward(*arguments: Any) -> list[Rule]:
    tensors, options = arguments[:TENSORS], Options(*arguments[TENSORS:])
    layout, keeps_lse = options.layout, options.return_lse or any(options.grads)
    found: list[Rule] = []
    for kind, inputs in _cuts(tensors, layout, tensors):
        lse = _at(LSE[layout], kind) if keeps_lse else Replicate()
        found.append(([inputs[0], lse, Replicate()], [*inputs, *[None] * OPTIONS]))
    return found


def _inference(*arguments: Any) -> list[Rule]:
    *tensors, call, choice = arguments
    cuts = _cuts(tensors, settled(call, choice).layout, tensors)
    return [([inputs[0]], [*inputs, None, None]) for _, inputs in cuts]


def _backward(grad: Any, *arguments: Any) -> list[Rule]:
    tensors, wanted = arguments[:TENSORS], arguments[-1]
    layout = Options(*arguments[TENSORS + 3 : -1]).layout
    found: list[Rule] = []
    for kind, inputs in _cuts(tensors, layout, (grad, *tensors)):
        lse = _at(LSE[layout], kind)
        outputs: list[Any] = [_gradient(inputs[_NAMES.index(n)], kind) for n in ("q", "k", "v", "bias", "sinks")]
        outputs = [p if wants else Replicate() for p, wants in zip(outputs, wanted, strict=True)]
        saved = [inputs[0], lse, Replicate()]
        found.append((outputs, [inputs[0], *inputs, *saved, *[None] * (OPTIONS + 1)]))
    return found


def _cuts(tensors: Any, layout: str, checked: Any) -> list[tuple[str, list[Any]]]:
    """(what is cut, placements of the tensors, all of them or q, k and v): nothing, the batch, the heads.

    Raises:
        ArgumentError: the sequence is cut.
    """
    letters = DIMS[layout]
    for spec in checked[:3]:
        for placement in spec.placements:
            if isinstance(placement, Shard) and letters[placement.dim] == "s":
                said = "a sequence cut across ranks is not served inside torch.compile: call it outside of the graph"
                raise ArgumentError("q.placements", spec.placements, said)
    kinds = ["", "h", *("b" if "b" in letters else "")]
    return [
        (kind, [_placed(name, spec, kind, layout) for name, spec in zip(_NAMES, tensors, strict=False)])
        for kind in kinds
    ]


def _placed(name: str, spec: Any, kind: str, layout: str) -> Any:
    if spec is None:
        return None
    if name in ("q", "k", "v"):
        return _at(DIMS[layout], kind)
    if name in ("mask", "bias"):
        at = {"b": -4, "h": -3}.get(kind, 0)
        cut = at and spec.ndim >= -at and spec.shape[at] > 1
        return Shard(spec.ndim + at) if cut else Replicate()
    if name == "sinks":
        return Shard(0) if kind == "h" else Replicate()
    if name == "alibi_slopes":
        at = spec.ndim - 1 if kind == "h" else 0
        return Shard(at) if kind == "h" or (kind == "b" and spec.ndim == 2) else Replicate()
    return Shard(0) if kind == "b" else Replicate()  # lengths and page tables


def _at(letters: str, kind: str) -> Any:
    return Shard(letters.index(kind)) if kind else Replicate()


def _gradient(placement: Any, kind: str) -> Any:
    """What every rank has whole gets a share of its gradient from each."""
    if placement is None or not kind:
        return Replicate()
    return Partial() if isinstance(placement, Replicate) else placement


register_sharding([FORWARD, FORWARD_DROPOUT])(_forward)
register_sharding([INFERENCE, PLAIN])(_inference)
register_sharding(BACKWARD)(_backward)
