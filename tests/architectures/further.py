"""Small models of further kinds on the meta device: detection, depth, documents, two towers, networks without norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .diffusion import TEXT
from .diffusion import build as diffuser
from .encoders import encoder
from .language import HEAD, build, decoder
from .sizes import POSITIONS, VOCABULARY
from .vision import tower


def dbrx(width: int) -> nn.Module:
    experts = {"ffn_hidden_size": 7 * width // 4, "moe_num_experts": 4, "moe_top_k": 2}
    return build(
        "DbrxConfig",
        "DbrxForCausalLM",
        d_model=width,
        n_heads=width // HEAD,
        n_layers=2,
        max_seq_len=POSITIONS,
        vocab_size=VOCABULARY,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config=experts,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def electra(width: int) -> nn.Module:
    # The embeddings are narrower than the model in the small size, and follow the width here.
    return build("ElectraConfig", "ElectraForPreTraining", **encoder(width, embedding_size=width // 2))


def mpnet(width: int) -> nn.Module:
    return build("MPNetConfig", "MPNetForMaskedLM", **encoder(width))


def layoutlmv3(width: int) -> nn.Module:
    sizes = {"coordinate_size": width // 8, "shape_size": width // 4, "input_size": 42, "patch_size": 14}
    return build(
        "LayoutLMv3Config",
        "LayoutLMv3ForTokenClassification",
        **encoder(width, max_2d_position_embeddings=140, rel_pos_bins=30, rel_2d_pos_bins=54, **sizes),
    )


def dpt(width: int) -> nn.Module:
    layers = {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "is_hybrid": False}
    neck = {"neck_hidden_sizes": [36, 72, 140, 280], "fusion_hidden_size": 100}
    return build("DPTConfig", "DPTForDepthEstimation", **tower(width, **layers, **neck))


def detr(width: int) -> nn.Module:
    backbone = {
        "model_type": "resnet",
        "embedding_size": 68,
        "hidden_sizes": [140, 280],
        "depths": [1, 1],
        "out_features": ["stage2"],
    }
    heads = {"encoder_attention_heads": width // HEAD, "decoder_attention_heads": width // HEAD}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width}
    return build(
        "DetrConfig",
        "DetrForObjectDetection",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=width,
        num_queries=20,
        num_labels=10,
        **heads,
        **layers,
    )


def blip2(width: int) -> nn.Module:
    # Only the language model has several sizes.
    qformer = encoder(340, num_attention_heads=5, encoder_hidden_size=320) | {"model_type": "blip_2_qformer"}
    fields = {"vocab_size": VOCABULARY, "hidden_size": width, "ffn_dim": 4 * width, "word_embed_proj_dim": width}
    text = {"model_type": "opt", "num_attention_heads": width // HEAD, "num_hidden_layers": 2, **fields}
    return build(
        "Blip2Config",
        "Blip2ForConditionalGeneration",
        vision_config=tower(320),
        qformer_config=qformer,
        text_config=text | {"max_position_embeddings": POSITIONS},
        num_query_tokens=12,
    )


def idefics3(width: int) -> nn.Module:
    text = decoder(width, 3.5) | {"model_type": "llama"}
    return build(
        "Idefics3Config",
        "Idefics3ForConditionalGeneration",
        text_config=text,
        vision_config=tower(320),
        scale_factor=3,
        tie_word_embeddings=False,
    )


def timm_nfnet(width: int) -> nn.Module:
    from timm.models.nfnet import NfCfg, NormFreeNet

    config = NfCfg(
        depths=(1, 1),
        channels=(width // 2, width),
        stem_type="3x3",
        group_size=8,
        bottle_ratio=0.5,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
        num_features=2 * width,
        extra_conv=True,
    )
    with torch.device("meta"):
        return NormFreeNet(config, num_classes=10)


def timm_maxvit(width: int) -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg

    config = MaxxVitCfg(
        embed_dim=(width // 2, width),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=width // 4,
        head_hidden_size=width,
    )
    with torch.device("meta"):
        return MaxxVit(config, img_size=224, num_classes=10)


def cogvideox(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "time_embed_dim": 328}
    sizes = {"sample_width": 6, "sample_height": 4, "sample_frames": 5, "max_text_seq_length": 7}
    return diffuser("CogVideoXTransformer3DModel", num_layers=2, text_embed_dim=TEXT, **heads, **sizes)


def sana(width: int) -> nn.Module:
    heads = {
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "num_cross_attention_heads": width // HEAD,
    }
    sizes = {"cross_attention_head_dim": HEAD, "cross_attention_dim": width, "caption_channels": TEXT}
    return diffuser(
        "SanaTransformer2DModel", in_channels=20, out_channels=20, num_layers=2, sample_size=8, **heads, **sizes
    )


def controlnet(width: int) -> nn.Module:
    return diffuser(
        "ControlNetModel",
        block_out_channels=(width // 2, width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(12, 20),
    )


FURTHER: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        dbrx,
        electra,
        mpnet,
        layoutlmv3,
        dpt,
        detr,
        blip2,
        idefics3,
        timm_nfnet,
        timm_maxvit,
        cogvideox,
        sana,
        controlnet,
    )
}
