"""Importing the integrations imports no other library; using one without its library says what to install."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import attnrt.integrations.diffusers as for_diffusers
import attnrt.integrations.transformers as for_transformers
from attnrt.errors import IntegrationError

ROOT = Path(__file__).resolve().parents[2]


def test_importing_imports_nothing() -> None:
    code = (
        "import sys, attnrt; before = set(sys.modules); "
        "import attnrt.integrations.transformers, attnrt.integrations.diffusers; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules)} & {'transformers', 'diffusers', 'matplotlib'}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "[]"


@pytest.mark.parametrize("module", [for_transformers, for_diffusers])
def test_a_missing_package(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(IntegrationError, match="pip install"):
        (module.register if module is for_transformers else module.AttnrtProcessor)()  # type: ignore[attr-defined]
