"""What a call of the console script gives, for the fixture `command` of conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Printed(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[[str], Printed]
