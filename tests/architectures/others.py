"""Small models of torch itself, Megatron-core, torchtitan, PEFT, x-transformers and fla on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from .language import HEAD, build, decoder
from .sizes import POSITIONS, VOCABULARY


class LSTMLanguageModel(nn.Module):
    """An AWD-LSTM: the embedding is narrower than the hidden state, and has one size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, 40)
        self.rnn = nn.LSTM(40, width, num_layers=2)
        self.decoder = nn.Linear(width, VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder


def lstm(width: int) -> nn.Module:
    with torch.device("meta"):
        return LSTMLanguageModel(width)


def _megatron(width: int, experts: int | None = None, grouped: bool = False, **fields: Any) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=width,
        num_attention_heads=width // HEAD,
        use_cpu_initialization=True,
        perform_initialization=False,
        num_moe_experts=experts,
        **fields,
    )
    # Layers of Megatron are allocated on the CPU whatever the default device is.
    model: nn.Module = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=grouped, moe_use_legacy_grouped_gemm=grouped
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=POSITIONS,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=False,
    )
    return model.to("meta")


def megatron_gpt(width: int) -> nn.Module:
    return _megatron(width)


def megatron_moe(width: int) -> nn.Module:
    shared = {"moe_shared_expert_intermediate_size": 3 * width, "add_bias_linear": False, "gated_linear_unit": True}
    return _megatron(width, 4, moe_router_topk=2, moe_ffn_hidden_size=3 * width // 2, **shared)


def megatron_grouped(width: int) -> nn.Module:
    from megatron.core.transformer.moe import grouped_gemm_util

    # The kernels are not needed to build the module.
    with mock.patch.object(grouped_gemm_util, "assert_grouped_gemm_is_available"):
        return _megatron(
            width, 4, grouped=True, moe_router_topk=2, moe_ffn_hidden_size=3 * width // 2, add_bias_linear=False
        )


def titan_llama3(width: int) -> nn.Module:
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    config = llama3.Llama3Model.Config(
        dim=width,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=width),
        norm=RMSNorm.Config(normalized_shape=width),
        lm_head=Linear.Config(in_features=width, out_features=VOCABULARY),
        layers=llama3._build_llama3_layers(
            n_layers=2,
            dim=width,
            n_heads=width // HEAD,
            n_kv_heads=2,
            hidden_dim=7 * width // 2,
            rope=ComplexRoPE.Config(dim=HEAD, max_seq_len=POSITIONS, theta=500000, scaling="llama"),
            attn_backend="flex",
        ),
    )
    with torch.device("meta"):
        return config.build()


def titan_deepseek_v3(width: int) -> nn.Module:
    from torchtitan.models import deepseek_v3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm

    layers = deepseek_v3._build_dsv3_layers(
        n_layers=2,
        n_dense_layers=1,
        dim=width,
        n_heads=width // HEAD,
        q_lora_rank=72,
        kv_lora_rank=40,
        qk_nope_head_dim=HEAD,
        qk_rope_head_dim=HEAD // 2,
        v_head_dim=HEAD,
        mscale=0.7,
        dense_hidden_dim=5 * width // 2,
        moe_hidden_dim=5 * width // 16,
        num_experts=4,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="sigmoid",
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=HEAD // 2, max_seq_len=POSITIONS, theta=10000.0, scaling="none"),
    )
    config = deepseek_v3.DeepSeekV3Model.Config(
        dim=width,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=width),
        norm=RMSNorm.Config(normalized_shape=width),
        lm_head=Linear.Config(in_features=width, out_features=VOCABULARY),
        layers=layers,
        mtp_layers=deepseek_v3._build_mtp_layers(layers[-1], dim=width, num_mtp_layers=1),
    )
    with torch.device("meta"):
        return config.build()


def peft_lora(width: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = build("LlamaConfig", "LlamaForSequenceClassification", **decoder(width, 3.5, num_labels=3))
    config = LoraConfig(r=10, target_modules=["q_proj", "v_proj"], modules_to_save=["score"], init_lora_weights=False)
    with torch.device("meta"):
        return get_peft_model(model, config).to("meta")


def x_transformer(width: int) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    with torch.device("meta"):
        layers = Decoder(dim=width, depth=1, heads=width // HEAD, attn_dim_head=HEAD, attn_num_mem_kv=3)
        return TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=POSITIONS, num_memory_tokens=5, attn_layers=layers
        ).to("meta")


def _fla(kind: str, width: int, **fields: Any) -> nn.Module:
    import fla.models

    config = getattr(fla.models, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        fuse_norm=False,
        **fields,
    )
    with torch.device("meta"):
        return getattr(fla.models, f"{kind}ForCausalLM")(config).to("meta")


def gla(width: int) -> nn.Module:
    return _fla("GLA", width, num_heads=width // HEAD)


def rwkv7(width: int) -> nn.Module:
    ranks = {"decay_low_rank_dim": 24, "gate_low_rank_dim": 40, "a_low_rank_dim": 28, "v_low_rank_dim": 12}
    return _fla("RWKV7", width, head_dim=HEAD, **ranks)


OTHERS: dict[str, Callable[[int], nn.Module]] = {
    function.__name__: function
    for function in (
        lstm,
        megatron_gpt,
        megatron_moe,
        megatron_grouped,
        titan_llama3,
        titan_deepseek_v3,
        peft_lora,
        x_transformer,
        gla,
        rwkv7,
    )
}
