"""Plans: found again by all that a graph depends on and nothing else, bounded, built once, kept on disk and checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cudnn_emulation import EmulatedDevice, EmulatedGraph

from attnrt.backends.cudnn import answers
from attnrt.backends.cudnn import plans as module
from attnrt.backends.cudnn.drawing import Unsupported, words
from attnrt.backends.cudnn.graphs import GraphSpec, Plane, backward_spec, forward_spec, specs
from attnrt.backends.cudnn.layouts import Strides, bucket, contiguous, shape_of
from attnrt.backends.cudnn.plans import MOST_DRAFTS, Plans
from attnrt.backends.cudnn.store import Store
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

VERSIONS = ("cudnn 9.19.0", "frontend 1.28.0")


def request(**options: Any) -> AttentionRequest:
    return AttentionRequest.from_shape(**{"batch": 2, "heads_q": 8, "seqlen_q": 512, "head_dim": 64, **options})


def spec(**options: Any) -> GraphSpec:
    return forward_spec(request(**options), 90)


def built(gpu: EmulatedDevice, store: Store, kind: GraphSpec | None = None) -> Plans:
    """Plans with one in memory and on disk."""
    plans = Plans(lambda: store)
    plans.get(gpu, kind or spec())  # type: ignore[arg-type]
    plans.flush()
    return plans


class Loads(EmulatedDevice):
    """A device that can load what it serialised."""

    def load(self, data: bytes) -> EmulatedGraph:
        if not data.startswith(b"GraphSpec"):
            raise ValueError("not a plan")
        return EmulatedGraph(spec())


# --- Keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_q": 513}, {"batch": 3}, {"heads_q": 16}, {"heads_kv": 4}, {"head_dim": 128}, {"head_dim_v": 32},
        {"dtype": "fp16"}, {"layout": "bhsd"}, {"causal": True}, {"window": (5, None)}, {"window": (None, 5)},
        {"window": (5, 5)}, {"scale": 0.5}, {"dropout_p": 0.1}, {"sinks": True}, {"bias": True},
        {"bias": (1, 8, 512, 512)}, {"return_lse": True}, {"padded": True}, {"packed": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_graph_changes_the_key(changes: dict[str, Any]) -> None:
    assert spec(**changes) != spec()


@pytest.mark.parametrize("changes", [{"capturing": True}, {"deterministic": True}, {"compiled": True}], ids=str)
def test_what_does_not_change_the_graph_does_not(changes: dict[str, Any]) -> None:
    assert spec(**changes) == spec()


def test_strides_are_in_the_key_and_those_of_single_rows_are_not() -> None:
    r = request(heads_q=1)
    plain, odd = (forward_spec(r, 90, q=Strides(512 * 64, head, 64)) for head in (64, 7))
    assert plain == odd
    r = request()
    assert forward_spec(r, 90, q=Strides(512 * 8 * 64 * 3, 64, 8 * 64 * 3)) != forward_spec(r, 90)


def test_the_backward_has_the_output_gradients_strides_and_determinism_in_its_key() -> None:
    r = request(training=True)
    forward = forward_spec(r, 90)
    assert backward_spec(forward, r) != backward_spec(forward, r, contiguous("bhsd", 8, 512, 64))
    assert backward_spec(forward, r) != backward_spec(forward, request(training=True, deterministic=True))
    biased = request(training=True, bias=True), request(training=True, bias=True, bias_grad=True)
    assert len({backward_spec(forward_spec(b, 90), b) for b in biased}) == 2


def test_a_bias_counts_with_strides_and_dtype() -> None:
    r, dims = request(bias=(1, 1, 512, 512)), (1, 1, 512, 512)
    planes = [Plane(dims, (n * 512, n * 512, n, 1), dtype) for n in (512, 520) for dtype in ("bf16", "fp32")]
    assert len({forward_spec(r, 90, bias=p) for p in planes}) == 4


# --- Buckets -----------------------------------------------------------------------------------------------------


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 128, 129, 512, 513, 2048, 2049, 4096, 5000)] == [
        128, 128, 128, 512, 512, 2048, 2048, 4096, 4096, 8192,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        {"packed": True},
        {"padded": True},
        {"padded": True, "layout": "sbhd"},
        {"padded": True, "heads_kv": 1},
        {"padded": True, "layout": "bhsd"},
        {"padded": True, "layout": "bhsd", "heads_kv": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("sm", [80, 90, 100])
def test_two_hundred_lengths_are_ten_plans_at_most(kind: dict[str, Any], sm: int) -> None:
    """Forward and backward together, up to 8192 tokens."""
    made = set()
    for n in range(41, 8201, 41):
        made.update(specs(request(seqlen_q=min(n, 8192), batch=6, training=True, **kind), sm))
    assert len(made) <= 10


@pytest.mark.parametrize(("batch", "seqlen", "heads"), [(3, 100, 4), (64, 16384, 32), (1, 7, 1), (33, 2049, 8)])
def test_the_plan_has_room_for_the_call(batch: int, seqlen: int, heads: int) -> None:
    r = request(packed=True, batch=batch, seqlen_q=seqlen, heads_q=heads, training=True)
    for sm in (80, 90, 100):
        shape = shape_of(r, sm)
        assert shape.batch >= r.batch and shape.seqlen_q >= r.seqlen_q
        assert (shape.most_tokens_q or r.tokens_q) >= r.tokens_q
        assert (shape.most_tokens_kv or r.tokens_kv) >= r.tokens_kv


def test_a_skewed_batch_gets_a_workspace_for_its_tokens() -> None:
    """One long sequence among many short: room for all to be long would be gigabytes."""
    skewed = replace(request(packed=True, batch=64, seqlen_q=16384, heads_q=32, training=True), tokens_q=20000)
    shape = shape_of(skewed, 90)
    assert shape.most_tokens_q == 32768


# --- The cache ---------------------------------------------------------------------------------------------------


def test_a_plan_is_built_once_and_found_again() -> None:
    plans, gpu = Plans(lambda: None), EmulatedDevice()
    first = plans.get(gpu, spec())  # type: ignore[arg-type]
    assert plans.get(gpu, spec()) is first  # type: ignore[arg-type]
    assert plans.get(gpu, spec(causal=True)) is not first  # type: ignore[arg-type]
    assert (plans.counters.built, plans.counters.hits, len(gpu.drawn)) == (2, 1, 2)
    assert "2 plans built" in str(plans.counters)


def test_bounded_the_longest_unasked_goes_first() -> None:
    plans, gpu = Plans(lambda: None, most=2), EmulatedDevice()
    kinds = [spec(), spec(causal=True), spec(scale=0.5)]
    for kind in (kinds[0], kinds[1], kinds[0], kinds[2]):
        plans.get(gpu, kind)  # type: ignore[arg-type]
    assert len(plans) == 2 and plans.counters.evicted == 1
    assert plans.has(gpu, kinds[0]) and not plans.has(gpu, kinds[1])  # type: ignore[arg-type]


def test_threads_that_want_the_same_plan_build_it_once() -> None:
    class Slow(EmulatedDevice):
        def build(self, graph: EmulatedGraph) -> None:
            time.sleep(0.05)

    plans, gpu, found = Plans(lambda: None), Slow(), []
    threads = [threading.Thread(target=lambda: found.append(plans.get(gpu, spec()))) for _ in range(8)]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({id(p) for p in found}) == 1 and plans.counters.built == 1


def test_a_graph_that_was_checked_is_the_one_that_is_built() -> None:
    plans, gpu = Plans(lambda: None), EmulatedDevice()
    plans.check(gpu, spec())  # type: ignore[arg-type]
    plans.check(gpu, spec())  # type: ignore[arg-type]
    plans.get(gpu, spec())  # type: ignore[arg-type]
    plans.check(gpu, spec())  # type: ignore[arg-type]
    assert len(gpu.drawn) == 1 and plans.counters.checked == 1
    for i in range(MOST_DRAFTS + 5):
        plans.check(gpu, spec(scale=0.1 + i))  # type: ignore[arg-type]
    assert len(plans._drafts) == MOST_DRAFTS


# --- On disk -----------------------------------------------------------------------------------------------------


def test_the_next_process_loads_it(tmp_path: Path) -> None:
    gpu, store = Loads(), Store(tmp_path)
    built(gpu, store)
    later = Plans(lambda: store)
    later.check(gpu, spec())  # type: ignore[arg-type]
    later.get(gpu, spec())  # type: ignore[arg-type]
    assert (later.counters.built, later.counters.loaded, later.counters.checked) == (0, 1, 0)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-3],
    "a bit": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "the head": lambda data: b"{" + data,
    "not ours": lambda data: b"\xff\xfe\n" + data,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_costs_a_rebuild_and_nothing_else(tmp_path: Path, how: str) -> None:
    gpu, store = Loads(), Store(tmp_path)
    built(gpu, store)
    (file,) = tmp_path.glob("*.plan")
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[how](whole))
    later = built(gpu, store)
    assert later.counters.built == 1 and file.read_bytes() == whole


def test_a_plan_that_the_library_will_not_load_is_built_anew(tmp_path: Path) -> None:
    gpu, store = Loads(), Store(tmp_path)
    assert store.write(gpu.versions(), spec(), b"something else")
    plans = built(gpu, store)
    assert plans.counters.built == 1
    assert store.read(gpu.versions(), spec()) != b"something else"


def test_it_goes_to_disk_after_the_call(tmp_path: Path) -> None:
    plans = Plans(lambda: Store(tmp_path), write_after=0.05)
    plans.get(Loads(), spec())  # type: ignore[arg-type]
    for _ in range(200):
        if list(tmp_path.glob("*.plan")):
            break
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*.plan"))) == 1


def test_it_goes_to_disk_when_no_more_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing would hold up whoever builds the next."""
    now, timers = [100.0], []
    others = [spec(heads_q=16), spec(causal=True)]

    def timer(after: float, then: Callable[[], None]) -> SimpleNamespace:
        timers.append((after, then))
        return SimpleNamespace(start=lambda: None)

    def sleep(seconds: float) -> None:
        """Another is built a tenth of a second before the time is over."""
        assert seconds > 0.09 and not list(tmp_path.glob("*.plan"))
        now[0] += seconds - 0.1
        if others:
            plans.get(Loads(), others.pop())  # type: ignore[arg-type]
        now[0] += 0.1

    monkeypatch.setattr(module, "Timer", timer)
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter, sleep=sleep)
    monkeypatch.setattr(module, "time", clock)
    plans = Plans(lambda: Store(tmp_path))
    plans.get(Loads(), spec())  # type: ignore[arg-type]
    ((after, write),) = timers
    now[0] += after - 0.1
    plans.get(Loads(), spec(window=(5, 5)))  # type: ignore[arg-type]
    now[0] += 0.1
    write()
    assert len(timers) == 1 and not others
    assert len(list(tmp_path.glob("*.plan"))) == plans.counters.built == 4


def test_a_plan_that_cannot_be_serialised_is_still_one(tmp_path: Path) -> None:
    class Silent(EmulatedGraph):
        def serialize(self) -> list[int]:
            raise RuntimeError("no")

    class Device(EmulatedDevice):
        def draw(self, spec: GraphSpec) -> EmulatedGraph:
            return Silent(spec)

    with pytest.warns(UserWarning, match="could not be kept on disk: no"):
        built(Device(), Store(tmp_path))


def test_another_library_or_graph_has_a_file_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(VERSIONS, spec(), b"a")
    assert store.read(("cudnn 9.20.0", *VERSIONS[1:]), spec()) is None
    assert store.read(VERSIONS, spec(causal=True)) is None
    store.file(VERSIONS, spec()).rename(store.file(VERSIONS, spec(causal=True)))  # a file in another's place
    assert store.read(VERSIONS, spec(causal=True)) is None


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    store = Store(blocked / "plans")
    assert store.write(VERSIONS, spec(), b"a") is False
    assert store.read(VERSIONS, spec()) is None
    assert built(EmulatedDevice(), store).counters.built == 1


def test_no_partial_file_is_left(tmp_path: Path) -> None:
    Store(tmp_path).write(VERSIONS, spec(), b"a" * 1000)
    assert [f.suffix for f in tmp_path.iterdir()] == [".plan"]


# --- The library's word ------------------------------------------------------------------------------------------


def test_a_refusal_is_the_librarys_and_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(EmulatedDevice):
        def draw(self, spec: GraphSpec) -> EmulatedGraph:
            if spec.backward:
                self.drawn.append(spec)
                raise Unsupported("No backward on Tuesdays")
            return super().draw(spec)

    gpu = Refuses()
    monkeypatch.setattr(answers, "device", lambda index: gpu)
    monkeypatch.setattr(answers, "PLANS", Plans(lambda: None))
    monkeypatch.setattr(answers, "_other_library", lambda gpu: None)
    monkeypatch.setattr(answers, "_refused", type(answers._refused)())
    there = Environment.simulate("sm90")
    assert answers.answer(request(), there) == ()
    for _ in range(3):
        (reason,) = answers.answer(request(training=True), there)
        assert reason.rule == "CUDNN_SUPPORT"
        assert reason.message == "cuDNN 9.19.0 refuses the backward: No backward on Tuesdays"
    assert sum(s.backward for s in gpu.drawn) == 1


def test_words_are_one_line_without_the_graph() -> None:
    said = 'no plan (the backend declined: No valid engine configs for _____ {"engineId":0,\n"nodes": []})'
    assert words(RuntimeError(said)) == "No valid engine configs"
    assert words(RuntimeError("")) == "RuntimeError"


def test_every_field_of_a_spec_is_in_its_key() -> None:
    assert all(f.compare for f in fields(GraphSpec))
