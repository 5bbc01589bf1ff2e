"""Built plans on disk, so that the next process need not compile them: one file each, checked, replaced as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

from attnrt.backends.cudnn.graphs import GraphSpec

FORMAT = "attnrt cuDNN plan 1"
MOST_FILES = 2000
"""The oldest tenth goes when there are more; a plan has 80 to 250 kB."""


class Store:
    """Plans in a folder. Whatever is wrong with a file or the folder costs a rebuild and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, versions: tuple[str, ...], spec: GraphSpec) -> Path:
        """Where the plan of a graph is, for that library and GPU."""
        return self.folder / f"{hashlib.sha256(_key(versions, spec).encode()).hexdigest()}.plan"

    def read(self, versions: tuple[str, ...], spec: GraphSpec) -> bytes | None:
        """The serialised plan, or None if there is none or it is not what was written."""
        try:
            head, _, data = self.file(versions, spec).read_bytes().partition(b"\n")
            said = json.loads(head)
        except (OSError, ValueError):
            return None
        wanted = _head(versions, spec, data)
        return data if said == wanted else None

    def write(self, versions: tuple[str, ...], spec: GraphSpec, data: bytes) -> bool:
        """Whether it could be kept."""
        head = json.dumps(_head(versions, spec, data)).encode()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._prune()
            handle, partial = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(head + b"\n" + data)
                os.replace(partial, self.file(versions, spec))
            except OSError:
                Path(partial).unlink(missing_ok=True)
                return False
        except OSError:
            return False
        return True

    def drop(self, versions: tuple[str, ...], spec: GraphSpec) -> None:
        """Remove a plan that the library would not take."""
        try:
            self.file(versions, spec).unlink(missing_ok=True)
        except OSError:
            return

    def _prune(self) -> None:
        files = list(self.folder.glob("*.plan"))
        if len(files) < MOST_FILES:
            return
        for old in sorted(files, key=_age)[: MOST_FILES // 10]:
            old.unlink(missing_ok=True)


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _key(versions: tuple[str, ...], spec: GraphSpec) -> str:
    return repr((FORMAT, versions, spec))


def _head(versions: tuple[str, ...], spec: GraphSpec, data: bytes) -> dict[str, str]:
    return {"format": FORMAT, "key": _key(versions, spec), "sha256": hashlib.sha256(data).hexdigest()}
