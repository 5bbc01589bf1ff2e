"""The advisories that ship: each has a source and bounds, meets the case it is about, and spares the neighbours."""

from __future__ import annotations

from typing import Any

import pytest

from attnrt.advisories import Advisory, load_advisories, matching
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

BY_ID = {advisory.id: advisory for advisory in load_advisories()}


def request(**changes: Any) -> AttentionRequest:
    shape: dict[str, Any] = {"batch": 2, "heads_q": 32, "heads_kv": 8, "seqlen_q": 4096, "head_dim": 128}
    return AttentionRequest.from_shape(**{**shape, "causal": True, "training": True, **changes})


def found(
    backend: str = "cudnn",
    kernel: str | None = None,
    arch: str = "sm90",
    packages: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, Advisory]:
    environment = Environment.simulate(arch, packages=packages)
    return {a.id: a for a in matching(backend, kernel or backend, request(**changes), environment)}


def test_every_advisory_is_sourced_and_bounded() -> None:
    assert len(BY_ID) >= 25
    for advisory in BY_ID.values():
        assert advisory.source.startswith("https://github.com/")
        assert advisory.packages or advisory.when
        assert advisory.backends
        assert advisory.action in ("refuse", "warn")
        for sentence in (advisory.effect, advisory.remedy):
            assert sentence.endswith(".")


def test_they_are_read_once() -> None:
    assert load_advisories() is load_advisories()


@pytest.mark.parametrize("changes", [{}, {"training": False}, {"seqlen_q": 4000}, {"seqlen_q": 4160}, {"head_dim": 64}])
@pytest.mark.parametrize("arch", ["sm80", "sm89", "sm90", "sm100", "sm103", "sm120"])
def test_flagship_calls_stay_clean(arch: str, changes: dict[str, Any]) -> None:
    assert not found(arch=arch, **changes)
    assert not found("torch", "cudnn", arch=arch, **changes)
    assert not found("flash_attn_2", arch=arch, **changes)


@pytest.mark.parametrize(
    ("extra", "id"), [({"bias": True}, "CUDNN_BWD_NAN_BIAS_SKV_64"), ({"mask": True}, "CUDNN_BWD_NAN_MASK_SKV_64")]
)
def test_nan_gradients_with_a_bias_or_mask(extra: dict[str, Any], id: str) -> None:
    case: dict[str, Any] = {"seqlen_q": 704, "causal": False, **extra}
    assert found(**case)[id].action == "refuse"
    assert id in found("torch", "cudnn", **case)
    assert id not in found("torch", "flash", **case)
    assert id not in found("torch", "torch", **case)
    for neighbour in (
        {"seqlen_q": 640},
        {"seqlen_q": 703},
        {"training": False},
        {"arch": "sm100"},
        {"arch": "sm80"},
        {"packages": {"cudnn": "9.26.0"}},
        {"packages": {"cudnn": None}},
    ):
        assert id not in found(**{**case, **neighbour})


def test_without_a_bias_it_is_a_warning() -> None:
    assert set(found(seqlen_q=704, causal=False)) == {"CUDNN_BWD_NAN_LOW_LSE_SKV_64"}
    assert found(seqlen_q=704, causal=False)["CUDNN_BWD_NAN_LOW_LSE_SKV_64"].action == "warn"
    assert not found(seqlen_q=704, causal=True)
    assert not found(seqlen_q=704, causal=False, padded=True, packages={"cudnn": "9.25.0"})


def test_few_kv_heads_on_b200() -> None:
    assert found(arch="sm100", heads_kv=4, training=False)["CUDNN_FEW_KV_HEADS_SM100"].action == "refuse"
    assert found(arch="sm100", heads_kv=4)["CUDNN_FEW_KV_HEADS_UNCONFIRMED"].action == "warn"
    assert "CUDNN_FEW_KV_HEADS_SM100" in found("torch", "cudnn", arch="sm100", heads_kv=1, training=False)
    for neighbour in ({"heads_kv": 8}, {"arch": "sm90"}, {"arch": "sm120"}):
        assert not found(**{"arch": "sm100", "heads_kv": 4, "training": False, **neighbour})


@pytest.mark.parametrize("varlen", [{"packed": True}, {"padded": True}])
def test_sequences_of_length_zero(varlen: dict[str, Any]) -> None:
    assert found(arch="sm100", **varlen)["CUDNN_EMPTY_SEQUENCE"].action == "warn"
    assert "CUDNN_EMPTY_SEQUENCE" not in found(**varlen)  # the backend clears; seen on an H200
    assert "CUDNN_EMPTY_SEQUENCE" not in found(arch="sm100", packages={"cudnn": "9.25.0"}, **varlen)
    beta = {"flash-attn-3": "3.0.0b1"}
    assert found("flash_attn_3", packages=beta, **varlen)["FA3_BWD_HANG_EMPTY_SEQUENCE"].action == "warn"
    assert not found("flash_attn_3", packages=beta, training=False, **varlen)
    assert not found("flash_attn_3", **varlen)


@pytest.mark.parametrize(
    ("dims", "refused"),
    [
        ((192, 128), False),
        ((192, 160), True),
        ((256, 128), True),
        ((128, 256), True),
        ((160, 128), True),
        ((64, 128), False),
        ((192, 192), False),
        ((128, 64), False),
    ],
)
def test_unequal_head_dims_on_sm90(dims: tuple[int, int], refused: bool) -> None:
    case: dict[str, Any] = {"head_dim": dims[0], "head_dim_v": dims[1]}
    assert bool(found(**case)) is refused
    assert not found(training=False, **case)
    assert not found(arch="sm100", **case)


@pytest.mark.parametrize(
    ("id", "case", "neighbours"),
    [
        (
            "CUDNN_9_10_0_AND_1",
            {"packages": {"cudnn": "9.10.1"}},
            [{"packages": {"cudnn": "9.10.2"}}, {"packages": {"cudnn": "9.9.0"}}],
        ),
        (
            "CUDNN_9_14_0_WINDOW",
            {"packages": {"cudnn": "9.14.0"}, "causal": False, "window": (128, 128)},
            [{"packages": {"cudnn": "9.15.0"}}, {"causal": True}, {"window": None}, {"seqlen_q": 1024}],
        ),
        (
            "CUDNN_CUDA_GRAPH_LONG_KV",
            {"packages": {"cudnn": "9.13.1"}, "causal": False, "capturing": True},
            [{"packages": {"cudnn": "9.15.0"}}, {"causal": True}, {"capturing": False}, {"seqlen_q": 512}],
        ),
        (
            "CUDNN_BWD_CUDA_GRAPH_SKV",
            {"packages": {"cudnn": "9.15.0"}, "capturing": True, "seqlen_q": 4000},
            [{"packages": {"cudnn": "9.15.1"}}, {"capturing": False}, {"seqlen_q": 4096}, {"training": False}],
        ),
        (
            "CUDNN_FRONTEND_BWD_RESHAPE",
            {"packages": {"nvidia-cudnn-frontend": "1.25.0"}},
            [
                {"training": False},
                {"packages": {"nvidia-cudnn-frontend": "1.23.0"}},
                {"packages": {"nvidia-cudnn-frontend": "1.25.0", "cudnn": "9.22.0"}},
            ],
        ),
        (
            "CUDNN_BWD_PACKED_SINKS",
            {"packed": True, "sinks": True, "head_dim": 192, "head_dim_v": 192},
            [
                {"sinks": False},
                {"packed": False},
                {"head_dim_v": 128},
                {"training": False},
                {"packages": {"cudnn": "9.26"}},
            ],
        ),
        (
            "CUDNN_BWD_PACKED_SM120",
            {"arch": "sm120", "packed": True},
            [{"arch": "sm90"}, {"packed": False}, {"training": False}],
        ),
        (
            "CUDNN_BWD_NAN_SINGLE_QUERY",
            {"seqlen_q": 1, "seqlen_kv": 128, "causal": False},
            [{"training": False}, {"seqlen_q": 2}, {"padded": True}, {"arch": "sm100"}],
        ),
        (
            "CUDNN_BWD_CRASH_SINGLE_QUERY_AND_HEAD",
            {"packages": {"cudnn": "9.26.0"}, "batch": 1, "heads_q": 1, "heads_kv": 1, "seqlen_q": 1},
            [{"batch": 2}, {"heads_q": 2}, {"seqlen_q": 2}, {"training": False}, {"packages": {}}],
        ),
    ],
)
def test_cudnn_cases_and_their_neighbours(id: str, case: dict[str, Any], neighbours: list[dict[str, Any]]) -> None:
    assert id in found(**case)
    for neighbour in neighbours:
        assert id not in found(**{**case, **neighbour})


def test_dropout_in_pytorchs_cudnn_kernel() -> None:
    old = {"cudnn": "9.12.0"}
    assert found("torch", "cudnn", packages=old, dropout_p=0.5)["CUDNN_DROPOUT_HEURISTICS"].action == "refuse"
    assert not found("torch", "efficient", packages=old, dropout_p=0.5)
    assert "CUDNN_DROPOUT_HEURISTICS" not in found("torch", "cudnn", packages=old)
    assert not found("torch", "cudnn", packages={"cudnn": "9.10.2"}, dropout_p=0.5, training=False)
    assert not found("torch", "cudnn", dropout_p=0.5)


def test_flash_attn_and_triton() -> None:
    beta = {"flash-attn-3": "3.0.0b1"}
    assert found("flash_attn_3", packages=beta, deterministic=True)["FA3_NONDETERMINISTIC"].action == "refuse"
    doubted = found("flash_attn_3", deterministic=True)
    assert {id: a.action for id, a in doubted.items()} == {"FA3_NONDETERMINISTIC_UNCONFIRMED": "warn"}
    assert not found("flash_attn_3")
    assert not found("flash_attn_2", deterministic=True)
    assert found("flash_attn_4", arch="sm80", packed=True)["FA4_VARLEN_SM80"].action == "refuse"
    assert "FA4_VARLEN_SM80" not in found("flash_attn_4", arch="sm90", packed=True)
    assert found("flash_attn_4", arch="sm120", packed=True, batch=4)["FA4_VARLEN_SM120"].action == "warn"
    assert "FA4_VARLEN_SM120" not in found("flash_attn_4", arch="sm120", packed=True, batch=3)
    assert found("triton")["TRITON_PTXAS_12_8"].action == "warn"
    assert not found("triton", packages={"triton": "3.8.0"})
    assert not found("triton", arch="sm100")


def test_nothing_holds_on_a_cpu() -> None:
    for backend, kernel in (("cudnn", "cudnn"), ("torch", "math"), ("triton", "triton"), ("reference", "reference")):
        assert not found(backend, kernel, arch="cpu")
