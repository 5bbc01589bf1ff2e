"""Python's garbage collector and a process's first choice."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_over = False


@contextmanager
def put_off_once() -> Iterator[None]:
    """The first time in a process, do not collect garbage inside the block; after that, nothing.

    What a first choice loads are modules and tables, of which nothing is garbage. But they are many objects, and set
    off a collection that walks through all of torch's, 80 ms, as likely as not in the middle of the first call.
    """
    global _over
    if _over or not gc.isenabled():
        yield
        return
    _over = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
