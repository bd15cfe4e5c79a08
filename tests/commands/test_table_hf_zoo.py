"""`table --hf` with the real transformers, on configs of models that people train. None of them is allocated."""

import json
import time

import pytest

import lwadamw
from lwadamw.commands.hf import build_pair
from tests.commands.hf_cases import json_table, pasted, refusal

pytestmark = pytest.mark.zoo

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "vocab_size": 32000,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
QWEN3 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
}
GEMMA3 = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_head": 12, "n_layer": 12}
WHISPER = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "d_model": 768,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "vocab_size": 51865,
}
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "hidden_size": 2560,
    "num_hidden_layers": 64,
    "state_size": 16,
    "expand": 2,
    "vocab_size": 50280,
}
EXPERTS = ("--role=*.experts.gate_up_proj=matrix:-1", "--role=*.experts.down_proj=matrix:-1")
SIGLIP = ("--role=*.probe=vector", "--role=*.mm_input_projection_weight=matrix:-2")
A_LOG = ("--role=*.A_log=vector",)

# For each config: the proxy's width, roles, changed fields, and the ratio and the fan_in at the proxy of some matrices.
CASES = {
    "llama": (
        LLAMA,
        256,
        (),
        {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"model.layers.31.mlp.down_proj.weight": (16, 896), "model.layers.0.self_attn.o_proj.weight": (16, 256)},
        ("--set", "num_key_value_heads=1"),
    ),
    "mixtral": (
        MIXTRAL,
        512,
        EXPERTS,
        {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 1},
        {
            "model.layers.0.mlp.experts.gate_up_proj": (8, 512),
            "model.layers.0.mlp.experts.down_proj": (8, 1792),
            "model.layers.0.mlp.gate.weight": (8, 512),
        },
        (),
    ),
    "deepseek_v3": (
        DEEPSEEK,
        448,
        EXPERTS,
        {
            "hidden_size": 448,
            "intermediate_size": 1152,
            "moe_intermediate_size": 128,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        {
            "model.layers.0.mlp.down_proj.weight": (16, 1152),
            "model.layers.60.mlp.experts.down_proj": (16, 128),
            "model.layers.60.self_attn.q_a_proj.weight": (16, 448),
            "model.layers.60.self_attn.q_b_proj.weight": (1, 1536),
            "model.layers.60.self_attn.kv_b_proj.weight": (1, 512),
            "model.layers.60.self_attn.o_proj.weight": (16, 1024),
            "lm_head.weight": (16, 448),
        },
        (),
    ),
    "qwen3": (
        QWEN3,
        1024,
        (),
        {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8, "num_key_value_heads": 2},
        {"model.layers.35.mlp.down_proj.weight": (4, 3072), "model.layers.0.self_attn.o_proj.weight": (4, 1024)},
        (),
    ),
    "gemma3": (
        GEMMA3,
        640,
        SIGLIP,
        {
            "text_config.hidden_size": 640,
            "text_config.intermediate_size": 2560,
            "text_config.num_attention_heads": 2,
            "text_config.num_key_value_heads": 1,
        },
        {
            "model.language_model.layers.0.self_attn.o_proj.weight": (4, 512),
            "model.language_model.layers.33.mlp.down_proj.weight": (4, 2560),
            "model.vision_tower.encoder.layers.0.mlp.fc2.weight": (1, 4304),
        },
        (),
    ),
    "gpt2": (
        GPT2,
        192,
        (),
        {"n_embd": 192, "n_head": 3},
        {"transformer.h.0.mlp.c_proj.weight": (4, 768), "transformer.h.0.mlp.c_fc.weight": (4, 192)},
        (),
    ),
    "whisper": (
        WHISPER,
        192,
        (),
        {
            "d_model": 192,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 768,
            "decoder_ffn_dim": 768,
        },
        {"model.encoder.layers.0.fc2.weight": (4, 768), "model.decoder.layers.11.fc1.weight": (4, 192)},
        (),
    ),
    "mamba": (
        MAMBA,
        320,
        A_LOG,
        {"hidden_size": 320, "intermediate_size": 640, "time_step_rank": 20},
        {
            "backbone.layers.0.mixer.in_proj.weight": (8, 320),
            "backbone.layers.0.mixer.out_proj.weight": (8, 640),
            "backbone.layers.63.mixer.dt_proj.weight": (8, 20),
        },
        (),
    ),
}


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("transformers")

    def write(fields):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return str(path)

    return write


@pytest.mark.parametrize("case", CASES)
def test_the_pasted_code_gives_the_true_ratios(case, config, capsys):
    fields, width, roles, changed, expected, settings = CASES[case]
    found = json_table(capsys, config(fields), "--base-width", str(width), *roles, *settings)
    assert {path: new for path, (_, new) in found["changed"].items()} == changed
    shown = {row["name"]: row for row in found["parameters"]}
    assert {n: (shown[n]["m"], shown[n]["fan_in"] / shown[n]["m"]) for n in expected} == expected
    model = build_pair(config(fields), None, None, None, {}).model
    evidence = pasted(found["code"], model).evidence
    assert {n: (one.role, one.fan_in, one.m) for n, one in evidence.items()} == {
        n: (row["role"], row["fan_in"], row["m"]) for n, row in shown.items()
    }
    assert len(found["base_width"]) <= 16


@pytest.mark.parametrize("case", [case for case in CASES if case != "gemma3"])
def test_the_scaled_config_is_that_of_a_model_that_runs(case, config):
    torch = pytest.importorskip("torch")
    fields, width, _, _, _, settings = CASES[case]
    width = {"deepseek_v3": 56, "llama": 128, "mixtral": 512, "qwen3": 512}.get(case, width)
    pinned = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    pinned |= {"num_key_value_heads": 1} if settings else {}
    pinned |= {"decoder_start_token_id": 1} if case == "whisper" else {}
    proxy = build_pair(config(fields), None, width, 4, pinned).proxy
    model = type(proxy)(proxy.config).eval()
    ids = torch.ones(1, 5, dtype=torch.long)
    inputs = {"input_ids": ids}
    if case == "whisper":
        inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": ids}
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, 5, 50)


def test_every_remedy_for_a_width_of_llama_works_when_pasted(config, capsys):
    message = refusal(capsys, config(LLAMA), "--base-width", "256")
    assert "num_key_value_heads=8 would be 0.5, and 8 does not divide 2 heads" in message
    assert "multiple of 512, or say what these are at the proxy, for example --set num_key_value_heads=1." in message


def test_a_model_that_needs_code_of_its_author_is_refused(config, capsys):
    fields = {**LLAMA, "model_type": "llama_of_mine", "auto_map": {"AutoConfig": "configuration_mine.Config"}}
    assert "runs no such code" in refusal(capsys, config(fields), "--base-width", "512")
    assert "no model whose config.json is in the cache" in refusal(capsys, "nobody/no-such-model")


def test_671_billion_parameters_take_seconds(config):
    path = config(DEEPSEEK)
    build_pair(path, None, 448, None, {})  # imports the model's module
    start = time.perf_counter()
    pair = build_pair(path, None, 448, None, {})
    groups = lwadamw.param_groups(pair.model, pair.proxy, roles={"*.experts.*_proj": lwadamw.Matrix(fan_in=-1)})
    seconds = time.perf_counter() - start
    assert sum(p.numel() for group in groups for _, p in group["params"]) > 671e9
    assert seconds < 30
