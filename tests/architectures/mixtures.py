"""Small mixtures of experts and recurrent language models of transformers at a width, on the meta device."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .language import HEAD, build, decoder
from .sizes import POSITIONS, VOCABULARY


def mixtral(width: int) -> nn.Module:
    return build("MixtralConfig", "MixtralForCausalLM", **decoder(width, 3.5, num_local_experts=4))


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


def olmoe(width: int) -> nn.Module:
    return build(
        "OlmoeConfig",
        "OlmoeForCausalLM",
        **decoder(width, 0.5, num_key_value_heads=width // HEAD, num_experts=4, num_experts_per_tok=2),
    )


def phimoe(width: int) -> nn.Module:
    return build("PhimoeConfig", "PhimoeForCausalLM", **decoder(width, 1.5, num_local_experts=4, lm_head_bias=True))


def granite_moe(width: int) -> nn.Module:
    return build(
        "GraniteMoeConfig", "GraniteMoeForCausalLM", **decoder(width, 0.375, num_local_experts=4, num_experts_per_tok=2)
    )


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


MIXTURES: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        mixtral,
        qwen2_moe,
        qwen3_moe,
        qwen3_next,
        deepseek_v3,
        gpt_oss,
        llama4,
        olmoe,
        phimoe,
        granite_moe,
        glm4_moe,
        mamba,
        mamba2,
        jamba,
        rwkv,
        nemotron_h,
        lfm2,
    )
}
