"""The right roles in models of torch itself, Megatron-core, torchtitan, PEFT, x-transformers and fla; see `truth.py`."""

from __future__ import annotations

from typing import Final

_HEAD: Final = {"lm_head.weight": "output"}
_MEGATRON: Final = {
    "embedding.word_embeddings.weight": "vector",
    "output_layer.weight": "output -1",
    "*.linear_*.weight": "matrix -1",
}

OTHERS: Final[dict[str, dict[str, str]]] = {
    "lstm": {"rnn.weight_*": "matrix -1", "decoder.weight": "output"},
    "megatron_gpt": _MEGATRON,
    "megatron_moe": {**_MEGATRON, "*.router.weight": "output -1"},
    # weight1 has the shape (hidden, experts * out). The rows of weight2 are the inputs of all four experts.
    "megatron_grouped": {
        **_MEGATRON,
        "*.router.weight": "output -1",
        "*.experts.weight1": "matrix 0",
        "*.experts.weight2": "matrix 0 /4",
    },
    "titan_llama3": _HEAD,
    # The letters in the names are the dimensions: experts, features of the expert, features of the model. The forward
    # transposes the last two.
    "titan_deepseek_v3": {
        **_HEAD,
        "*.w1_EFD": "matrix -1",
        "*.w2_EDF": "matrix -1",
        "*.w3_EFD": "matrix -1",
        "*.router.gate.weight": "output",
    },
    "peft_lora": {"*.lora_?.default.weight": "undecided", "*.score.*.weight": "output"},
    "x_transformer": {
        "memory_tokens": "vector",
        "*.mem_k": "vector",
        "*.mem_v": "vector",
        "to_logits.weight": "output",
    },
    "gla": _HEAD,
    # What it calls lora are its own gates of low rank, trained from scratch.
    "rwkv7": {**_HEAD, "*.attn.x_?": "vector", "*.attn.r_k": "vector"},
}
