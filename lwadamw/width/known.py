"""Roles of the parameters of well-known module classes that their type and their name do not tell.

Most language models need no entry: Llama, Mistral, Qwen, Gemma, OLMo, Phi, GPT-2, NeoX, Granite, GLM, Mamba, BERT, T5, and
the routers and experts of their mixtures, consist of linear layers, embeddings and norms with telling names. Here are the
others: packed weights, whose layout only the forward pass shows, heads without the name of a head, hidden layers that have
one, and projections of data.

A key is the name of a class. Where other packages have a class of this name with another layout, the start of the module
path and a colon stand before the name. Nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .specs import Matrix, Output, RoleSpec

Roles = Mapping[str, RoleSpec]


def _each(names: str, roles: Roles) -> dict[str, Roles]:
    return dict.fromkeys(names.split(), roles)


# Layouts of packed weights: one matrix per expert, head, or codebook.
_OUT_IN: Final = Matrix(fan_in=-1)
_IN_OUT: Final = Matrix(fan_in=-2)

# transformers 5 notes the layout of packed experts in `is_transposed`, which is evidence without an entry here. Classes
# without it are here. Qwen3VLMoeTextExperts is not: 4.57 stores (experts, in, out), and 5.0 stores (experts, out, in).
_EXPERTS: Final[dict[str, Roles]] = {
    **_each("GptOssExperts Llama4TextExperts diffusers:SwiGLUExperts", {"gate_up_proj": _IN_OUT, "down_proj": _IN_OUT}),
    **_each("LongcatFlashExperts Step3p7Experts InklingSharedExperts", {"*_proj": _OUT_IN}),
    **_each("JetMoeParallelExperts GraniteMoeParallelExperts", {"weight": _OUT_IN}),
    **_each("GraniteMoeSharedParallelExperts GraniteMoeHybridParallelExperts", {"weight": _OUT_IN}),
    "AriaGroupedExpertsGemm": {"weight": _IN_OUT},
    # The rows of w1, v1 and w2 are those of all experts. In w2 they are inputs. SparseMLP does not hold the number of experts.
    "DbrxExpertGLU": {"w1": _OUT_IN, "v1": _OUT_IN, "w2": Matrix(fan_in=0, per="moe_num_experts")},
    "megablocks:SparseMLP": {"w1": _OUT_IN, "v1": _OUT_IN},
    "megablocks:MLP": {"w1": _IN_OUT, "w2": _IN_OUT},
    # (hidden, experts * out) and (experts * in, hidden)
    "megatron:GroupedMLP": {"weight1": Matrix(fan_in=0), "weight2": Matrix(fan_in=0, per="num_local_experts")},
    # One weight for all experts, or weight0, weight1, ... for each.
    "transformer_engine:GroupedLinear": {"weight*": _OUT_IN},
    "GroupedLinear": {"weight[0-9]*": _OUT_IN},
    # torchtitan 0.1 has (experts, in, out) in torchtitan.experiments.
    "torchtitan.models:GroupedExperts": {"w?": _OUT_IN, "w?_E*": _OUT_IN},
    "torchtitan:GroupedExperts": {"w?_E*": _OUT_IN},
    "torchtitan:GptOssGroupedExperts": {"mlp?_weight*": _OUT_IN, "mlp?_bias*": "vector"},
    **_each("torchtitan:FusedSwiGLU torchtitan:FusedGroupedExperts", {"w13": _OUT_IN, "w2_*": _OUT_IN}),
    "deepspeed:GroupedExperts": {"w?": _OUT_IN},
}

_ROUTERS: Final[dict[str, Roles]] = {
    "megatron:SharedExpertMLP": {"gate_weight": Output(fan_in=-1)},  # of shape (1, hidden)
    "deepspeed:MoE": {"coefficient.weight": "output"},
    "DogeCDMoE": {"router_gate.weight": "output"},
    "MomAttention": {"gate.weight": "output"},
    "ZayaRouterMLP": {"fc?.weight": "matrix", "out_proj.weight": "output"},
    "ZayaRouter": {"down_proj.weight": "matrix"},
    # Coefficients that mix a few copies of the residual stream. Their number is the same at every width.
    **_each("DeepseekV4HyperConnection Glm5NextTextHyperConnection HYV4HyperConnection", {"fn": Output(fan_in=-1)}),
    **_each("DeepseekV4HyperHead HYV4HyperHead", {"hc_fn": Output(fan_in=-1)}),
    "x_transformers:HyperConnection": {"dynamic_alpha_fn": Output(fan_in=-2), "static_alpha": "vector"},
    "Gemma3nTextAltUp": {"modality_router.weight": "output", "*_coefs.weight": "vector"},
}

_POOLING: Final[Roles] = {
    "attention.out_proj.weight": "matrix",
    "mlp.*.weight": "matrix",
    "?_proj.weight": "matrix",
    "output_proj.weight": "matrix",
}
_MAPS: Final = Matrix(fan_in=(1, 2, 3))
_HIDDEN_IN_A_HEAD: Final[dict[str, Roles]] = {
    # The head of these models pools with attention.
    **_each("SiglipMultiheadAttentionPoolingHead Siglip2MultiheadAttentionPoolingHead", _POOLING),
    **_each("Idefics2MultiheadAttentionPoolingHead Aimv2AttentionPoolingHead", _POOLING),
    **_each("Phi4MultimodalVisionMultiheadAttentionPoolingHead VideoPrismMultiheadAttentionPoolingHead", _POOLING),
    # This one projects to an embedding that grows with the width.
    **_each("SiglipTextModel SiglipTextTransformer Siglip2TextModel Siglip2TextTransformer", {"head.weight": "matrix"}),
    # After these, a decoder or the tied embedding gives the outputs.
    **_each(
        "ModernBertPredictionHead ModernBertDecoderPredictionHead ModernVBertPredictionHead DebertaLMPredictionHead "
        "DebertaV2LMPredictionHead ElectraGeneratorPredictions ConvBertGeneratorPredictions",
        {"dense.weight": "matrix"},
    ),
    "DistilBertForMaskedLM": {"vocab_transform.weight": "matrix"},
    **_each("PeAudioEncoder PeVideoEncoder PeAudioVideoEncoder", {"output.weight": "matrix"}),
    "QuestionAwareSpanSelectionHead": {"*.dense.weight": "matrix", "*_classifier.weight": "matrix"},
    **_each(
        "Wav2Vec2ForXVector Wav2Vec2BertForXVector Wav2Vec2ConformerForXVector WavLMForXVector UniSpeechSatForXVector "
        "Data2VecAudioForXVector",
        {"classifier.weight": "matrix"},
    ),
    **_each(
        "DistilBertForSequenceClassification DistilBertForMultipleChoice MraForMultipleChoice YosoForMultipleChoice "
        "NystromformerForMultipleChoice LowFormer",
        {"pre_classifier*.weight": "matrix"},
    ),
    "HighResolutionNet": {"final_layer.0.weight": _MAPS},
    "SelecSls": {"head.*.0.weight": _MAPS},
    **_each("VitsPosteriorEncoder VitsStochasticDurationPredictor", {"conv_proj.weight": Matrix(fan_in=(1, 2))}),
    **_each("Qwen3ASREncoder Qwen3OmniMoeAudioEncoder", {"conv_out.weight": "matrix"}),
    "PerceiverSelfOutput": {"dense.weight": "matrix"},
    "Tipsv2DptReadoutProjectLayer": {"*weight": "matrix"},
}

_HEADS: Final[dict[str, Roles]] = {
    # adaLN_modulation stands after the layer of the outputs.
    **_each("FinalLayer T2IFinalLayer LastLayer", {"linear.weight": "output", "ada*.weight": "matrix"}),
    "HiDreamImageOutEmbed": {"linear.weight": "output", "ada*.weight": "matrix"},
    **_each(
        "LuminaLayerNormContinuous VibeVoiceDiffusionHeadFinalLayer",
        {"linear_1.weight": "matrix", "linear_2.weight": "output"},
    ),
    "Transformer2DModel": {"proj_out_1.weight": "matrix", "proj_out_2.weight": "output", "out.weight": "output"},
    "JanusVQVAEHead": {"proj_out.weight": "matrix", "vision_head.weight": "output"},
    "AMSoftmaxLoss": {"weight": Output(fan_in=-2)},
    "CsmCodebooksHead": {"weight": Output(fan_in=-2)},
    "MoshiDepthDecoder": {
        "lm_heads.weight": Output(fan_in=-1),
        "input_projections.weight": _OUT_IN,
        "layers.*.linear.weight": _OUT_IN,
        "layers.*.mlp.fc?.weight": _OUT_IN,
    },
    **_each(
        "Wav2Vec2GumbelVectorQuantizer Wav2Vec2ConformerGumbelVectorQuantizer WavLMGumbelVectorQuantizer "
        "UniSpeechGumbelVectorQuantizer UniSpeechSatGumbelVectorQuantizer",
        {"codevectors": "vector", "weight_proj.weight": "output"},
    ),
    # Codes of the quantizer on one side, sound on the other.
    **_each("EncodecEncoder EncodecDecoder", {"layers.0.conv.*1": "vector", "layers.-1.conv.*original1": "output"}),
    # The last layer has weight norm, in torch's older form or as a parametrization.
    "DINOHead": {"mlp.*weight": "matrix", "last_layer.weight_v": "output", "last_layer.*.original1": "output"},
    "NormMlpClassifierHead": {"pre_logits.*.weight": "matrix", "fc.weight": "output"},
}

# Latents, captions of another model, and sinusoids of a time: there are as many of them at every width. In CogVideoX, in
# CogView4 and in UNets there are as many sinusoids as the model is wide. So their projection is a matrix, as its type says.
_DIT: Final[Roles] = {
    "pos_embed.proj.weight": "vector",
    "proj_in.weight": "vector",
    "patch_embed.text_proj.weight": "vector",
    "context_embedder.weight": "vector",
    "context_embedder.proj_in.weight": "vector",
    "txt_in.weight": "vector",
    "text_embedder.weight": "vector",
    "*caption_embedder.1.weight": "vector",
    "*.image_embedder.ff.*weight": "vector",
    "*.timestep_embedder.linear_1.weight": "vector",
    "*.guidance_embedder.linear_1.weight": "vector",
    "*.time_embedder.linear_1.weight": "vector",
    "*.resolution_embedder.linear_1.weight": "vector",
    "*.aspect_ratio_embedder.linear_1.weight": "vector",
    "pos_frequencies": "vector",
    "proj_out_1.weight": "matrix",
    "proj_out_2.weight": "output",
    "proj_out.weight": "output",
}
_CONVOLUTION: Final = Output(fan_in=(1, 2, 3))
_MEL: Final[Roles] = {"conv1.weight": "vector"}
_INPUTS: Final[dict[str, Roles]] = {
    **_each("AuraFlowTransformer2DModel ChromaTransformer2DModel", _DIT),
    **_each("CogVideoXTransformer3DModel DiTTransformer2DModel Flux2Transformer2DModel FluxTransformer2DModel", _DIT),
    **_each("HunyuanDiT2DModel HunyuanVideoTransformer3DModel LTXVideoTransformer3DModel", _DIT),
    **_each("LatteTransformer3DModel Lumina2Transformer2DModel MochiTransformer3DModel", _DIT),
    **_each("PixArtTransformer2DModel QwenImageTransformer2DModel SD3Transformer2DModel", _DIT),
    **_each("SanaTransformer2DModel WanTransformer3DModel", _DIT),
    "PixArtAlphaTextProjection": {"linear_1.weight": "vector", "linear_2.weight": "matrix"},
    **_each("Flux FluxModel", {"txt_in.weight": "vector"}),
    "MLPEmbedder": {"in_layer.weight": "vector"},
    "TimestepEmbedder": {"mlp.0.weight": "vector"},
    **_each(
        "UNet2DModel UNet2DConditionModel UNet3DConditionModel UNetMotionModel UNetSpatioTemporalConditionModel "
        "ControlNetModel",
        {"conv_in.weight": "vector", "conv_out.weight": _CONVOLUTION, "add_embedding.linear_1.weight": "vector"},
    ),
    **_each(
        "AutoencoderKL VQModel",
        {"*coder.conv_in.weight": "vector", "*coder.conv_out.weight": _CONVOLUTION, "*quant_conv.weight": "vector"},
    ),
    # Mel bands.
    **_each(
        "WhisperEncoder whisper:AudioEncoder Qwen2AudioEncoder AudioFlamingo3Encoder VoxtralEncoder GlmAsrEncoder", _MEL
    ),
    "Qwen2_5OmniAudioEncoder": _MEL,
    **_each("SeamlessM4TConformerFeatureProjection Wav2Vec2BertFeatureProjection", {"projection.weight": "vector"}),
    # Patches of a time series, and what is made of them.
    **_each(
        "TimesFmModel TimesFm2_5Model",
        {"input_ff_layer.output_layer.weight": "matrix", "input_ff_layer.*.weight": "vector"},
    ),
    # Patches of pixels.
    "timm.models.volo:PatchEmbed": {"proj.weight": _MAPS},  # after a stem
    # Between stages. The first one of Visformer stands after a stem.
    "CoaT": {"patch_embed[234].proj.weight": _MAPS},
    "Visformer": {"patch_embed[123].proj.weight": _MAPS},
    # They make a table of positions from two coordinates, by 512 features at every width.
    "timm:WindowAttention": {"cpb_mlp.*.weight": "vector"},
    "PatchTSTEmbedding": {"input_embedding*.weight": "vector"},
    "Swinv2SelfAttention": {"continuous_position_bias_mlp.*.weight": "vector"},
    # Linear layers whose weight is read as a table of positions.
    "LayoutLMv3Encoder": {"rel_pos_*bias.weight": "vector"},
    "Llama4UnfoldConvolution": {"linear.weight": "vector"},
    "Gemma4VisionPatchEmbedder": {"input_proj.weight": "vector"},
}

_PACKED: Final[dict[str, Roles]] = {
    **_each("CLIP CustomTextCLIP TextTransformer MultimodalTransformer", {"text_projection": _IN_OUT}),
    "open_clip:VisionTransformer": {"proj": _IN_OUT},
    "open_clip:Attention": {"in_proj_weight": _OUT_IN},
    **_each("Gemma3MultiModalProjector T5Gemma2MultiModalProjector", {"mm_input_projection_weight": _IN_OUT}),
    "XCLIPModel": {"prompts_visual_projection": _IN_OUT},
    "transformer_engine:LayerNormMLP": {"fc?_weight": _OUT_IN},
    "XLNetRelativeAttention": {"[qkvr]": Matrix(fan_in=0), "o": Matrix(fan_in=(-2, -1))},
    "FunnelRelMultiheadAttention": {"r_kernel": Matrix(fan_in=0)},
    "ZambaMambaMixer": {"x_proj_weight": _OUT_IN, "dt_proj_weight": _OUT_IN},
    "RecurrentGemmaRglru": {"*_gate_weight": _IN_OUT},
    "transformers:GroupedLinearLayer": {"weight": _IN_OUT},
    "LinearHeadwiseExpand": {"weight": _OUT_IN},  # of xLSTM
    "sLSTMCell_vanilla": {"_recurrent_kernel_": _OUT_IN, "_bias_": "vector"},
    "sLSTMCell_cuda": {"_recurrent_kernel_": _IN_OUT, "_bias_": "vector"},
    "timm:MultiQueryAttentionV2": {
        "query_proj": _OUT_IN,
        "key_proj": Matrix(fan_in=0),
        "value_proj": Matrix(fan_in=0),
        "out_proj": Matrix(fan_in=(-2, -1)),
    },
    "x_transformers:LowRankLinear": {"weight_?": _OUT_IN},
}

KNOWN: Final[Mapping[str, Roles]] = {**_EXPERTS, **_ROUTERS, **_HIDDEN_IN_A_HEAD, **_HEADS, **_INPUTS, **_PACKED}


def known_roles(kind: type) -> Roles:
    """Return what is known of the parameters of a class. Its base classes do not count.

    Args:
        kind: a class.

    Returns:
        Patterns for the names of parameters within the module, and the role that each gives. Empty where nothing is known.
    """
    for key, roles in KNOWN.items():
        start, _, name = key.rpartition(":")
        if name == kind.__name__ and (not start or f"{kind.__module__}.".startswith(f"{start}.")):
            return roles
    return {}
