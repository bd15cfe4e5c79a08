"""Roles of the parameters of well-known module classes that their type and their name do not tell.

Most language models need no entry: Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-2, NeoX, Granite, GLM, Mamba, BERT, T5 and the
routers and experts of their mixtures consist of linear layers, embeddings and norms with telling names. Here are the others:
packed weights, whose layout only the forward pass shows, heads without the name of a head, hidden layers with one, and
projections of data.

A key is the name of a class, or the start of the module path in which the class is defined, a colon, and the name. The path is
there where other packages use the same name for a class with another layout. Nothing is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from .specs import Matrix, Output, RoleSpec

Roles = Mapping[str, RoleSpec]


def _each(names: Iterable[str], roles: Roles) -> dict[str, Roles]:
    return dict.fromkeys(names, roles)


# Layouts of packed weights: one matrix per expert, head, or codebook.
_OUT_IN: Final = Matrix(fan_in=-1)
_IN_OUT: Final = Matrix(fan_in=-2)

# transformers 5 notes the layout of packed experts in `is_transposed`, which is evidence without an entry here. These classes
# do not have it. So Qwen3VLMoeTextExperts is not here: 4.57 stores (experts, in, out) and 5.0 (experts, out, in).
_EXPERTS: Final[dict[str, Roles]] = {
    "GptOssExperts": {"gate_up_proj": _IN_OUT, "down_proj": _IN_OUT, "*_bias": "vector"},
    "Llama4TextExperts": {"gate_up_proj": _IN_OUT, "down_proj": _IN_OUT},
    "AriaGroupedExpertsGemm": {"weight": _IN_OUT},
    **_each(("LongcatFlashExperts", "Step3p7Experts"), {"gate_up_proj": _OUT_IN, "down_proj": _OUT_IN}),
    "InklingSharedExperts": {"*_proj": _OUT_IN},
    **_each(
        (
            "JetMoeParallelExperts",
            "GraniteMoeParallelExperts",
            "GraniteMoeSharedParallelExperts",
            "GraniteMoeHybridParallelExperts",
        ),
        {"weight": _OUT_IN},
    ),
    # The rows of w1, v1 and w2 are those of all experts. For w2 they are its inputs, and the number of experts is among them.
    "DbrxExpertGLU": {"w1": _OUT_IN, "v1": _OUT_IN},
    "megablocks:SparseMLP": {"w1": _OUT_IN, "v1": _OUT_IN},
    "megablocks:MLP": {"w1": _IN_OUT, "w2": _IN_OUT},
    "megatron:GroupedMLP": {"weight1": Matrix(fan_in=0)},  # (hidden, experts * out); weight2 is as w2 of DBRX
    "GroupedLinear": {"weight*": _OUT_IN, "bias*": "vector"},  # of Transformer Engine: weight0, weight1, ...
    # torchtitan 0.1 has (experts, in, out), in torchtitan.experiments.
    "torchtitan.models:GroupedExperts": {"w?": _OUT_IN, "w?_E*": _OUT_IN},
    "torchtitan:GptOssGroupedExperts": {"mlp?_weight*": _OUT_IN, "mlp?_bias*": "vector"},
    "torchtitan:FusedSwiGLU": {"w13": _OUT_IN},
    "torchtitan:FusedGroupedExperts": {"w13": _OUT_IN, "w2*": _OUT_IN},
    "deepspeed:GroupedExperts": {"w?": _OUT_IN},
    "diffusers:SwiGLUExperts": {"gate_up_proj": _IN_OUT, "down_proj": _IN_OUT},
}

_ROUTERS: Final[dict[str, Roles]] = {
    "SharedExpertMLP": {"gate_weight": Output(fan_in=-1)},  # of Megatron, of shape (1, hidden)
    "deepspeed:MoE": {"coefficient.weight": "output"},
    "HunYuanMoEV1Gate": {"wg.weight": "output"},
    "DeepseekV2MoEGate": {"weight": "output"},
    "JetMoeTopKGating": {"layer.weight": "output"},
    "DogeCDMoE": {"router_gate.weight": "output"},
    "MomAttention": {"gate.weight": "output"},
    "CondConvResidual": {"routing_fn.weight": "output"},
    "ZayaRouterMLP": {"fc?.weight": "matrix", "out_proj.weight": "output"},
    "ZayaRouter": {"down_proj.weight": "matrix"},
    # Coefficients that mix a few copies of the residual stream: there are as many at every width.
    **_each(
        ("DeepseekV4HyperConnection", "Glm5NextTextHyperConnection", "HYV4HyperConnection"), {"fn": Output(fan_in=-1)}
    ),
    **_each(("DeepseekV4HyperHead", "HYV4HyperHead"), {"hc_fn": Output(fan_in=-1)}),
    "HyperConnection": {"dynamic_alpha_fn": Output(fan_in=-2), "static_alpha": "vector"},
    "Gemma3nTextAltUp": {"modality_router.weight": "output", "*_coefs.weight": "vector"},
}

_POOLING: Final[Roles] = {
    "probe": "vector",
    "attention.in_proj_weight": "matrix",
    "attention.out_proj.weight": "matrix",
    "mlp.*.weight": "matrix",
    "?_proj.weight": "matrix",
    "output_proj.weight": "matrix",
}
_DENSE: Final[Roles] = {"dense.weight": "matrix"}

_HIDDEN_IN_A_HEAD: Final[dict[str, Roles]] = {
    # The head of SigLIP pools with attention.
    **_each(
        (
            "SiglipMultiheadAttentionPoolingHead",
            "Siglip2MultiheadAttentionPoolingHead",
            "Idefics2MultiheadAttentionPoolingHead",
            "Phi4MultimodalVisionMultiheadAttentionPoolingHead",
            "VideoPrismMultiheadAttentionPoolingHead",
            "Aimv2AttentionPoolingHead",
        ),
        _POOLING,
    ),
    # Projections to an embedding that grows with the width.
    **_each(
        ("SiglipTextModel", "SiglipTextTransformer", "Siglip2TextModel", "Siglip2TextTransformer"),
        {"head.weight": "matrix"},
    ),
    # The decoder after such a head, or the tied embedding, gives the outputs.
    **_each(
        (
            "ModernBertPredictionHead",
            "ModernBertDecoderPredictionHead",
            "ModernVBertPredictionHead",
            "UltrabertPredictionHead",
            "DebertaLMPredictionHead",
            "DebertaV2LMPredictionHead",
            "ElectraGeneratorPredictions",
            "ConvBertGeneratorPredictions",
        ),
        _DENSE,
    ),
    **_each(("PeAudioEncoder", "PeVideoEncoder", "PeAudioVideoEncoder"), {"output.weight": "matrix"}),
    "QuestionAwareSpanSelectionHead": {"*_transform.weight": "matrix", "*_classifier.weight": "matrix"},
    **_each(
        (f"{name}ForXVector" for name in ("Wav2Vec2", "Wav2Vec2Bert", "Wav2Vec2Conformer", "WavLM", "UniSpeechSat")),
        {"classifier.weight": "matrix"},
    ),
    **_each(("Qwen3ASREncoder", "Qwen3OmniMoeAudioEncoder"), {"conv_out.weight": "matrix"}),
}

# The layer with adaLN_modulation stands after the output in these classes.
_FINAL_LAYER: Final[Roles] = {"linear.weight": "output", "ada*.weight": "matrix"}

_HEADS: Final[dict[str, Roles]] = {
    **_each(("FinalLayer", "T2IFinalLayer", "LastLayer", "HiDreamImageOutEmbed"), _FINAL_LAYER),
    "LuminaLayerNormContinuous": {"linear_1.weight": "matrix", "linear_2.weight": "output"},
    "VibeVoiceDiffusionHeadFinalLayer": {"linear_1.weight": "matrix", "linear_2.weight": "output"},
    "Transformer2DModel": {"proj_out_1.weight": "matrix", "proj_out_2.weight": "output", "out.weight": "output"},
    "AMSoftmaxLoss": {"weight": Output(fan_in=-2)},
    "CsmCodebooksHead": {"weight": Output(fan_in=-2)},
    "MoshiDepthDecoder": {
        "lm_heads.weight": Output(fan_in=-1),
        "input_projections.weight": _OUT_IN,
        "layers.*.linear.weight": _OUT_IN,
        "layers.*.mlp.fc?.weight": _OUT_IN,
    },
    **_each(
        (
            f"{name}GumbelVectorQuantizer"
            for name in ("Wav2Vec2", "Wav2Vec2Conformer", "WavLM", "UniSpeech", "UniSpeechSat")
        ),
        {"codevectors": "vector", "weight_proj.weight": "output"},
    ),
    "DINOHead": {"mlp.*.weight": "matrix", "last_layer.weight": "output", "last_layer.weight_v": "output"},
}

_UNET: Final[Roles] = {"conv_in.weight": "vector", "conv_out.weight": "output"}
_MEL: Final[Roles] = {"conv1.weight": "vector"}
_TEXT: Final[Roles] = {"linear_1.weight": "vector"}

# Latents, captions, and sinusoids of a time have as many features at every width.
_DIT: Final[Roles] = {
    "x_embedder.weight": "vector",
    "x_embedder.proj.weight": "vector",
    "pos_embed.proj.weight": "vector",
    "patch_embed.proj.weight": "vector",
    "patch_embed.text_proj.weight": "vector",
    "patch_embedding.weight": "vector",
    "img_in.weight": "vector",
    "proj_in.weight": "vector",
    "context_embedder.weight": "vector",
    "txt_in.weight": "vector",
    "text_embedder.linear_1.weight": "vector",
    "caption_projection.linear_1.weight": "vector",
    "context_embedder.proj_in.weight": "vector",
    "*.timestep_embedder.linear_1.weight": "vector",
    "*.guidance_embedder.linear_1.weight": "vector",
    "*.text_embedder.linear_1.weight": "vector",
    "*.time_embedder.linear_1.weight": "vector",
    "proj_out_1.weight": "matrix",
    "proj_out_2.weight": "output",
    "proj_out.weight": "output",
}

_INPUTS: Final[dict[str, Roles]] = {
    **_each(
        (
            "AuraFlowTransformer2DModel",
            "ChromaTransformer2DModel",
            "CogVideoXTransformer3DModel",
            "CogView4Transformer2DModel",
            "DiTTransformer2DModel",
            "Flux2Transformer2DModel",
            "FluxTransformer2DModel",
            "HunyuanDiT2DModel",
            "HunyuanVideoTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "LatteTransformer3DModel",
            "Lumina2Transformer2DModel",
            "MochiTransformer3DModel",
            "PixArtTransformer2DModel",
            "QwenImageTransformer2DModel",
            "SD3Transformer2DModel",
            "SanaTransformer2DModel",
            "WanTransformer3DModel",
        ),
        _DIT,
    ),
    **_each(("Flux", "FluxModel"), {"img_in.weight": "vector", "txt_in.weight": "vector"}),
    "MLPEmbedder": {"in_layer.weight": "vector"},
    "TimestepEmbedder": {"mlp.0.weight": "vector"},
    "PixArtAlphaTextProjection": _TEXT,
    **_each(
        (
            "UNet2DModel",
            "UNet2DConditionModel",
            "UNet3DConditionModel",
            "UNetMotionModel",
            "UNetSpatioTemporalConditionModel",
            "ControlNetModel",
        ),
        _UNET,
    ),
    **_each(
        ("AutoencoderKL", "VQModel"),
        {f"{half}coder.{name}": role for half in ("en", "de") for name, role in _UNET.items()}
        | {"quant_conv.weight": "vector", "post_quant_conv.weight": "vector"},
    ),
    # Mel bands, of a convolution that is no wider than they are.
    **_each(
        (
            "WhisperEncoder",
            "AudioEncoder",
            "Qwen2AudioEncoder",
            "Qwen2_5OmniAudioEncoder",
            "AudioFlamingo3Encoder",
            "VoxtralEncoder",
            "GlmAsrEncoder",
        ),
        _MEL,
    ),
    **_each(
        ("SeamlessM4TConformerFeatureProjection", "Wav2Vec2BertFeatureProjection"), {"projection.weight": "vector"}
    ),
    "SpeechT5SpeechDecoderPrenet": {"layers.0.weight": "vector", "final_layer.weight": "matrix"},
    **_each(("GraniteSpeechCTCEncoder", "GraniteSpeech5Encoder"), {"input_linear.weight": "vector"}),
    # Patches of pixels.
    "Llama4UnfoldConvolution": {"linear.weight": "vector"},
    "Gemma4VisionPatchEmbedder": {"input_proj.weight": "vector"},
    "Ernie4_5_VLMoePatchEmbed": {"proj.weight": "vector"},
    **_each(("FuyuModel", "FuyuForCausalLM"), {"vision_embed_tokens.weight": "vector"}),
    **_each(("Pix2StructVisionEmbeddings", "Kosmos2_5VisionEmbeddings"), {"patch_projection.weight": "vector"}),
    "PatchTSTEmbedding": {"input_embedding.*weight": "vector"},
}

_PACKED: Final[dict[str, Roles]] = {
    **_each(("CLIP", "CustomTextCLIP", "TextTransformer", "MultimodalTransformer"), {"text_projection": _IN_OUT}),
    "open_clip:VisionTransformer": {"proj": _IN_OUT},
    "open_clip:Attention": {"in_proj_weight": _OUT_IN},
    "XCLIPModel": {"prompts_visual_projection": _IN_OUT},
    **_each(("Gemma3MultiModalProjector", "T5Gemma2MultiModalProjector"), {"mm_input_projection_weight": _IN_OUT}),
    "LayerNormMLP": {"fc?_weight": _OUT_IN},  # of Transformer Engine
    "XLNetRelativeAttention": {"[qkvr]": Matrix(fan_in=0), "o": Matrix(fan_in=(-2, -1)), "r_?_bias": "vector"},
    "FunnelRelMultiheadAttention": {"r_kernel": Matrix(fan_in=0), "r_?_bias": "vector"},
    "ZambaMambaMixer": {"x_proj_weight": _OUT_IN, "dt_proj_weight": _OUT_IN},
    "RecurrentGemmaRglru": {"*_gate_weight": _IN_OUT, "*_gate_bias": "vector"},
    "GroupedLinearLayer": {"weight": _IN_OUT},  # of ConvBERT
    "LinearHeadwiseExpand": {"weight": _OUT_IN},  # of xLSTM
    "sLSTMCell_vanilla": {"_recurrent_kernel_": _OUT_IN, "_bias_": "vector"},
    "sLSTMCell_cuda": {"_recurrent_kernel_": _IN_OUT, "_bias_": "vector"},
    "MultiQueryAttentionV2": {
        "query_proj": _OUT_IN,
        "key_proj": Matrix(fan_in=0),
        "value_proj": Matrix(fan_in=0),
        "out_proj": Matrix(fan_in=(-2, -1)),
    },
    "LowRankLinear": {"weight_?": _OUT_IN},
}

KNOWN: Final[Mapping[str, Roles]] = {**_EXPERTS, **_ROUTERS, **_HIDDEN_IN_A_HEAD, **_HEADS, **_INPUTS, **_PACKED}


def known_roles(kind: type) -> Roles:
    """Return the roles that are known for the parameters of a class itself, without its base classes.

    Args:
        kind: a class.

    Returns:
        Patterns for the names of parameters within the module, and the role of each; empty where nothing is known.
    """
    name, defined_in = kind.__name__, f"{kind.__module__}."
    for key in KNOWN:
        start, _, wanted = key.rpartition(":")
        if wanted == name and (not start or defined_in.startswith(f"{start}.")):
            return KNOWN[key]
    return {}
