"""Loading by name, path and object; the policies that ship; which line decides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnrt.environment import NAMED, Environment
from attnrt.errors import ArgumentTypeError, PolicyError, UnknownNameError
from attnrt.policies.base import Policy, Ranking
from attnrt.policies.preference import Line, PreferencePolicy, builtin_policies, forget_policies, load_policy
from attnrt.request import AttentionRequest

GENERATIONS = ("flash_attn_4", "flash_attn_3", "flash_attn_2")
KERNELS = ("torch.cudnn", "torch.flash")
KNOWN = ("cudnn", *GENERATIONS, "flash_attn", "triton", "torch", *KERNELS, "reference")
SHAPES: dict[str, dict[str, Any]] = {
    "decode": {"seqlen_q": 1, "seqlen_kv": 8192},
    "short": {"seqlen_q": 256, "training": True},
    "general": {"seqlen_q": 4096, "training": True},
    "long": {"seqlen_q": 32768, "training": True},
}


def request(**changes: Any) -> AttentionRequest:
    shape: dict[str, Any] = {"batch": 2, "heads_q": 32, "heads_kv": 8, "seqlen_q": 4096, "head_dim": 128}
    return AttentionRequest.from_shape(**{**shape, **changes})


def rank(policy: str, environment: str, **changes: Any) -> Ranking:
    return load_policy(policy, KNOWN).rank(request(**changes), Environment.named(environment))


def write(path: Path, prefer: str, more: str = "") -> Path:
    path.write_text(
        f"name: mine\ndescription: A test.\n{more}lines:\n  - name: all\n    prefer: [{prefer}]\n    why: Measured.\n"
    )
    return path


def test_the_builtin_policies() -> None:
    assert builtin_policies() == ("default", "deterministic", "no_vendor")
    assert [load_policy(name, KNOWN).deterministic for name in builtin_policies()] == [False, True, False]
    for name in builtin_policies():
        policy = load_policy(name, KNOWN)
        assert policy.name == name
        assert policy.on_failure == "raise"
        assert policy.description
        assert Path(policy.source).name == f"{name}.yaml"


@pytest.mark.parametrize("policy", ["default", "deterministic", "no_vendor"])
def test_every_line_has_evidence_and_ends_in_the_reference(policy: str) -> None:
    loaded = load_policy(policy, KNOWN)
    assert isinstance(loaded, PreferencePolicy)
    assert len({line.name for line in loaded.lines}) == len(loaded.lines)
    for line in loaded.lines:
        assert len(line.why) > 20
        assert line.order[-1] == "reference"
        assert ("*" in line.order) == (policy != "no_vendor")
        if "*" in line.order:
            assert line.order[-2] == "*"


def test_every_line_of_the_default_policy_decides_somewhere() -> None:
    policy = load_policy("default", KNOWN)
    assert isinstance(policy, PreferencePolicy)
    environments = [
        *map(Environment.named, NAMED),
        Environment.simulate("sm75"),
        Environment(name="a ROCm GPU", device_type="cuda"),
    ]
    sinks = [
        {"sinks": True, "seqlen_q": n, "seqlen_kv": 4096, "training": training}
        for n in (1, 512, 4096)
        for training in (False, True)
    ]
    narrow = [{"head_dim": 64, "seqlen_q": 8192, "training": training} for training in (False, True)]
    capped = [{"softcap": 30.0, "seqlen_q": n} for n in (1024, 2048)]
    pages = [{"page_size": 64, "seqlen_q": n, "seqlen_kv": 4096, "alignment": "bottom_right"} for n in (4, 1024)]
    exact = {"deterministic": True, "training": True}
    shapes = [*SHAPES.values(), {"dropout_p": 0.125}, exact, *narrow, *capped, *sinks, *pages]
    reached = {policy.rank(request(**shape), e).line for e in environments for shape in shapes}
    assert reached == {f"default: {line.name}" for line in policy.lines}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("environment", ["h100", "h200", "b200", "rtx5090"])
def test_cudnn_leads_from_sm90_on(environment: str, shape: str) -> None:
    order = rank("default", environment, **SHAPES[shape]).order
    assert order[0] == "cudnn"
    assert set(GENERATIONS) <= set(order)
    assert order.index("triton") < order.index("torch") < order.index("reference")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("environment", ["a100", "l40s", "rtx4090"])
def test_flash_attn_leads_on_sm80_to_sm89(environment: str, shape: str) -> None:
    order = rank("default", environment, **SHAPES[shape]).order
    assert order[0] == "flash_attn_2"
    assert order.index("flash_attn_2") < order.index("cudnn") < order.index("triton") < order.index("torch")
    assert set(GENERATIONS) <= set(order)


def test_generations_of_flash_attn() -> None:
    hopper = rank("default", "h200").order
    assert hopper.index("flash_attn_3") < hopper.index("flash_attn_4")
    blackwell = rank("default", "b200").order
    assert blackwell.index("flash_attn_4") < blackwell.index("flash_attn_2")
    for environment in ("h200", "b200", "a100"):
        decode = rank("default", environment, **SHAPES["decode"]).order
        assert decode.index("flash_attn_4") > decode.index("triton")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seqlen_q": 16}, "default: Hopper, decode"),
        ({"seqlen_q": 16, "training": True}, "default: Hopper, short"),
        ({"seqlen_q": 17}, "default: Hopper, short"),
        ({"seqlen_q": 2047}, "default: Hopper, short"),
        ({"seqlen_q": 2048}, "default: Hopper"),
        ({"seqlen_q": 16383}, "default: Hopper"),
        ({"seqlen_q": 16384}, "default: Hopper, long"),
    ],
)
def test_classes_of_length(changes: dict[str, Any], line: str) -> None:
    assert rank("default", "h200", **changes).line == line


def test_without_a_gpu() -> None:
    assert rank("default", "cpu").order == ("torch", "*", "reference")
    assert rank("default", "cpu").line == "default: CPU"
    assert rank("no_vendor", "cpu").order == ("torch", "triton", "reference")
    assert rank("no_vendor", "h200").order == ("triton", "torch", "reference")


def test_deterministic_avoids_the_big_workspace_on_hopper() -> None:
    assert rank("deterministic", "h200", seqlen_q=8192, training=True).order[0] != "cudnn"
    assert rank("deterministic", "h200", seqlen_q=2048, training=True).order[0] == "cudnn"
    assert rank("deterministic", "b200", seqlen_q=8192, training=True).order[0] == "cudnn"


@pytest.mark.parametrize("spec", ["defualt", "Default", "", "default.yml.bak"])
def test_an_unknown_name_lists_the_builtin_ones(spec: str) -> None:
    with pytest.raises(UnknownNameError, match="valid are default, deterministic, no_vendor") as caught:
        load_policy(spec, KNOWN)
    if spec == "defualt":
        assert "did you mean default?" in str(caught.value)


@pytest.mark.parametrize("spec", [None, 3, ["default"], PreferencePolicy])
def test_neither_name_nor_path_nor_policy(spec: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="policy="):
        load_policy(spec, KNOWN)


def test_a_policy_passes_through_and_hashes_by_identity() -> None:
    class Mine(Policy):
        name = "mine"

        def rank(self, request: AttentionRequest, environment: Environment) -> Ranking:
            return Ranking(("reference",), "mine: all", "Because.")

    mine = Mine()
    assert load_policy(mine, ()) is mine
    assert (mine.on_failure, mine.deterministic, mine.source) == ("raise", False, "<object>")
    assert len({mine, Mine(), mine}) == 2
    line = Line("all", ("torch",), "Because.")
    one, two = (PreferencePolicy(name="a", description="b", lines=(line,)) for _ in range(2))
    assert one != two
    assert len({one, two, one}) == 2


def test_the_last_line_holds_always() -> None:
    line = Line("some", ("torch",), "Because.", {"causal": True}, lambda request, environment: request.causal)
    for lines in ((), (line,)):
        with pytest.raises(PolicyError, match="last line must hold always"):
            PreferencePolicy(name="a", description="b", lines=lines)


def test_a_path_by_ending_or_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "mine.yaml", "torch")
    bare = write(tmp_path / "mine", "triton")
    monkeypatch.chdir(tmp_path)
    assert load_policy(file, KNOWN) is load_policy(str(file), KNOWN) is load_policy("mine.yaml", KNOWN)
    assert load_policy(f".{os.sep}mine", KNOWN).source == str(bare)
    assert load_policy(bare, KNOWN).rank(request(), Environment.named("cpu")) == (("triton",), "mine: all", "Measured.")


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "torch")
    first = load_policy(file, KNOWN)
    assert load_policy(file, KNOWN) is first
    write(file, "triton, torch")
    second = load_policy(file, KNOWN)
    assert second is not first
    assert second.rank(request(), Environment.named("cpu")).order == ("triton", "torch")
    forget_policies()
    assert load_policy(file, KNOWN) is not second


def test_a_backend_that_is_gone_is_refused_though_the_file_was_loaded(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", "torch, my_backend")
    assert load_policy(file, (*KNOWN, "my_backend"))
    with pytest.raises(PolicyError, match=r"mine.yaml:5: unknown backend 'my_backend'"):
        load_policy(file, KNOWN)


def test_extends_inherits_what_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndescription: A test.\nextends: deterministic\non_failure: next\n")
    policy = load_policy(file, KNOWN)
    assert (policy.on_failure, policy.deterministic) == ("next", True)
    parent = load_policy("deterministic", KNOWN).rank(request(), Environment.named("h200"))
    assert policy.rank(request(), Environment.named("h200")) == parent._replace(line="mine: Hopper")
    own = load_policy(write(file, "torch", "extends: deterministic\ndeterministic: false\n"), KNOWN)
    assert own.deterministic is False
    assert own.rank(request(), Environment.named("h200")).order == ("torch",)


def test_padding_is_allowed_by_those_that_say_so(tmp_path: Path) -> None:
    assert not any(load_policy(name, KNOWN).allow_padding for name in builtin_policies())
    file = tmp_path / "pads.yaml"
    file.write_text("name: mine\ndescription: A test.\nextends: default\nallow_padding: true\n")
    assert load_policy(file, KNOWN).allow_padding
    file.write_text("name: mine\ndescription: A test.\nextends: default\nallow_padding: 1\n")
    with pytest.raises(PolicyError, match="allow_padding: true or false is needed, not 1"):
        load_policy(file, KNOWN)


def test_a_policy_object_needs_neither_yaml_nor_pydantic() -> None:
    code = (
        "import sys, attnrt.advisories; from attnrt.policies.preference import Line, PreferencePolicy, load_policy;"
        "load_policy(PreferencePolicy(name='a', description='b', lines=(Line('all', ('torch',), 'x'),)), ());"
        "assert not {'yaml', 'pydantic'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
