"""The processor against diffusers' own, and the models it does not serve."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
import attnrt.integrations.diffusers as integration
from attnrt.errors import IntegrationError

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.models.attention_processor import Attention, AttnProcessor2_0  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    return Attention(**{"query_dim": 32, "heads": 4, "dim_head": 8, **options}).eval()


def compare(module: Any, *args: Any, **options: Any) -> None:
    """Outputs and gradients: within twice of what diffusers' SDPA processor is off from float64."""
    exact = copy.deepcopy(module).double()
    exact.set_processor(AttnProcessor2_0())
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    named = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in options.items()}
    truth = results(exact, wide, named)
    module.set_processor(AttnProcessor2_0())
    usual = results(module, args, options)
    module.set_processor(integration.AttnrtProcessor())
    attnrt.refresh()
    found = results(module, args, options)
    for want, low, got in zip(truth, usual, found, strict=True):
        allowed = 2 * (low - want).abs().max() + 2e-6 * max(1.0, float(want.abs().max()))
        assert (got - want).abs().max() <= allowed


def results(module: Any, args: Any, options: Any) -> list[Tensor]:
    out = module(*args, **options)
    out = out if isinstance(out, Tensor) else out.sample
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [p for p in module.parameters() if p.requires_grad])]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 2.0},
        {"qk_norm": "layer_norm"},
        {"upcast_attention": True},
        {"scale_qk": True, "out_bias": False},
    ],
)
def test_self_attention(options: dict[str, Any]) -> None:
    compare(layer(**options), torch.randn(2, 9, 32))
    compare(layer(**options), torch.randn(2, 32, 3, 5))


def test_cross_attention_with_a_mask() -> None:
    module = layer(cross_attention_dim=24, cross_attention_norm="layer_norm")
    context = torch.randn(2, 7, 24)
    compare(module, torch.randn(2, 9, 32), encoder_hidden_states=context)
    bias = torch.zeros(2, 1, 7)
    bias[0, :, 4:] = -10000.0
    compare(module, torch.randn(2, 9, 32), encoder_hidden_states=context, attention_mask=bias)


def test_a_unet() -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    call = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.randn(2, 5, 12)
    with torch.no_grad():
        want = unet(*call).sample
        assert integration.apply(unet) == ()
        assert {type(p) for p in unet.attn_processors.values()} == {integration.AttnrtProcessor}
        torch.testing.assert_close(unet(*call).sample, want, rtol=1e-4, atol=1e-5)
        assert integration.apply(unet) == ()  # again


def test_models_with_processors_of_their_own() -> None:
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    before = {name: type(p) for name, p in flux.attn_processors.items()}
    for strict in (True, False):
        with pytest.raises(IntegrationError, match=r"FluxAttnProcessor.*patch_sdpa"):
            integration.apply(flux, strict=strict)
    assert {name: type(p) for name, p in flux.attn_processors.items()} == before


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "version", lambda package: "0.20.0")
    with pytest.raises(IntegrationError, match=r"0\.20\.0 is installed"):
        integration.AttnrtProcessor()
