"""The right roles in the language models; see `truth.py`."""

from __future__ import annotations

from typing import Final

_HEAD: Final = {"lm_head.weight": "output"}
# Packed experts of shape (experts, out, in), except where the forward multiplies from the other side.
_EXPERTS: Final = {"*.experts.gate_up_proj": "matrix -1", "*.experts.down_proj": "matrix -1"}
_EXPERTS_IN_OUT: Final = {"*.experts.gate_up_proj": "matrix -2", "*.experts.down_proj": "matrix -2"}
_GATE: Final = {"*.mlp.gate.weight": "output -1"}
_SHARED_GATE: Final = {"*.mlp.shared_expert_gate.weight": "output"}

LANGUAGE: Final[dict[str, dict[str, str]]] = {
    "llama": _HEAD,
    "llama_tied": {},
    "mistral": _HEAD,
    "mixtral": {**_HEAD, **_EXPERTS, **_GATE},
    "qwen2": _HEAD,
    "qwen3": _HEAD,
    "qwen2_moe": {**_HEAD, **_EXPERTS, **_GATE, **_SHARED_GATE},
    "qwen3_moe": {**_HEAD, **_EXPERTS, **_GATE},
    "qwen3_next": {**_HEAD, **_EXPERTS, **_GATE, **_SHARED_GATE},
    "gemma2": {},
    "gemma3": {},
    "deepseek_v3": {**_HEAD, **_EXPERTS, **_GATE},
    "gpt_oss": {
        **_HEAD,
        **_EXPERTS_IN_OUT,
        "*.experts.*_bias": "vector",
        "*.mlp.router.weight": "output -1",
    },
    "llama4": {**_HEAD, **_EXPERTS_IN_OUT, "*.feed_forward.router.weight": "output"},
    "olmo2": _HEAD,
    "olmoe": {**_HEAD, **_EXPERTS, **_GATE},
    "phi3": _HEAD,
    "phimoe": {**_HEAD, **_EXPERTS, "*.mlp.router.weight": "output -1"},
    "gpt2": {},
    "gpt_neox": _HEAD,
    "granite": {},
    "granite_moe": {**_HEAD, **_EXPERTS, "*.router.weight": "output -1"},
    "glm4": _HEAD,
    "glm4_moe": {**_HEAD, **_EXPERTS, **_GATE},
    "mamba": {"*.A_log": "vector"},
    "mamba2": _HEAD,
    "jamba": {**_HEAD, **_EXPERTS, "*.A_log": "vector", "*.router.weight": "output -1"},
    "rwkv": {"head.weight": "output", "*.time_*": "vector"},
    "falcon": {},
    "bloom": {},
    "opt": {},
    "cohere2": {},
    "nemotron_h": {
        **_HEAD,
        "*.experts.up_proj": "matrix -1",
        "*.experts.down_proj": "matrix -1",
        "*.mixer.gate.weight": "output -1",
    },
    "lfm2": {},
    # The coefficients mix a few copies of the hidden states; neither of their sizes grows.
    "gemma3n": {"*.modality_router.weight": "output", "*_coefs.weight": "vector"},
}
