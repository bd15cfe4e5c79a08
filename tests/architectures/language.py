"""Small dense language models of transformers at a width, on the meta device.

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


def qwen2(width: int) -> nn.Module:
    return build("Qwen2Config", "Qwen2ForCausalLM", **decoder(width, 5.25))


def qwen3(width: int) -> nn.Module:
    return build("Qwen3Config", "Qwen3ForCausalLM", **decoder(width, 3, head_dim=HEAD))


def gemma2(width: int) -> nn.Module:
    return build("Gemma2Config", "Gemma2ForCausalLM", **decoder(width, 4, head_dim=HEAD, tie_word_embeddings=True))


def gemma3(width: int) -> nn.Module:
    return build("Gemma3TextConfig", "Gemma3ForCausalLM", **decoder(width, 6, head_dim=HEAD, tie_word_embeddings=True))


def olmo2(width: int) -> nn.Module:
    return build("Olmo2Config", "Olmo2ForCausalLM", **decoder(width, 2.6875))


def phi3(width: int) -> nn.Module:
    return build("Phi3Config", "Phi3ForCausalLM", **decoder(width, 2.5))


def gpt2(width: int) -> nn.Module:
    fields = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": width, "n_layer": 2}
    return build("GPT2Config", "GPT2LMHeadModel", **fields, n_head=width // HEAD, bos_token_id=1, eos_token_id=2)


def gpt_neox(width: int) -> nn.Module:
    return build("GPTNeoXConfig", "GPTNeoXForCausalLM", **decoder(width, 4))


def granite(width: int) -> nn.Module:
    return build("GraniteConfig", "GraniteForCausalLM", **decoder(width, 4, tie_word_embeddings=True))


def glm4(width: int) -> nn.Module:
    return build("Glm4Config", "Glm4ForCausalLM", **decoder(width, 3.375, head_dim=HEAD))


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
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        olmo2,
        phi3,
        gpt2,
        gpt_neox,
        granite,
        glm4,
        falcon,
        bloom,
        opt,
        cohere2,
        gemma3n,
    )
}
