"""Importing attnrt is cheap and changes nothing; and the names that users rely on are the ones frozen here."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import attnrt
from attnrt import given, settings, variables

ROOT = Path(__file__).resolve().parent.parent
BACKEND_PACKAGES = ("triton", "cudnn", "flash_attn", "flash_attn_interface")
HEAVY = (*BACKEND_PACKAGES, "pydantic", "pydantic_settings", "yaml", "rich", "typer", "psutil", "matplotlib")

PUBLIC = [
    "AdvisoryWarning",
    "ArgumentError",
    "ArgumentTypeError",
    "AttentionRequest",
    "AttnrtError",
    "Backend",
    "BackendFailed",
    "BackendUnavailable",
    "Decision",
    "DemotionWarning",
    "Environment",
    "GradientError",
    "PassThroughWarning",
    "PolicyError",
    "Reason",
    "Rule",
    "UnknownNameError",
    "VariableError",
    "Verdict",
    "VerificationFailed",
    "attention",
    "explain",
    "explain_shape",
    "last_decision",
    "override",
    "patch_sdpa",
    "refresh",
    "register_backend",
    "unregister_backend",
    "use_backend",
]
VARIABLES = [
    "ATTNRT_BACKEND",
    "ATTNRT_PREFER",
    "ATTNRT_DISABLE",
    "ATTNRT_POLICY",
    "ATTNRT_REPORT",
    "ATTNRT_CACHE_DIR",
    "ATTNRT_UNFUSED_LIMIT",
    "ATTNRT_VERIFY",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "NVTE_UNFUSED_ATTN",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
]

CODE = """
import json, sys, torch
before = set(sys.modules)
import attnrt
imported = set(sys.modules) - before
cuda = torch.cuda.is_initialized()
q = torch.zeros(1, 1, 4, 8)
attnrt.attention(q, q, q)
attnrt.attention(q, q, q, softcap=2.0)
print(json.dumps({
    "imported": sorted(imported), "after": sorted(set(sys.modules) - before),
    "cuda": [cuda, torch.cuda.is_initialized()],
}))
"""


CHOICES = """
import json, sys, torch, attnrt
sizes = {"batch": 2, "heads_q": 8, "seqlen_q": 512, "seqlen_kv": 512, "head_dim": 128}
decode = {"heads_kv": 2, "seqlen_q": 1, "seqlen_kv": 4096, "alignment": "bottom_right"}
for call in (
    {}, {"training": True}, {"packed": True, "training": True}, {"sinks": True, "return_lse": True}, {"alibi": True},
    {"bias": True}, {"softcap": 30.0, "deterministic": True, "training": True}, decode, decode | {"page_size": 16},
):
    for machine in ("h200", "b200", "a100"):
        str(attnrt.explain_shape(environment=machine, **sizes | call))
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def fresh_process() -> Any:
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("ATTNRT_", "NVTE_"))}
    command = [sys.executable, "-c", CODE]
    return json.loads(subprocess.check_output(command, text=True, env={**environ, "PYTHONPATH": str(ROOT)}))


def packages(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_import_takes_nothing_heavy(fresh_process: Any) -> None:
    assert "attnrt" in packages(fresh_process["imported"])
    assert not packages(fresh_process["imported"]) & set(HEAVY)


def test_a_call_on_the_cpu_imports_no_backend_package(fresh_process: Any) -> None:
    assert not packages(fresh_process["after"]) & {*BACKEND_PACKAGES, "rich", "typer", "matplotlib"}


def test_choosing_imports_no_backend_package(tmp_path: Path) -> None:
    """Whether they are installed or not: empty ones stand before them, and whoever asks for more of one than it has
    has imported it."""
    for name in BACKEND_PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("ATTNRT_", "NVTE_"))}
    environ["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(ROOT)))
    found = json.loads(subprocess.check_output([sys.executable, "-c", CHOICES], text=True, env=environ))
    assert "attnrt.backends.flash_attn" in found
    assert not packages(found) & set(BACKEND_PACKAGES)


def test_cuda_is_not_initialised(fresh_process: Any) -> None:
    assert fresh_process["cuda"] == [False, False]


def test_public_names() -> None:
    assert sorted(attnrt.__all__) == sorted(PUBLIC)
    assert all(hasattr(attnrt, name) for name in PUBLIC)


def test_environment_variables() -> None:
    assert list(settings.NAMES) == VARIABLES
    assert list(variables.VALUES) == VARIABLES
    assert [field.validation_alias for field in given.Given.model_fields.values()] == VARIABLES
    assert list(given.Given.model_fields) == [field.name for field in fields(variables.Variables)]


def with_examples() -> list[str]:
    """Modules whose source has a doctest."""
    found = []
    for folder, package in {"attnrt": "attnrt", "backends": "attnrt.backends", "policies": "attnrt.policies"}.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text():
                parts = file.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join((package, *(p for p in parts if p != "__init__"))))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", with_examples())
def test_docstring_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    attnrt.refresh()
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed


def test_the_front_page_has_an_example() -> None:
    assert "attnrt" in with_examples()
