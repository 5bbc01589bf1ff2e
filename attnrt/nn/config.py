"""What a module looks like, in the names of Megatron's YAML: `num_query_groups` null, 1 or a divisor of the heads."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attnrt.errors import ArgumentTypeError, ConfigError, UnknownNameError

Size = Annotated[int, Field(gt=0, strict=True)]
Bound = Annotated[int, Field(strict=True)]
MaskType = Literal[
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
]
SoftmaxType = Literal["vanilla", "off-by-one", "learnable"]


class _Config(BaseModel):
    """Frozen; an unknown or wrong field is a `ConfigError` that names every one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_told(type(self).__name__, error)) from None

    def but(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**{n: getattr(self, n) for n in self.model_fields_set}, **changes})


def _told(name: str, error: ValidationError) -> str:
    lines = []
    for one in error.errors():
        field = ".".join(str(part) for part in one["loc"])
        value = "" if one["type"] == "missing" or not field else f"={one['input']!r}"
        lines.append(f"{field}{value}: {one['msg'].removeprefix('Value error, ')}".removeprefix(": "))
    return f"{name}: " + "; ".join(lines)


class RopeScaling(_Config):
    """Stretches the rotary frequencies for contexts longer than the training's.

    type: "linear" divides every frequency by `factor`; "llama3" leaves the fast ones alone, as Llama 3.1 does.
    """

    type: Literal["linear", "llama3"]
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    original_max_position_embeddings: Size = 8192

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        unused = {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"} & self.model_fields_set
        if self.type == "linear" and unused:
            raise ValueError(f"type='linear' has no use for {', '.join(sorted(unused))}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor must be over low_freq_factor={self.low_freq_factor}")
        return self


class AttentionConfig(_Config):
    """One attention layer.

    Attributes:
        hidden_size: of the model. num_attention_heads: query heads.
        num_query_groups: KV heads; None: as many as heads (MHA), 1: MQA, else a divisor of the heads (GQA).
        kv_channels: head dim; None: hidden_size / num_attention_heads.
        attn_mask_type: as in Transformer Engine; "causal" and "padding_causal" align top-left, "*_bottom_right" not.
        window_size: (left, right) keys seen beside a query's own, -1: unbounded. window_attn_skip_freq: n leaves every
            n-th layer without the window; a list of 0 and 1 says it for each layer, 1 having the window.
        attention_dropout: of the weights, in training mode only. softmax_scale: None: 1 / sqrt(kv_channels).
        softmax_type: "off-by-one" adds a zero logit to the denominator, "learnable" a learned one per head (a sink).
        softcap: s becomes softcap * tanh(s / softcap) on the scaled scores.
        add_bias_linear: projections have biases. add_qkv_bias: those of q, k and v, None: as add_bias_linear.
        fused_qkv: one projection whose rows are, group by group, [queries of the group, key, value].
        qk_layernorm: normalise each head of q and k, by `normalization`, with `layernorm_epsilon`.
        position_embedding_type: "rope" with rotary_base, rotary_percent of the head dim, rotary_interleaved pairs
            (GPT-J's) or halves (NeoX's), and rope_scaling; or "none".
        qkv_format: "bshd": the hidden states are (B, S, hidden); "sbhd": (S, B, hidden), as in Megatron.
        backend, policy: handed to `attnrt.attention`.
    """

    hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Annotated[int, Field(strict=True)] | None = None
    kv_channels: Size | None = None
    attn_mask_type: MaskType = "causal"
    window_size: tuple[Bound, Bound] | None = None
    window_attn_skip_freq: Size | tuple[Literal[0, 1], ...] | None = None
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    softmax_scale: Annotated[float, Field(gt=0)] | None = None
    softmax_type: SoftmaxType = "vanilla"
    softcap: Annotated[float, Field(gt=0)] | None = None
    add_bias_linear: bool = False
    add_qkv_bias: bool | None = None
    fused_qkv: bool = True
    qk_layernorm: bool = False
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    layernorm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    position_embedding_type: Literal["rope", "none"] = "rope"
    rotary_base: Annotated[float, Field(gt=1)] = 10000.0
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    rotary_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    qkv_format: Literal["bshd", "sbhd"] = "bshd"
    backend: str | None = None
    policy: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads = self.num_attention_heads
        wrong = []
        if self.groups < 1 or heads % self.groups:
            wrong.append(
                f"num_query_groups={self.num_query_groups}: must divide num_attention_heads={heads}, so be one of "
                f"{divisors(heads)}, or null for one group per head"
            )
        if self.kv_channels is None and self.hidden_size % heads:
            wrong.append(
                f"num_attention_heads={heads}: must divide hidden_size={self.hidden_size}, so be one of "
                f"{divisors(self.hidden_size)}, or kv_channels must say the head dim"
            )
        elif self.position_embedding_type == "rope" and (self.rotary_dim % 2 or not self.rotary_dim):
            wrong.append(
                f"rotary_percent={self.rotary_percent}: turns {self.rotary_dim} of {self.head_dim} dims, and an even "
                "number of at least 2 is needed"
            )
        if self.window_size is not None and min(self.window_size) < -1:
            wrong.append(f"window_size={list(self.window_size)}: bounds are 0 or more, or -1 for unbounded")
        if self.window_attn_skip_freq is not None and self.window_size is None:
            wrong.append(f"window_attn_skip_freq={self.window_attn_skip_freq}: there is no window_size to skip")
        if self.rope_scaling is not None and self.position_embedding_type != "rope":
            wrong.append(f"rope_scaling: position_embedding_type={self.position_embedding_type!r} has no use for it")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def groups(self) -> int:
        """KV heads."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.groups

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_percent)

    @property
    def qkv_bias(self) -> bool:
        return self.add_bias_linear if self.add_qkv_bias is None else self.add_qkv_bias

    def window_of(self, layer: int) -> tuple[int, int] | None:
        """window_size of layer `layer`, counted from 0."""
        skip = self.window_attn_skip_freq
        if self.window_size is None or skip is None:
            return self.window_size
        if isinstance(skip, int):
            return None if (layer + 1) % skip == 0 else self.window_size
        if layer >= len(skip):
            raise ConfigError(
                f"window_attn_skip_freq={list(skip)}: has {len(skip)} entries, and none for layer {layer}"
            )
        return self.window_size if skip[layer] else None


class ModelConfig(AttentionConfig):
    """A decoder's shape: its attention layers, and what a language model has around them."""

    num_layers: Size
    ffn_hidden_size: Size
    vocab_size: Size
    max_position_embeddings: Size = 4096
    share_embeddings_and_output_weights: bool = False

    @model_validator(mode="after")
    def _layers(self) -> Self:
        skip = self.window_attn_skip_freq
        if isinstance(skip, tuple) and len(skip) != self.num_layers:
            raise ValueError(
                f"window_attn_skip_freq={list(skip)}: has {len(skip)} entries for num_layers={self.num_layers}"
            )
        return self


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def model_names() -> tuple[str, ...]:
    """The models under configs/models."""
    found = (Path(str(file)).stem for file in files("attnrt.configs").joinpath("models").iterdir())
    return tuple(sorted(name for name in found if not name.startswith("_")))


class _Once(yaml.SafeLoader):
    """YAML in which no field is there twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)}: there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8: {error}") from None


def load_config(source: str | os.PathLike[str], **changes: Any) -> ModelConfig:
    """A model's config by its name under configs/models, or from a YAML file, with fields changed as wanted.

    Raises:
        UnknownNameError: no such name or file. ConfigError: a field is wrong; every wrong one is named.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentTypeError("source", source, "a model's name or the path of a YAML file is needed")
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UnknownNameError("source", str(source), (*model_names(), "or a YAML file that exists"))
        text = _read(path)
    elif str(source) in model_names():
        text = files("attnrt.configs").joinpath("models", f"{source}.yaml").read_text()
    else:
        raise UnknownNameError("source", str(source), model_names())
    try:
        fields = yaml.load(text, _Once)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ConfigError(f"{source}: must be a mapping of fields to values")
    try:
        return ModelConfig(**{**fields, **changes})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
