"""YAML as plain data, from a file that nobody vouches for: no tag that makes an object is ever followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from attnrt.errors import PolicyError


def plain_data(file: str, text: str, look: Callable[[yaml.Node], None], loader: Any = yaml.SafeLoader) -> Any:
    """What the text holds, once `look` has found nothing against its nodes.

    Args:
        look: called with the root before anything is made of it; raises what it has against it. loader: SafeLoader, or
            its C twin where lines of errors and of keys need not be the same.

    Raises:
        PolicyError: it is empty, or no YAML that we read; or whatever `look` raises.
    """
    opened = None
    try:
        opened = loader(text)
        node = opened.get_single_node()
        if node is None:
            raise PolicyError(file, 1, "the file is empty")
        look(node)
        return opened.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, PolicyError):
            raise
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise PolicyError(file, mark.line + 1 if mark else None, f"not YAML that we read: {problem}") from None
    finally:
        if opened is not None:
            opened.dispose()
