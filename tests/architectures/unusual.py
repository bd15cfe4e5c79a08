"""Small models, on the meta device, whose modules multiply in an unusual way or have several inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .diffusion import TEXT
from .diffusion import build as diffuser
from .encoders import encoder
from .language import HEAD, build, decoder
from .sizes import POSITIONS, VOCABULARY
from .vision import tower


class Seq2Seq(nn.Module):
    """torch's own transformer, with an embedding and a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.transformer = nn.Transformer(width, width // HEAD, 1, 1, dim_feedforward=4 * width)
        self.generator = nn.Linear(width, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.generator


def torch_transformer(width: int) -> nn.Module:
    with torch.device("meta"):
        return Seq2Seq(width)


def xlnet(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "d_model": width, "n_layer": 2, "n_head": width // HEAD, "d_inner": 4 * width}
    return build("XLNetConfig", "XLNetLMHeadModel", **fields)


def recurrent_gemma(width: int) -> nn.Module:
    fields = {
        "lru_width": width,
        "head_dim": HEAD,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 20,
    }
    return build(
        "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", **decoder(width, 6, tie_word_embeddings=True, **fields)
    )


def kimi_linear(width: int) -> nn.Module:
    fields = {
        "moe_intermediate_size": 5 * width // 16,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": HEAD,
        "kv_lora_rank": 40,
        "q_lora_rank": None,
        "qk_nope_head_dim": HEAD,
        "qk_rope_head_dim": HEAD // 2,
        "v_head_dim": HEAD,
        "linear_num_heads": width // HEAD,
        "linear_head_dim": HEAD,
        "layer_types": ["linear_attention", "full_attention"],
    }
    return build("KimiLinearConfig", "KimiLinearForCausalLM", **decoder(width, 2.5, **fields))


def falcon_h1(width: int) -> nn.Module:
    mixer = {"mamba_d_ssm": 2 * width, "mamba_n_heads": 2 * width // HEAD, "mamba_d_head": HEAD, "mamba_d_state": 40}
    return build("FalconH1Config", "FalconH1ForCausalLM", **decoder(width, 4, head_dim=HEAD, **mixer))


def switch_transformer(width: int) -> nn.Module:
    sizes = {"d_model": width, "d_ff": 4 * width, "d_kv": HEAD, "num_heads": width // HEAD, "num_experts": 4}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return build(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        vocab_size=VOCABULARY,
        **sizes,
        **layers,
    )


def esm(width: int) -> nn.Module:
    fields = encoder(width, position_embedding_type="rotary", mask_token_id=3)
    return build("EsmConfig", "EsmForMaskedLM", **fields)


def musicgen(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "num_codebooks": 2, "ffn_dim": 4 * width}
    fields = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "hidden_size": width}
    return build(
        "MusicgenDecoderConfig",
        "MusicgenForCausalLM",
        **fields,
        **heads,
        num_hidden_layers=1,
        pad_token_id=0,
        bos_token_id=1,
    )


def wav2vec2_conformer(width: int) -> nn.Module:
    fields = encoder(width, conv_dim=(160,) * 3, conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), vocab_size=VOCABULARY)
    return build("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", **fields, position_embeddings_type="relative")


def patchtst(width: int) -> nn.Module:
    fields = {"num_input_channels": 3, "context_length": 60, "patch_length": 12, "patch_stride": 12}
    sizes = {"d_model": width, "ffn_dim": 2 * width, "num_attention_heads": width // HEAD, "num_hidden_layers": 2}
    return build("PatchTSTConfig", "PatchTSTForPrediction", **fields, **sizes, prediction_length=24)


def decision_transformer(width: int) -> nn.Module:
    fields = {"state_dim": 17, "act_dim": 6, "hidden_size": width, "max_ep_len": 90, "n_layer": 2}
    return build(
        "DecisionTransformerConfig",
        "DecisionTransformerModel",
        **fields,
        n_head=width // HEAD,
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
    )


def gemma3_vl(width: int) -> nn.Module:
    # All sizes of the family have one vision tower.
    text = decoder(width, 6, head_dim=HEAD)
    fields = {"mm_tokens_per_image": 9, "tie_word_embeddings": True}
    return build("Gemma3Config", "Gemma3ForConditionalGeneration", text_config=text, vision_config=tower(320), **fields)


def videomae(width: int) -> nn.Module:
    fields = tower(width, num_frames=4, tubelet_size=2)
    return build("VideoMAEConfig", "VideoMAEForVideoClassification", **fields)


def swinv2(width: int) -> nn.Module:
    fields = {"image_size": 56, "patch_size": 4, "window_size": 7, "depths": [1, 1], "num_labels": 10}
    sizes = {"embed_dim": 3 * width // 4, "num_heads": [width // HEAD, 2 * width // HEAD]}
    return build("Swinv2Config", "Swinv2ForImageClassification", **fields, **sizes)


def sam(width: int) -> nn.Module:
    # Only the vision encoder has several sizes.
    vision = {
        "hidden_size": width,
        "mlp_dim": 4 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD,
        "global_attn_indexes": [1],
        "window_size": 3,
        "image_size": 112,
        "patch_size": 14,
        "output_channels": 320,
    }
    prompt = {"hidden_size": 320, "image_size": 112, "patch_size": 14, "mask_input_channels": 20}
    mask = {"hidden_size": 320, "mlp_dim": 1200, "num_attention_heads": 5, "iou_head_hidden_dim": 340}
    return build("SamConfig", "SamModel", vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)


def timm_beit(width: int) -> nn.Module:
    from timm.models.beit import Beit

    fields: dict[str, Any] = {"img_size": 42, "patch_size": 14, "num_classes": 10, "init_values": 0.1}
    with torch.device("meta"):
        return Beit(embed_dim=width, depth=2, num_heads=width // HEAD, use_rel_pos_bias=True, **fields)


def wan(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "ffn_dim": 3 * width}
    return diffuser("WanTransformer3DModel", **heads, in_channels=16, out_channels=16, num_layers=2, text_dim=TEXT)


def ltx(width: int) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD, "attention_head_dim": HEAD, "cross_attention_dim": width}
    fields = {"in_channels": 60, "out_channels": 60, "num_layers": 2, "caption_channels": TEXT}
    return diffuser("LTXVideoTransformer3DModel", **heads, **fields)


UNUSUAL: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        torch_transformer,
        xlnet,
        recurrent_gemma,
        kimi_linear,
        falcon_h1,
        switch_transformer,
        esm,
        musicgen,
        wav2vec2_conformer,
        patchtst,
        decision_transformer,
        gemma3_vl,
        videomae,
        swinv2,
        sam,
        timm_beit,
        wan,
        ltx,
    )
}
