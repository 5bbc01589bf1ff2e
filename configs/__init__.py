"""Data that ships with attnrt: policies, advisories, model shapes, tiles. Read through `importlib.resources`.

`parsed.py` holds what those YAML files say that a call may have to wait for, by the hash of their text: importing a
YAML parser was half of a process's first call. A file that is not as it left us is parsed.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any


def parse(text: str) -> Any:
    """What a YAML text says. Nobody may change it, since others get the same object.

    Raises:
        ValueError: it is no YAML.
    """
    from attnrt.configs.parsed import PARSED

    known = PARSED.get(sha256(text.encode()).hexdigest())
    return parse_anew(text) if known is None else known


def parse_anew(text: str) -> Any:
    """The same by the parser, an object of its own."""
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
