"""The right roles in diffusion models; see `truth.py`.

Timestep features and features of a frozen text encoder have a fixed size where they enter the model, so their first projection
embeds the input.
"""

from __future__ import annotations

from typing import Final

_TIME: Final = {"*.timestep_embedder.linear_1.weight": "vector"}
_TEXT: Final = {"*.text_embedder.linear_1.weight": "vector", "context_embedder.weight": "vector"}
_PATCHES: Final = {"pos_embed.proj.weight": "vector"}
_OUT: Final = {"proj_out.weight": "output"}

DIFFUSION: Final[dict[str, dict[str, str]]] = {
    "dit": {**_TIME, **_PATCHES, "proj_out_2.weight": "output"},
    "pixart": {
        **_TIME,
        **_PATCHES,
        **_OUT,
        "caption_projection.linear_1.weight": "vector",
        "*scale_shift_table": "vector",
    },
    "sd3": {**_TIME, **_TEXT, **_PATCHES, **_OUT},
    "flux": {
        **_TIME,
        **_TEXT,
        **_OUT,
        "x_embedder.weight": "vector",
        "*.guidance_embedder.linear_1.weight": "vector",
    },
    # Its timestep features are as many as the channels of its first block, so `time_embedding.linear_1` is a matrix. Keys and
    # values from the text stand inside each block, so they are matrices whose fan_in is fixed.
    "unet": {"conv_in.weight": "vector", "conv_out.weight": "output"},
    "autoencoder_kl": {
        "*coder.conv_in.weight": "vector",
        "*coder.conv_out.weight": "output",
        # From latents to latents: sizes that do not grow.
        "quant_conv.weight": "vector",
        "post_quant_conv.weight": "vector",
    },
}
