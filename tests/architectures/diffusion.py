"""Small diffusion models of diffusers on the meta device. Their timesteps have 256 features, so no width here is 256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .language import HEAD

# Features of the frozen text encoders: of one token, and of the whole text.
TEXT, POOLED = 176, 112


def build(model: str, **fields: Any) -> nn.Module:
    """Return a model of diffusers on the meta device."""
    import diffusers

    with torch.device("meta"):
        module: nn.Module = getattr(diffusers, model)(**fields)
    return module


def dit(width: int) -> nn.Module:
    fields = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10}
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD}
    return build("DiTTransformer2DModel", **fields, **heads, patch_size=2)


def pixart(width: int) -> nn.Module:
    fields = {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "caption_channels": TEXT}
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "cross_attention_dim": width}
    return build("PixArtTransformer2DModel", **fields, **heads, use_additional_conditions=False)


def sd3(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "caption_projection_dim": width}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
    return build("SD3Transformer2DModel", sample_size=8, num_layers=2, pos_embed_max_size=8, **heads, **text)


def flux(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "axes_dims_rope": (16, 24, 24)}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
    fields = {"in_channels": 60, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    return build("FluxTransformer2DModel", **fields, **heads, **text)


def unet(width: int) -> nn.Module:
    return build(
        "UNet2DConditionModel",
        sample_size=8,
        block_out_channels=(width // 2, width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
    )


def autoencoder_kl(width: int) -> nn.Module:
    return build(
        "AutoencoderKL",
        block_out_channels=(width // 2, width),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    )


DIFFUSION: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function for function in (dit, pixart, sd3, flux, unet, autoencoder_kl)
}
