"""What is shipped: sdist and wheel hold every file, install as `attnrt` alone, and work from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "attnrt": "attnrt",
    "backends": "attnrt/backends",
    "configs": "attnrt/configs",
    "policies": "attnrt/policies",
}
"""Where each source folder is installed."""
IGNORED = {"__pycache__", ".mypy_cache", ".ruff_cache"}
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def sources() -> dict[str, Path]:
    """Installed path -> source file, of everything that has to be shipped."""
    found = {}
    for folder, target in FOLDERS.items():
        for at, folders, files in os.walk(ROOT / folder):
            folders[:] = [f for f in folders if f not in IGNORED and not (Path(at) / f).is_symlink()]
            for file in files:
                found[f"{target}/{(Path(at) / file).relative_to(ROOT / folder).as_posix()}"] = Path(at) / file
    return found


def python(
    *arguments: str, cwd: Path, path: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """This interpreter, without the current folder on its path and without any variable of ours."""
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "ATTNRT_", "NVTE_", "COV_"))}
    if path is not None:
        environ["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made from the sdist made from a copy of the tree, by the build backend itself: no network."""
    work = tmp_path_factory.mktemp("packaging")
    tree = work / "tree"
    for source in (ROOT / n for n in ("pyproject.toml", "README.md", "LICENSE")):
        tree.mkdir(exist_ok=True)
        (tree / source.name).write_bytes(source.read_bytes())
    for installed, file in sources().items():
        folder = next(f for f, target in reversed(FOLDERS.items()) if installed.startswith(f"{target}/"))
        copy = tree / folder / Path(installed).relative_to(FOLDERS[folder])
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for folder in ("backends", "configs", "policies"):
        assert os.readlink(ROOT / "attnrt" / folder) == f"../{folder}"
        (tree / "attnrt" / folder).symlink_to(f"../{folder}")
    sdist = python("-c", BUILD, "build_sdist", str(work), cwd=tree).stdout.split()[-1]
    with tarfile.open(work / sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    made = python("-c", BUILD, "build_wheel", str(work), cwd=unpacked).stdout.split()[-1]
    return work / made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    python(
        *("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index", "--no-compile"),
        *("--target", str(target), str(wheel)),
        cwd=target,
    )
    return target


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(Path(name).parent).replace("/", ".") for name in sources() if name.endswith("/__init__.py")}
    assert sorted(listed) == sorted(found)


def test_every_folder_with_code_is_a_package() -> None:
    names = set(sources())
    assert all(f"{Path(n).parent.as_posix()}/__init__.py" in names for n in names if n.endswith(".py"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        entry_points = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert shipped == set(sources()), "package-data of pyproject.toml decides what is shipped beside .py files"
    assert "attnrt/py.typed" in shipped
    assert "attnrt = attnrt.cli:main" in entry_points


def test_only_attnrt_is_installed(installed: Path) -> None:
    assert {p.name for p in installed.iterdir() if p.suffix != ".dist-info"} == {"attnrt", "bin"}
    assert not (installed / "attnrt" / "backends").is_symlink()


def test_the_installed_wheel_works(installed: Path, tmp_path: Path) -> None:
    code = """
import importlib.util, json, torch
import attnrt, attnrt.backends.reference, attnrt.policies.preference as preference
from attnrt import registry
from attnrt.advisories import load_advisories
q = torch.randn(1, 2, 8, 16)
out = attnrt.attention(q, q, q, causal=True)
want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
print(json.dumps({
    "files": [m.__file__ for m in (attnrt, attnrt.backends.reference, preference)],
    "policies": sorted(preference.builtin_policies()),
    "lines": [len(preference.load_policy(n, registry.rankable()).lines) for n in preference.builtin_policies()],
    "advisories": len(load_advisories()),
    "error": float((out - want).abs().max()),
    "leaked": [n for n in ("backends", "policies", "configs") if importlib.util.find_spec(n)],
}))
"""
    found = json.loads(python("-P", "-s", "-c", code, cwd=tmp_path, path=installed).stdout)
    assert all(Path(file).is_relative_to(installed) for file in found["files"])
    assert found["policies"] == sorted(p.stem for p in (ROOT / "configs" / "policies").glob("*.yaml"))
    assert all(found["lines"]) and found["advisories"] >= 25
    assert found["error"] < 1e-6
    assert found["leaked"] == []


@pytest.mark.parametrize("at_root", [True, False])
def test_the_source_tree_imports(at_root: bool, tmp_path: Path) -> None:
    """From the repository root, and from elsewhere with it on the path."""
    code = (
        "import attnrt.backends.reference as r, attnrt.policies.preference as p, attnrt; "
        "from attnrt.advisories import load_advisories; load_advisories(); print(p.builtin_policies()); "
        "print(r.__file__, p.__file__, sep='\\n')"
    )
    done = python("-c", code, cwd=ROOT if at_root else tmp_path, path=None if at_root else ROOT)
    assert all(Path(line).resolve().is_relative_to(ROOT) for line in done.stdout.splitlines()[-2:])


@pytest.mark.parametrize("name", ["backends", "backends.reference", "policies", "policies.preference"])
def test_the_folders_are_not_imported_by_themselves(name: str) -> None:
    """A second copy of the modules would have a registry of its own."""
    done = python("-c", f"import {name}", cwd=ROOT, check=False)
    folder = name.partition(".")[0]
    assert done.returncode == 1
    assert f"ImportError: import attnrt.{folder}, not {folder}" in done.stderr
