"""The right roles in models of further kinds; see `truth.py`."""

from __future__ import annotations

from typing import Final

_CLASSIFIER: Final = {"classifier.weight": "output"}
_PATCHES: Final = {"*.patch_embedding.weight": "vector"}

FURTHER: Final[dict[str, dict[str, str]]] = {
    # The rows of w1, v1 and w2 are those of all four experts: outputs of w1 and v1, inputs of w2.
    "dbrx": {
        "lm_head.weight": "output",
        "*.mlp.[wv]1": "matrix -1",
        "*.mlp.w2": "matrix 0 /4",
        "*.router.*.weight": "output",
    },
    "electra": {"discriminator_predictions.dense_prediction.weight": "output"},
    "mpnet": {},
    "layoutlmv3": {
        **_CLASSIFIER,
        "*.cls_token": "vector",
        "*.pos_embed": "vector",
        "*.patch_embed.proj.weight": "vector",
        # The forward looks relative positions up in the columns of these linear layers.
        "*.rel_pos_*bias.weight": "vector",
    },
    "dpt": {
        "*.cls_token": "vector",
        "*.position_embeddings": "vector",
        "*.patch_embeddings.projection.weight": "vector",
        "head.head.4.weight": "output",
    },
    "detr": {
        "*.embedder.embedder.convolution.weight": "vector",
        "class_labels_classifier.weight": "output",
        "bbox_predictor.layers.2.weight": "output",
    },
    "blip2": {
        **_PATCHES,
        "query_tokens": "vector",
        "*.class_embedding": "vector",
        "vision_model.embeddings.position_embedding": "vector",
    },
    "idefics3": {**_PATCHES, "lm_head.weight": "output"},
    "timm_nfnet": {"*.gain": "vector", "stem.conv.weight": "vector", "head.fc.weight": "output"},
    "timm_maxvit": {
        "*.relative_position_bias_table": "vector",
        "stem.conv1.weight": "vector",
        "head.fc.weight": "output",
    },
    # Its timestep features are as many as the model is wide, and the layer after them has one size.
    "cogvideox": {
        "patch_embed.proj.weight": "vector",
        "patch_embed.text_proj.weight": "vector",
        "proj_out.weight": "output",
    },
    "sana": {
        "*scale_shift_table": "vector",
        "patch_embed.proj.weight": "vector",
        "*.timestep_embedder.linear_1.weight": "vector",
        "caption_projection.linear_1.weight": "vector",
        "proj_out.weight": "output",
    },
    # The image that conditions it enters through convolutions of one size. All its outputs go into a UNet of the same width.
    "controlnet": {"conv_in.weight": "vector", "controlnet_cond_embedding.conv_in.weight": "vector"},
}
