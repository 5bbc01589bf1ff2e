"""Launches from notes (backends/triton/replay.py): what reaches the launcher a second time, with a stand-in for it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from attnrt.backends.triton.replay import written_out
from attnrt.backends.triton.scores import Matrix


class Description(NamedTuple):
    """A tensor descriptor, for a launcher that does not look inside."""

    base: Any
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"


def compiled(calls: list[tuple[Any, ...]], scratch: int = 0, new: bool = False, metas: Any = None) -> Any:
    """A compiled kernel whose launcher writes its arguments down; `new`: in triton 3.7's order."""

    launcher = partial(lambda *args: calls.append(args))  # has no code to look into, as a function in C has not

    def wrapped(tensordesc_meta: Any) -> Any:
        def inner(*args: Any) -> None:
            raise AssertionError((launcher, tensordesc_meta, args))  # the replay goes past it

        return inner

    run = SimpleNamespace(
        global_scratch_size=scratch, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
        launch=launcher if metas is None else wrapped(metas),
    )  # fmt: skip
    if new:
        run.arg_annotations, run.kernel_signature = "types", "signature"
    return SimpleNamespace(run=run, function="function", packed_metadata="metadata")


@pytest.mark.parametrize("new", [False, True], ids=["3.6", "3.7"])
def test_pointers_go_to_their_places(new: bool) -> None:
    calls: list[tuple[Any, ...]] = []
    a, b = torch.zeros(8), torch.zeros(8)
    args = (Matrix(a, 1, 2, 3), b, None, 0.5, 7, (4, 5), b)
    step = written_out(compiled(calls, new=new), (9,), args, {id(a): 0, id(b): 1})
    for pointers in ([100, 200], [300, 400]):
        step(pointers, 77)
        p, q = pointers
        kernel = [(p, 1, 2, 3), q, None, 0.5, 7, (4, 5), q]
        head = (9, 1, 1, 77, "function", False, False)
        if new:
            assert calls.pop() == (*head, "metadata", None, None, None, None, None, "types", "signature", kernel)
        else:
            assert calls.pop() == (*head, None, None, "metadata", None, None, None, *kernel)


def test_tensor_maps_are_made_for_each_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnrt.backends.triton import replay

    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(replay, "_fill", lambda *args: (made.append(args), f"map of {args[0]}")[1])
    calls: list[tuple[Any, ...]] = []
    a = torch.zeros(8)
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [1, 64], "fp4_padded": False}
    description = Description(a, [4, 2], [2, 1], [1, 64])
    step = written_out(compiled(calls, metas=[meta]), (1, 2), (description, 5), {id(a): 0})
    for pointer in (16, 16, 32, 16):
        step([pointer], 0)
        assert calls.pop()[13:] == (f"map of {pointer}", 4, 2, 2, 1, 5)
    kind = replay.nvidia.TMA_DTYPE_DEVICE_TO_HOST[6]
    assert made == [(p, 3, 2, kind, [1, 64], [4, 2], [2, 1], 0) for p in (16, 32, 16)]


@pytest.mark.parametrize("wrong", ["a tensor of nobody", "scratch memory", "a descriptor in software"])
def test_what_cannot_be_replayed_is_refused(wrong: str) -> None:
    a = torch.zeros(8)
    roles = {} if wrong == "a tensor of nobody" else {id(a): 0}
    args = (Description(a, [8], [1], [8]),) if wrong == "a descriptor in software" else (a,)
    kernel = compiled([], scratch=64 if wrong == "scratch memory" else 0, metas=[None] if args[0] is not a else None)
    with pytest.raises(LookupError):
        written_out(kernel, (1,), args, roles)
