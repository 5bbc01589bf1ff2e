"""One answer for all ranks of a job: rank 0 says it, the others read it from the job's key-value store.

No collective is called, so nothing waits for a rank that never asks, except those who read, and those not for ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def job_store() -> Any:
    """The store of the default process group; None outside a job of several ranks."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    from torch.distributed import distributed_c10d

    # The one way to it: `init_process_group` keeps the store to itself when it made it.
    find = getattr(distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


def said_by_rank_0(key: str, make: Callable[[], str], seconds: float) -> tuple[str, str | None]:
    """(the answer, what went wrong). Rank 0 makes and publishes it; others wait so long for it, then make their own."""
    store = job_store()
    if store is None:
        return make(), None
    name = f"attnrt/{key}"
    try:
        if dist.get_rank() == 0:
            answer = make()
            store.set(name, answer)
            return answer, None
        store.wait([name], timedelta(seconds=seconds))
        return bytes(store.get(name)).decode(), None
    except RuntimeError as error:  # a timeout, or a store that is gone
        fault = f"rank 0 did not say within {seconds:g} s ({str(error).partition(chr(10))[0][:120]})"
    warnings.warn(
        f"attnrt: {key.partition('/')[0]}: {fault}; this rank decides for itself", RuntimeWarning, stacklevel=3
    )
    return make(), fault
