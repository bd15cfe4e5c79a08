"""The right roles in models whose modules multiply in an unusual way; see `truth.py`."""

from __future__ import annotations

from typing import Final

_HEAD: Final = {"lm_head.weight": "output"}
_CLASSIFIER: Final = {"classifier.weight": "output"}

UNUSUAL: Final[dict[str, dict[str, str]]] = {
    "torch_transformer": {"*.in_proj_weight": "matrix -1", "generator.weight": "output"},
    # einsum("ibh,hnd->ibnd", x, q) sums over the first dimension, einsum("ibnd,hnd->ibh", x, o) over the others.
    "xlnet": {
        "transformer.mask_emb": "vector",
        "*.rel_attn.[qkvr]": "matrix 0",
        "*.rel_attn.o": "matrix 1 2",
        "*.rel_attn.r_?_bias": "vector",
        "*.rel_attn.seg_embed": "vector",
    },
    # One matrix per head: baddbmm(bias, x, weight) has the inputs in the last dimension but one.
    "recurrent_gemma": {"*_gate_weight": "matrix -2", "*_gate_bias": "vector"},
    "kimi_linear": {
        **_HEAD,
        "*.A_log": "vector",
        "*.experts.gate_up_proj": "matrix -1",
        "*.experts.down_proj": "matrix -1",
        "*.mlp.gate.weight": "output -1",
    },
    "falcon_h1": _HEAD,
    "switch_transformer": {"*.router.classifier.weight": "output"},
    "esm": {"esm.contact_head.regression.weight": "output"},
    "musicgen": {"lm_heads.*.weight": "output"},
    "wav2vec2_conformer": {
        **_HEAD,
        "*.conv_layers.0.conv.weight": "vector",
        "*.parametrizations.weight.original0": "vector",
        "*.parametrizations.weight.original1": "matrix 1 2",
        "*.pos_bias_?": "vector",
    },
    "patchtst": {"*.input_embedding.weight": "vector", "*.position_enc": "vector", "head.projection.weight": "output"},
    # States, actions and returns have as many numbers at every width.
    "decision_transformer": {"embed_*.weight": "vector", "predict_*.weight": "output"},
    # The forward multiplies `x @ mm_input_projection_weight`.
    "gemma3_vl": {
        "*.patch_embedding.weight": "vector",
        "*.head.probe": "vector",
        "*.head.attention.in_proj_weight": "matrix -1",
        "*.mm_input_projection_weight": "matrix 0",
    },
    "videomae": {**_CLASSIFIER, "*.patch_embeddings.projection.weight": "vector"},
    "swinv2": {
        **_CLASSIFIER,
        "*.patch_embeddings.projection.weight": "vector",
        "*.logit_scale": "vector",
        # From two coordinates to one number for each head: the authors take all of it out of the weight decay.
        "*.continuous_position_bias_mlp.*.weight": "vector",
    },
    "sam": {
        "*.positional_embedding": "vector",
        "*.pos_embed": "vector",
        "*.rel_pos_?": "vector",
        "vision_encoder.patch_embed.projection.weight": "vector",
        # The mask of a prompt has one channel.
        "prompt_encoder.mask_embed.conv1.weight": "vector",
        "mask_decoder.iou_prediction_head.proj_out.weight": "output",
    },
    "timm_beit": {
        "cls_token": "vector",
        "pos_embed": "vector",
        "*.relative_position_bias_table": "vector",
        "patch_embed.proj.weight": "vector",
        "head.weight": "output",
    },
    "wan": {
        "*scale_shift_table": "vector",
        "patch_embedding.weight": "vector",
        "*.time_embedder.linear_1.weight": "vector",
        "*.text_embedder.linear_1.weight": "vector",
        "proj_out.weight": "output",
    },
    "ltx": {
        "*scale_shift_table": "vector",
        "proj_in.weight": "vector",
        "*.timestep_embedder.linear_1.weight": "vector",
        "caption_projection.linear_1.weight": "vector",
        "proj_out.weight": "output",
    },
}
