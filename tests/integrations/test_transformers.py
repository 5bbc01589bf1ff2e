"""attn_implementation="attnrt" against "eager": logits, gradients, generation, masks that stay structured, and what is
refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
import attnrt.integrations.transformers as integration
from attnrt.errors import ArgumentError, ArgumentTypeError, IntegrationError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from families import (  # noqa: E402
    DECODER,
    ENCODERS,
    FAMILIES,
    LENGTH,
    TWO_STACKS,
    VISION,
    WITHOUT_SDPA,
    inputs,
    make,
    padding,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
transformers.logging.set_verbosity_error()
integration.register()
FLOOR = 2e-6
"""Error always allowed in float32, relative to the largest value (at least 1)."""


def results(model: Any, call: dict[str, Any], real: Tensor | None) -> dict[str, Tensor]:
    """Logits at real tokens, and the gradient of every parameter and the input embeddings."""
    torch.manual_seed(2)
    out = model(**call)
    logits = getattr(out, "logits", None)
    logits = out.last_hidden_state if logits is None else logits
    if real is not None:
        logits = logits[real.bool()]
    weight = torch.randn(logits.shape).to(logits.dtype)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((logits * weight).sum(), list(named.values()), allow_unused=True)
    return {"logits": logits.detach(), **{n: g for n, g in zip(named, found, strict=True) if g is not None}}


def exactly(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The formula, in the dtype of its inputs throughout; transformers' eager has its softmax in float32. A query that
    sees nothing gives zeros."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool)
    dead = ~attention_mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~attention_mask & ~dead, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]].masked_fill(dead, 0)
    return (weights @ value).transpose(1, 2), None


def whole_mask(*args: Any, **options: Any) -> Tensor:
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return transformers.masking_utils.sdpa_mask(*args, **options)


transformers.AttentionInterface.register("exactly", exactly)
transformers.AttentionMaskInterface.register("exactly", whole_mask)


def agree(model: Any, call: dict[str, Any], real: Tensor | None = None, sdpa: bool = True) -> None:
    """Against float64: at most twice as far off as transformers' own eager and sdpa, for each tensor."""
    model.set_experts_implementation("eager")  # transformers' grouped products have no float64
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("exactly")
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in call.items()}
    truth = results(exact, wide, real)
    found = {}
    for name in ("eager", *(["sdpa"] if sdpa else []), "attnrt"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        found[name] = results(model, call, real)
    assert found["attnrt"].keys() == truth.keys()
    for part, want in truth.items():
        error = {name: (found[name][part].double() - want).abs().max().item() for name in found}
        allowed = 2 * max(error["eager"], error.get("sdpa", 0.0)) + FLOOR * max(1.0, want.abs().max().item())
        assert error["attnrt"] <= allowed, (part, error, allowed)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[attnrt.AttentionRequest]:
    """What each call of attention through the integration asked for."""
    asked = []

    def recorded(*args: Any, **options: Any) -> Any:
        out = attnrt.attention(*args, **options)
        asked.append(attnrt.last_decision().request)  # type: ignore[union-attr]
        return out

    monkeypatch.setattr(integration, "attention", recorded)
    return asked


@pytest.fixture
def no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", refuse)


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients(name: str, kind: str) -> None:
    model = make(name)
    real = None if model.config.is_encoder_decoder else padding(kind)
    agree(model, inputs(model, kind), real, sdpa=name not in WITHOUT_SDPA)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ENCODERS])
def test_greedy_generation(name: str, cache: str | None, kind: str, requests: list[Any]) -> None:
    model = make(name)
    call = {k: v for k, v in inputs(model, kind).items() if k != "decoder_input_ids"}
    if kind == "none":
        call["attention_mask"] = torch.ones_like(call["input_ids"])
    options = {"max_new_tokens": 14, "do_sample": False, **({"cache_implementation": cache} if cache else {})}
    tokens = {}
    for implementation in ("eager", "attnrt"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(**call, **options)
    assert requests and torch.equal(tokens["attnrt"], tokens["eager"])


@pytest.mark.parametrize("kind", ["none", "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("no_dense_mask")
def test_masks_stay_structured(name: str, kind: str, requests: list[attnrt.AttentionRequest]) -> None:
    """Prefill, decode with a growing and with a static cache: no (Sq, Skv) mask anywhere, none at all unless padding
    is on the left or in the middle."""
    if name == "llama4, chunks" and kind != "none":
        pytest.skip("chunks that begin after padding are not structured")
    model = make(name)
    model.set_attn_implementation("attnrt")
    call = inputs(model, kind)
    with torch.no_grad():
        model(**call)
        if name not in ENCODERS and kind != "right":
            call.pop("decoder_input_ids", None)
            model.generate(**call, max_new_tokens=5, do_sample=False)
            model.generate(**call, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert requests
    for request in requests:
        if kind == "left":
            assert request.mask is None or request.mask.shape[1:3] == (1, 1)
        else:
            assert request.mask is None
    if name == "mistral, sliding window":
        assert any(request.window == (6, 0) for request in requests)
        assert all(request.seqlen_kv <= 7 for request in requests if request.seqlen_q == 1)


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window", "qwen3, q and k norms"])
@pytest.mark.usefixtures("no_dense_mask")
def test_packed_position_ids(name: str, requests: list[attnrt.AttentionRequest]) -> None:
    """Sequences one after the other, told apart by their position ids alone, do not see each other."""
    model = make(name)
    model.set_attn_implementation("attnrt")
    for lengths in ([[5, 9, 3]], [[10, 7], [17]]):
        ids = torch.randint(3, 98, (len(lengths), LENGTH))
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        requests.clear()
        with torch.no_grad():
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            assert all(r.packed and r.mask is None and r.batch == sum(map(len, lengths)) for r in requests)
            for row, one, out in zip(lengths, ids, packed, strict=True):
                for part, want in zip(one.split(row), out.split(row), strict=True):
                    torch.testing.assert_close(model(input_ids=part[None]).logits[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-oss, sinks"])
@pytest.mark.usefixtures("no_dense_mask")
def test_packed_by_offsets(name: str, requests: list[attnrt.AttentionRequest]) -> None:
    """As DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives it. (gpt-oss makes its masks without the
    position ids, whatever the implementation.)"""
    lengths = [5, 9, 3]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [{"input_ids": torch.randint(3, 98, (n,)).tolist()} for n in lengths]
    batch = collate(rows)
    batch.pop("labels")
    model = make(name)
    model.set_attn_implementation("attnrt")
    with torch.no_grad():
        out = model(**batch, use_cache=False).logits[0]
        assert len(requests) == 3 and all(r.packed and r.batch == 3 for r in requests)
        for row, want in zip(rows, out.split(lengths), strict=True):
            alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-5)


def test_vision_and_speech() -> None:
    torch.manual_seed(0)
    vit = transformers.ViTModel(transformers.ViTConfig(**VISION)).eval()
    agree(vit, {"pixel_values": torch.randn(2, 3, 32, 32)})
    whisper = transformers.WhisperConfig(**TWO_STACKS, max_source_positions=30, num_mel_bins=8)
    model = transformers.WhisperForConditionalGeneration(whisper).eval()
    call = {"input_features": torch.randn(2, 8, 60), "decoder_input_ids": torch.randint(3, 98, (2, 9))}
    agree(model, call)


def test_an_image_and_text() -> None:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_index=90,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(3, 80, (2, 24))
    ids[:, 4:20] = 90
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    agree(model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), "attention_mask": mask}, mask)


def test_a_mask_without_structure_is_dense_and_shown(requests: list[attnrt.AttentionRequest]) -> None:
    """Gemma 3 lets image tokens see each other both ways."""
    torch.manual_seed(0)
    text = {**DECODER, "head_dim": 8, "sliding_window": 6}
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Gemma3TextConfig(**text),
        image_token_index=90,
        mm_tokens_per_image=16,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 80, (2, 24))
    ids[:, 2:18] = 90
    call = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32), "token_type_ids": (ids == 90).long()}
    call["attention_mask"] = torch.ones_like(ids)
    agree(model, call)
    assert any(request.mask is not None and request.mask.shape[2:] == (24, 24) for request in requests)


def test_training(requests: list[attnrt.AttentionRequest]) -> None:
    """Dropout in training only; gradient checkpointing gives the same gradients."""
    fields = {**DECODER, "attention_dropout": 0.25}
    model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**fields), attn_implementation="attnrt")
    ids = torch.randint(3, 98, (2, 9))
    model.train()(ids)
    assert {request.dropout_p for request in requests} == {0.25}
    requests.clear()
    model.eval()(ids)
    assert {request.dropout_p for request in requests} == {0.0}
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    want = torch.autograd.grad(model.train()(ids).logits.square().sum(), list(model.parameters()))
    model.gradient_checkpointing_enable()
    found = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), list(model.parameters()))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "padded"), [("llama", True), ("mistral, sliding window", False)])
@torch.no_grad()
def test_compiled_in_one_graph(name: str, padded: bool) -> None:
    torch._dynamo.reset()
    model = make(name)
    model.set_attn_implementation("attnrt")
    call = {**inputs(model, "left" if padded else "none"), "use_cache": False}
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**call).logits
    real = padding("left").bool() if padded else ...  # type: ignore[union-attr]
    torch.testing.assert_close(found[real], model(**call).logits[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "left", "right"])
def test_a_bidirectional_window(kind: str, requests: list[attnrt.AttentionRequest]) -> None:
    """A decoder used as an encoder: as many keys on the right of a query as on its left."""
    model = make("mistral, sliding window")
    agree(model, inputs(model, kind) | {"is_causal": False, "use_cache": False}, padding(kind))
    assert requests and all(not r.causal for r in requests)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_users_own_mask(dtype: torch.dtype, requests: list[attnrt.AttentionRequest]) -> None:
    """A 4-D mask says everything: prefix-LM here, in a model with a sliding window."""
    model = make("mistral, sliding window")
    ids = torch.randint(3, 98, (2, LENGTH))
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() | (torch.arange(LENGTH) < 4)
    seen = seen.expand(2, 1, -1, -1)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    want = model(ids, attention_mask=added).logits
    model.set_attn_implementation("attnrt")
    found = model(ids, attention_mask=seen if dtype == torch.bool else added).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert all((r.mask if dtype == torch.bool else r.bias) is not None and not r.causal for r in requests)


def test_a_model_outside_the_interface_is_told_so() -> None:
    """Bloom adds its ALiBi and its mask itself."""
    config = transformers.BloomConfig(vocab_size=99, hidden_size=48, n_layer=1, n_head=6)
    model = transformers.BloomForCausalLM._from_config(config, attn_implementation="attnrt")
    with pytest.raises(ArgumentError, match=r"attention_mask.*'eager'"):
        model(torch.randint(3, 98, (2, 5)))


def test_weights_are_refused() -> None:
    model = make("llama")
    model.set_attn_implementation("attnrt")
    with pytest.raises(ArgumentError, match=r"output_attentions=True.*eager"):
        model(torch.randint(3, 98, (1, 4)), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


class Layer(torch.nn.Module):
    is_causal = True


def call(**options: Any) -> Tensor:
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    return integration.attend(options.pop("module", Layer()), q, k, v, options.pop("attention_mask", None), **options)[
        0
    ]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"indices": torch.zeros(1)}, "indices"),
        ({"cache": object()}, "cache"),
        ({"kernel_options": {"BACKEND": "FLASH"}}, "kernel_options"),
        ({"seq_idx": torch.zeros(1, 6)}, "seq_idx"),
        ({"something_new": 3}, "something_new"),
        ({"output_attentions": True}, "output_attentions"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"sliding_window": 3.0}, "sliding_window"),
        ({"module": torch.nn.Module()}, "is_causal"),
        ({"attention_mask": torch.ones(1, 6)}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.long)}, "attention_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_k"),
        ({"position_bias": torch.zeros(1, 4, 6, 5)}, "bias"),
        ({"softcap": -1.0}, "softcap"),
        ({"s_aux": torch.zeros(3)}, "sinks"),
    ],
)
def test_what_cannot_be_honoured_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=name):
        call(**options)


def test_what_concerns_other_parts_is_let_through() -> None:
    call(position_ids=torch.arange(6), use_cache=True, num_items_in_batch=torch.tensor(3), output_attentions=False)
    call(indices=None, kernel_options=None)


def test_arguments_that_contradict_the_mask() -> None:
    mask = integration.make_mask(1, 6, 6)
    with pytest.raises(ArgumentError, match="is_causal"):
        call(attention_mask=mask, is_causal=False)
    with pytest.raises(ArgumentError, match="sliding_window"):
        call(attention_mask=mask, sliding_window=3)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    packing = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 4, "max_length_k": 4}
    padded = integration.make_mask(
        1, 6, 6, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()[:, [2, 0, 3, 1, 4, 5]]
    )
    with pytest.raises(ArgumentError, match="no padding"):
        call(attention_mask=padded, **packing)
    with pytest.raises(ArgumentError, match="position_bias"):
        call(attention_mask=mask, position_bias=torch.zeros(1, 4, 6, 6), **packing)
    with pytest.raises(ArgumentError, match="made for 5 queries"):
        call(attention_mask=integration.make_mask(1, 5, 6, 1))
    with pytest.raises(ArgumentError, match="new_argument"):
        integration.make_mask(1, 6, 6, new_argument=3)
    for rows in (1, 2):  # one of them would broadcast
        with pytest.raises(ArgumentError, match=r"attention_mask=.* B = 3"):
            integration.make_mask(3, 6, 6, attention_mask=torch.ones(rows, 6, dtype=torch.bool))


def test_without_any_mask_the_module_counts() -> None:
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    for options, wanted in (
        ({}, {"causal": True}),
        ({"is_causal": False}, {}),
        ({"sliding_window": 3}, {"causal": True, "window": (2, None)}),
        ({"is_causal": False, "sliding_window": 3}, {"window": (2, 2)}),
    ):
        found, _ = integration.attend(Layer(), q, k, v, None, **options)
        torch.testing.assert_close(found, attnrt.attention(q, k, v, **wanted).transpose(1, 2))
    with pytest.raises(ArgumentError, match="where 3 queries stand among 6 keys"):
        integration.attend(Layer(), q[:, :, :3], k, v, None)
    one, _ = integration.attend(Layer(), q[:, :, :1], k, v, None)  # a decode step sees every key
    torch.testing.assert_close(one, attnrt.attention(q[:, :, :1], k, v).transpose(1, 2))


@pytest.mark.parametrize("name", ["my_flash", "sdpa_attnrt", "org/attnrt", "paged|attnrt", "", "eager"])
def test_names_with_another_meaning(name: str) -> None:
    with pytest.raises(ArgumentError, match="name"):
        integration.register(name)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "version", lambda package: "4.57.1")
    with pytest.raises(IntegrationError, match=r"4\.57\.1 is installed"):
        integration.register()
