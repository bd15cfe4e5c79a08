"""The right roles in encoders, encoder-decoders and models of images and sound; see `truth.py`."""

from __future__ import annotations

from typing import Final

_HEAD: Final = {"lm_head.weight": "output"}
_CLASSIFIER: Final = {"classifier.weight": "output"}
# A learned token or table that is added to the hidden states or stands among them.
_TOKENS: Final = {"*_token": "vector"}
_POSITIONS: Final = {"*.position_embeddings": "vector"}
_PATCHES: Final = {"*.patch_embedding.weight": "vector"}
_PROBE: Final = {"*.head.probe": "vector", "*.head.attention.in_proj_weight": "matrix -1"}
_RELATIVE: Final = {"*.relative_position_bias_table": "vector"}

ENCODERS: Final[dict[str, dict[str, str]]] = {
    "bert": {"cls.seq_relationship.weight": "output"},
    "bert_classifier": _CLASSIFIER,
    "roberta": {},
    "roberta_classifier": {"classifier.out_proj.weight": "output"},
    "distilbert": {},
    # The embeddings have a fixed size, but the projections from it and to it stand between learned features.
    "albert": {},
    "modernbert": {},
    "deberta_v2": _CLASSIFIER,
    "t5": {},
    "bart": {},
    "whisper": {"model.encoder.conv1.weight": "vector"},
    "wav2vec2": {
        **_HEAD,
        "*.conv_layers.0.conv.weight": "vector",
        "*.parametrizations.weight.original0": "vector",
        "*.parametrizations.weight.original1": "matrix 1 2",
    },
    "encodec": {
        "*.parametrizations.weight.original0": "vector",
        "encoder.layers.0.conv.*": "vector",
        "decoder.layers.0.conv.*": "vector",
        "encoder.layers.9.conv.parametrizations.weight.original1": "output 1 2",
        "decoder.layers.9.conv.parametrizations.weight.original1": "output 1 2",
        # Transposed convolutions have the shape (in, out, taps).
        "decoder.layers.3.conv.parametrizations.weight.original1": "matrix 0 2",
        "decoder.layers.6.conv.parametrizations.weight.original1": "matrix 0 2",
        "*.parametrizations.weight.original1": "matrix 1 2",
        "*.lstm.weight_*": "matrix -1",
    },
}

VISION: Final[dict[str, dict[str, str]]] = {
    "vit": {**_CLASSIFIER, **_TOKENS, **_POSITIONS, "*.patch_embeddings.projection.weight": "vector"},
    "vit_mae": {
        **_TOKENS,
        **_POSITIONS,
        "decoder.decoder_pos_embed": "vector",
        "*.patch_embeddings.projection.weight": "vector",
        "decoder.decoder_pred.weight": "output",
    },
    "dinov2": {**_CLASSIFIER, **_TOKENS, **_POSITIONS, "*.patch_embeddings.projection.weight": "vector"},
    "dinov3": {**_TOKENS, "embeddings.register_tokens": "vector", "embeddings.patch_embeddings.weight": "vector"},
    # The heads of both towers are as wide as the model: their outputs are compared with each other.
    "siglip": {**_PATCHES, **_PROBE},
    "siglip2": {**_PATCHES, **_PROBE},
    "clip": _PATCHES,
    "llava_next": {**_HEAD, **_PATCHES},
    "qwen2_vl": {**_HEAD, "model.visual.patch_embed.proj.weight": "vector"},
    "swin": {**_CLASSIFIER, **_RELATIVE, "*.patch_embeddings.projection.weight": "vector"},
    "convnext": {**_CLASSIFIER, "convnext.embeddings.patch_embeddings.weight": "vector"},
    "segformer": {
        # Only the first stage sees the image.
        "segformer.stages.0.patch_embeddings.proj.weight": "vector",
        "decode_head.classifier.weight": "output",
    },
    "resnet50": {"conv1.weight": "vector", "fc.weight": "output"},
    "efficientnet": {"features.0.0.weight": "vector", "classifier.1.weight": "output"},
    "vgg": {"features.0.weight": "vector", "classifier.6.weight": "output"},
    "timm_vit": {
        "cls_token": "vector",
        "pos_embed": "vector",
        "patch_embed.proj.weight": "vector",
        "head.weight": "output",
    },
    "timm_siglip": {
        "attn_pool.latent": "vector",
        "pos_embed": "vector",
        "patch_embed.proj.weight": "vector",
        "head.weight": "output",
    },
    "timm_swin": {**_RELATIVE, "patch_embed.proj.weight": "vector", "head.fc.weight": "output"},
    "timm_mixer": {"stem.proj.weight": "vector", "head.weight": "output"},
    "timm_convnext": {"stem.0.weight": "vector", "head.fc.weight": "output"},
    "open_clip": {
        "*positional_embedding": "vector",
        "visual.conv1.weight": "vector",
        "*.attn.in_proj_weight": "matrix -1",
        # The forward multiplies `pooled @ proj`.
        "text_projection": "matrix 0",
        "visual.proj": "matrix 0",
    },
}
