"""Configs: num_query_groups as Megatron's YAML has it, and errors that say what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from attnrt.errors import ArgumentTypeError, AttnrtError, ConfigError, UnknownNameError
from attnrt.nn import AttentionConfig, ModelConfig, SelfAttention, load_config, model_names

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"


@pytest.mark.parametrize(("groups", "kv_heads"), [(None, 8), (1, 1), (2, 2), (4, 4), (8, 8)])
def test_a_sweep_changes_one_line(groups: int | None, kv_heads: int, tmp_path: Path) -> None:
    lines = (MODELS / "small_gqa.yaml").read_text().splitlines()
    line = next(i for i, text in enumerate(lines) if text.startswith("num_query_groups"))
    lines[line] = f"num_query_groups: {'null' if groups is None else groups}"
    (tmp_path / "sweep.yaml").write_text("\n".join(lines))
    config = load_config(tmp_path / "sweep.yaml")
    assert config.groups == kv_heads
    assert config.but(num_query_groups=3 - 1).groups == 2
    with torch.device("meta"):
        layer = SelfAttention(config)
    assert layer.linear_qkv.out_features == (8 + 2 * kv_heads) * config.head_dim


@pytest.mark.parametrize("groups", [0, -2, 3, 5, 16, True, 2.0, "2"])
def test_wrong_groups_are_refused(groups: object) -> None:
    with pytest.raises(ConfigError, match="num_query_groups") as caught:
        AttentionConfig(hidden_size=64, num_attention_heads=8, num_query_groups=groups)
    assert isinstance(caught.value, AttnrtError) and isinstance(caught.value, ValueError)
    if type(groups) is int:
        assert "[1, 2, 4, 8]" in str(caught.value), "the divisors are listed"


def test_every_wrong_field_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        AttentionConfig(hidden_size=64, num_attention_heads=0, atention_dropout=0.1, attention_dropout=1.5)  # type: ignore[call-arg]
    for name in ("num_attention_heads", "atention_dropout", "attention_dropout"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_size": 65}, "be one of"),
        ({"rotary_percent": 0.1}, "an even number"),
        ({"window_size": (-2, 0)}, "-1 for unbounded"),
        ({"window_size": (True, 0)}, "integer"),
        ({"window_size": ("3", "0")}, "integer"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}}, "no use for low_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "position_embedding_type": "none"}, "no use for it"),
        ({"window_attn_skip_freq": 2}, "no window_size"),
        ({"attn_mask_type": "causall"}, "causal"),
        ({"softmax_type": "sink"}, "learnable"),
        ({"softcap": 0.0}, "greater than 0"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 1.0}}, "over low_freq_factor"),
    ],
)
def test_wrong_values(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))) as caught:
        AttentionConfig(**{"hidden_size": 64, "num_attention_heads": 8, **fields})
    assert said in str(caught.value)


def test_windows_by_layer() -> None:
    base = AttentionConfig(hidden_size=64, num_attention_heads=8, window_size=(7, 0))
    assert base.window_of(5) == (7, 0)
    every_third = base.but(window_attn_skip_freq=3)
    assert [every_third.window_of(i) for i in range(6)] == [(7, 0), (7, 0), None] * 2
    listed = base.but(window_attn_skip_freq=(1, 0))
    assert [listed.window_of(i) for i in range(2)] == [(7, 0), None]
    with pytest.raises(ConfigError, match="layer 2"):
        listed.window_of(2)


def test_the_shipped_models() -> None:
    assert set(model_names()) == {file.stem for file in MODELS.glob("*.yaml")}
    groups = {load_config(name).num_query_groups for name in model_names()}
    assert {None, 1} < groups and any(g not in (None, 1) for g in groups)
    for name in model_names():
        config = load_config(name)
        assert isinstance(config, ModelConfig)
        assert set(yaml.safe_load((MODELS / f"{name}.yaml").read_text())) == config.model_fields_set


def test_loading_errors(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean small_gqa"):
        load_config("small_gqaa")
    with pytest.raises(UnknownNameError):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ArgumentTypeError):
        load_config(3)  # type: ignore[arg-type]
    bad = tmp_path / "bad.yaml"
    for text, said in (
        ("a: [", "bad.yaml"),
        ("- 1", "mapping"),
        ("1: 2", "mapping"),
        ("num_layers: 2", "hidden_size"),
        ("num_query_groups: 2\nnum_query_groups: 4", "num_query_groups: there twice"),
        ("name: \udcff", "UTF-8"),
    ):
        bad.write_text(text, errors="surrogateescape")
        with pytest.raises(ConfigError, match=said):
            load_config(bad)
    with pytest.raises(ConfigError, match=r"small_gqa: .*\[1, 2, 4, 8\]"):
        load_config("small_gqa", num_query_groups=3)


def test_configs_do_not_change() -> None:
    config = load_config("small_gqa")
    with pytest.raises(Exception, match="frozen"):
        config.num_query_groups = 1  # type: ignore[misc]
