"""Is a call's sequence cut across ranks? Asked of every call, so that none is ever answered for one rank's share alone.

Imports nothing of torch.distributed: where it was not imported, no tensor is sharded.
"""

from __future__ import annotations

import sys
from typing import Any

from attnrt.errors import ArgumentError

CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel._attention"
"""The module behind torch's own `context_parallel`."""
DTENSOR = "torch.distributed.tensor"


def sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor.

    Raises:
        ArgumentError: torch's context_parallel is in force, which only serves PyTorch's own SDPA: the tensors are one
            rank's tokens, perhaps out of order, and look like a whole sequence.
    """
    refuse_inside_context_parallel()
    module = sys.modules.get(DTENSOR)
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def outside_context_parallel() -> bool:
    """True, or `refuse_inside_context_parallel`."""
    refuse_inside_context_parallel()
    return True


def refuse_inside_context_parallel() -> None:
    """See `sharded`."""
    module = sys.modules.get(CONTEXT_PARALLEL)
    if module is None:
        return
    dispatcher = getattr(module.DTensor, "_op_dispatcher", None)
    handled = getattr(dispatcher, "_custom_op_handlers", {})
    if any(operator in handled for operator in getattr(module, "custom_ops", ())):
        raise ArgumentError(
            "q",
            "a shard",
            "torch's context_parallel is in force, so q, k and v are this rank's tokens only, and it does not reach "
            "attnrt; outside of it, shard with attnrt.distributed.shard and call "
            "attnrt.distributed.context_parallel_attention(..., mesh=mesh)",
        )
