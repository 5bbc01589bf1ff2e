"""The short way to a compiled kernel (backends/triton/launch.py): the same variant that Triton would take, the same
arguments in the same order. A stand-in takes the place of the driver."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_codegen import codegen

pytest.importorskip("triton", reason="needs triton")

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and no stand-in is needed"),
]
if find_spec("triton") is not None:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from attnrt.backends.triton.launch import _sites, launch
    from attnrt.backends.triton.scores import Matrix

    @triton.jit(do_not_specialize=["n"])
    def probe(X, Y, D, n, size, factor, BLOCK: tl.constexpr, FLAG: tl.constexpr = False):
        at = tl.arange(0, BLOCK)
        value = tl.load(X.data + at * X.row, mask=at < n, other=0.0) * factor
        if D is not None:
            value += tl.sum(D.load([0, 0]).to(tl.float32))
        if Y is not None:
            tl.store(Y + at * size, value)


def tensor(offset: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(512, dtype=dtype)[offset : offset + 256]


def matrix(row: int = 16, **options: Any) -> Any:
    return Matrix(tensor(**options), 0, 0, row)


def descriptor(*block: int, dtype: torch.dtype = torch.float16) -> Any:
    return TensorDescriptor(torch.zeros(64, 64, dtype=dtype), [64, 64], [64, 1], list(block))


VARIED: dict[str, list[Any]] = {
    "dtypes": [(matrix(), tensor()), (matrix(dtype=torch.float16), tensor()), (matrix(), tensor(dtype=torch.float16))],
    "alignment of pointers": [(matrix(), tensor()), (matrix(offset=1), tensor()), (matrix(), tensor(offset=3))],
    "alignment of strides": [(matrix(16), tensor()), (matrix(24), tensor()), (matrix(1), tensor())],
    "None": [(matrix(), tensor()), (matrix(), None)],
    "descriptors": [
        (matrix(), tensor(), descriptor(16, 16)),
        (matrix(), tensor(), descriptor(32, 16)),
        (matrix(), tensor(), descriptor(16, 16, dtype=torch.float32)),
        (matrix(), tensor()),
    ],
    "integers": [(matrix(), tensor(), None, n, size) for n in (5, 1 << 40) for size in (1, 2, 16, 1 << 40)],
}


@pytest.mark.parametrize("what", VARIED)
def test_each_specialisation_has_its_kernel(what: str) -> None:
    """Asked twice in turn: the short way gives each set of arguments the kernel that the usual way gives it."""
    default = (None, None, None, 100, 32, 0.5)
    calls = [(*given, *default[len(given) :]) for given in VARIED[what]]
    with codegen().recorded(90):
        usual = [probe[(3,)](*args, BLOCK=64, num_warps=4) for args in calls]
        assert len({id(k) for k in usual}) == len(calls)
        for _ in range(3):
            assert all(launch(probe, (3,), *a, BLOCK=64, num_warps=4) is k for a, k in zip(calls, usual, strict=True))


def test_constants_and_options_have_theirs() -> None:
    args = (matrix(), tensor(), None, 100, 32, 0.5)
    with codegen().recorded(90):
        options = [{"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 64, "FLAG": True}, {"BLOCK": 64, "num_warps": 8}]
        found = [[launch(probe, (1,), *args, **o) for o in options] for _ in range(2)]
        assert found[0] == found[1] and len({id(k) for k in found[0]}) == len(options)
        assert [k.metadata.num_warps for k in found[0]] == [4, 4, 4, 8]
    with codegen().recorded(80):  # another device
        other = launch(probe, (1,), *args, BLOCK=64)
        assert other is not found[0][0] and other is launch(probe, (1,), *args, BLOCK=64)


def test_the_launcher_gets_what_triton_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with codegen().recorded(90):
        seen: list[tuple[Any, ...]] = []
        kernel = launch(probe, (1,), matrix(), tensor(), None, 1, 2, 0.5, BLOCK=64)
        monkeypatch.setattr(type(kernel._run), "__call__", lambda self, *args: seen.append(args))
        args = (matrix(), tensor(), None, 7, 2, 0.25)  # n is not specialised: another number, the same kernel
        assert launch(probe, (1,), *args, BLOCK=64) is kernel
        for grid in ((5,), (5, 6), (5, 6, 7)):
            probe[grid](*args, BLOCK=64)
            assert launch(probe, grid, *args, BLOCK=64) is kernel
            usual, short = seen[-2:]
            assert usual[:6] == short[:6] and short[6:9] == (None, None, None)
            assert len(usual) == len(short) and all(a is b for a, b in zip(usual[9:], short[9:], strict=True))
            assert short[:4] == ((*grid, 1, 1)[0], (*grid, 1, 1)[1], (*grid, 1, 1)[2], 0)


def test_profilers_see_every_launch() -> None:
    from triton import knobs

    with codegen().recorded(90):
        names: list[str] = []
        args = (matrix(), tensor(), None, 100, 32, 0.5)

        def enter(metadata: Any) -> None: ...

        launch(probe, (1,), *args, BLOCK=64)
        knobs.runtime.launch_enter_hook.add(enter)
        probe.pre_run_hooks.append(lambda *a, **o: names.append("usual"))
        try:
            launch(probe, (1,), *args, BLOCK=64)
        finally:
            knobs.runtime.launch_enter_hook.remove(enter)
            probe.pre_run_hooks.clear()
        assert names == ["usual"]


def test_an_unknown_triton_takes_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = sys.modules[launch.__module__]
    args = (matrix(), tensor(), None, 100, 32, 0.5)
    with codegen().recorded(90):
        usual = probe[(1,)](*args, BLOCK=64)
        monkeypatch.setattr(module, "_short", False)
        assert launch(probe, (1,), *args, BLOCK=64) is usual
        monkeypatch.setattr(module, "_short", True)
        monkeypatch.setattr(module, "specialize", lambda *_: (_ for _ in ()).throw(TypeError()))
        _sites.clear()
        assert launch(probe, (1,), *args, BLOCK=64) is usual
        _sites.clear()
