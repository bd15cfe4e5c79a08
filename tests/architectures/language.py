"""Small language models of transformers at a width, on the meta device.

Sizes follow the proportions of each family. Head sizes, numbers of experts, low ranks and vocabularies do not follow the width.
No two sizes of different meaning are equal at the widths in use, unless a comment says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .sizes import POSITIONS, VOCABULARY

HEAD = 64


def build(config: str, model: str, **fields: Any) -> nn.Module:
    """Return a transformers model of a config on the meta device.

    Args:
        config: name of the config class.
        model: name of the model class.
        **fields: fields of the config.
    """
    import transformers

    made = getattr(transformers, config)(**fields)
    with torch.device("meta"):
        module: nn.Module = getattr(transformers, model)(made)
    # A few parameters are made on the CPU whatever the default device is.
    return module.to("meta")


def decoder(width: int, intermediate: float, **fields: Any) -> dict[str, Any]:
    """Return the fields that most decoders share: heads of a fixed size and two key and value heads."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": int(intermediate * width),
        "num_hidden_layers": 2,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | fields


def llama(width: int) -> nn.Module:
    return build("LlamaConfig", "LlamaForCausalLM", **decoder(width, 3.5))


def llama_tied(width: int) -> nn.Module:
    return build("LlamaConfig", "LlamaForCausalLM", **decoder(width, 4, tie_word_embeddings=True))


def mistral(width: int) -> nn.Module:
    return build("MistralConfig", "MistralForCausalLM", **decoder(width, 3.5))


def mixtral(width: int) -> nn.Module:
    return build("MixtralConfig", "MixtralForCausalLM", **decoder(width, 3.5, num_local_experts=4))


def qwen2(width: int) -> nn.Module:
    return build("Qwen2Config", "Qwen2ForCausalLM", **decoder(width, 5.25))


def qwen3(width: int) -> nn.Module:
    return build("Qwen3Config", "Qwen3ForCausalLM", **decoder(width, 3, head_dim=HEAD))


def qwen2_moe(width: int) -> nn.Module:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 11 * width // 16,
        "shared_expert_intermediate_size": 11 * width // 4,
    }
    return build("Qwen2MoeConfig", "Qwen2MoeForCausalLM", **decoder(width, 2.75, **experts))


def qwen3_moe(width: int) -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3 * width // 8}
    return build("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **decoder(width, 3, head_dim=HEAD, **experts))


def qwen3_next(width: int) -> nn.Module:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 5 * width // 16,
        "shared_expert_intermediate_size": 5 * width // 16,
        "linear_num_key_heads": width // HEAD,
        "linear_num_value_heads": width // HEAD,
        "linear_key_head_dim": HEAD,
        "linear_value_head_dim": HEAD,
        "layer_types": ["linear_attention", "full_attention"],
    }
    return build("Qwen3NextConfig", "Qwen3NextForCausalLM", **decoder(width, 2.5, head_dim=HEAD, **experts))


def gemma2(width: int) -> nn.Module:
    return build("Gemma2Config", "Gemma2ForCausalLM", **decoder(width, 4, head_dim=HEAD, tie_word_embeddings=True))


def gemma3(width: int) -> nn.Module:
    return build("Gemma3TextConfig", "Gemma3ForCausalLM", **decoder(width, 6, head_dim=HEAD, tie_word_embeddings=True))


def deepseek_v3(width: int) -> nn.Module:
    # The ranks are the same in V2 of width 5120 and in V3 of width 7168, so they do not follow the width here either.
    latent = {
        "q_lora_rank": 72,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": HEAD,
        "qk_rope_head_dim": HEAD // 2,
        "v_head_dim": HEAD,
        "num_key_value_heads": width // HEAD,
    }
    experts = {
        "moe_intermediate_size": 5 * width // 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    return build("DeepseekV3Config", "DeepseekV3ForCausalLM", **decoder(width, 2.5, **latent, **experts))


def gpt_oss(width: int) -> nn.Module:
    return build(
        "GptOssConfig",
        "GptOssForCausalLM",
        **decoder(width, 1, head_dim=HEAD, num_local_experts=4, num_experts_per_tok=2),
    )


def llama4(width: int) -> nn.Module:
    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 3 * width,
    }
    return build("Llama4TextConfig", "Llama4ForCausalLM", **decoder(width, 1.5, head_dim=HEAD, **experts))


def olmo2(width: int) -> nn.Module:
    return build("Olmo2Config", "Olmo2ForCausalLM", **decoder(width, 2.6875))


def olmoe(width: int) -> nn.Module:
    return build(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        **decoder(width, 0.5, num_key_value_heads=width // HEAD, num_experts=4, num_experts_per_tok=2),
    )


def phi3(width: int) -> nn.Module:
    return build("Phi3Config", "Phi3ForCausalLM", **decoder(width, 2.5))


def phimoe(width: int) -> nn.Module:
    return build("PhimoeConfig", "PhimoeForCausalLM", **decoder(width, 1.5, num_local_experts=4, lm_head_bias=True))


def gpt2(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": width, "n_layer": 2}
    return build("GPT2Config", "GPT2LMHeadModel", **fields, n_head=width // HEAD, bos_token_id=1, eos_token_id=2)


def gpt_neox(width: int) -> nn.Module:
    return build("GPTNeoXConfig", "GPTNeoXForCausalLM", **decoder(width, 4))


def granite(width: int) -> nn.Module:
    return build("GraniteConfig", "GraniteForCausalLM", **decoder(width, 4, tie_word_embeddings=True))


def granite_moe(width: int) -> nn.Module:
    return build(
        "GraniteMoeConfig", "GraniteMoeForCausalLM", **decoder(width, 0.375, num_local_experts=4, num_experts_per_tok=2)
    )


def glm4(width: int) -> nn.Module:
    return build("Glm4Config", "Glm4ForCausalLM", **decoder(width, 3.375, head_dim=HEAD))


def glm4_moe(width: int) -> nn.Module:
    experts = {
        "moe_intermediate_size": 11 * width // 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": True,
    }
    return build("Glm4MoeConfig", "Glm4MoeForCausalLM", **decoder(width, 2.75, head_dim=HEAD, **experts))


def mamba(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": 2, "state_size": 10, "expand": 2}
    return build("MambaConfig", "MambaForCausalLM", **fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def mamba2(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": 2, "state_size": 40, "expand": 2}
    heads = {"head_dim": HEAD, "num_heads": 2 * width // HEAD, "n_groups": 1}
    return build("Mamba2Config", "Mamba2ForCausalLM", **fields, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def jamba(width: int) -> nn.Module:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 10,
        "mamba_dt_rank": width // 16,
        "use_mamba_kernels": False,
    }
    return build("JambaConfig", "JambaForCausalLM", **decoder(width, 3.5, **experts))


def rwkv(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "context_length": POSITIONS, "hidden_size": width, "num_hidden_layers": 2}
    return build("RwkvConfig", "RwkvForCausalLM", **fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def falcon(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": 2, "multi_query": True}
    return build(
        "FalconConfig",
        "FalconForCausalLM",
        **fields,
        num_attention_heads=width // HEAD,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def bloom(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "hidden_size": width, "n_layer": 2, "n_head": width // HEAD}
    return build("BloomConfig", "BloomForCausalLM", **fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def opt(width: int) -> nn.Module:
    # The smallest OPT and 350M have embeddings narrower than the model, with projections around the layers.
    fields = {"word_embed_proj_dim": width // 2, "do_layer_norm_before": False, "ffn_dim": 4 * width}
    return build("OPTConfig", "OPTForCausalLM", **decoder(width, 4, tie_word_embeddings=True, **fields))


def cohere2(width: int) -> nn.Module:
    return build("Cohere2Config", "Cohere2ForCausalLM", **decoder(width, 3.5, head_dim=HEAD, tie_word_embeddings=True))


def nemotron_h(width: int) -> nn.Module:
    mixer = {
        "mamba_num_heads": 2 * width // HEAD,
        "mamba_head_dim": HEAD,
        "ssm_state_size": 40,
        "n_groups": 1,
        "layers_block_type": ["mamba", "attention", "moe"],
        "head_dim": HEAD,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 3 * width // 4,
        "moe_shared_expert_intermediate_size": 3 * width // 2,
    }
    return build("NemotronHConfig", "NemotronHForCausalLM", **decoder(width, 4, **mixer))


def lfm2(width: int) -> nn.Module:
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    return build("Lfm2Config", "Lfm2ForCausalLM", **decoder(width, 4.5, tie_word_embeddings=True, **layers))


def gemma3n(width: int) -> nn.Module:
    fields = {
        "head_dim": HEAD,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 40,
        "laurel_rank": 24,
        "altup_num_inputs": 3,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": None,
    }
    return build("Gemma3nTextConfig", "Gemma3nForCausalLM", **decoder(width, 8, tie_word_embeddings=True, **fields))


LANGUAGE: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        llama,
        llama_tied,
        mistral,
        mixtral,
        qwen2,
        qwen3,
        qwen2_moe,
        qwen3_moe,
        qwen3_next,
        gemma2,
        gemma3,
        deepseek_v3,
        gpt_oss,
        llama4,
        olmo2,
        olmoe,
        phi3,
        phimoe,
        gpt2,
        gpt_neox,
        granite,
        granite_moe,
        glm4,
        glm4_moe,
        mamba,
        mamba2,
        jamba,
        rwkv,
        falcon,
        bloom,
        opt,
        cohere2,
        nemotron_h,
        lfm2,
        gemma3n,
    )
}
