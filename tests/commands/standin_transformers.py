"""A stand-in for transformers, for tests without it: configs with the real names of fields, and models of their shapes.

A test copies this file to a folder as transformers.py. It is strict where the real package is lenient: whatever could reach
the network, or run code of a model's author, is refused.
"""
# ruff: noqa: RUF012 (the class attributes are written as in the real package)

import json
import math
from pathlib import Path

import torch
from torch import nn

__version__ = "5.0.standin"
CACHED: dict[str, str] = {}


class Config:
    model_type = ""
    attribute_map: dict[str, str] = {}
    nested: dict[str, type["Config"]] = {}
    defaults: dict[str, object] = {}

    def __init__(self, **fields):
        for name, value in {**self.defaults, **fields}.items():
            own = self.nested.get(name)
            setattr(self, name, own(**value) if own is not None and isinstance(value, dict) else value)
        self.check()

    def check(self):
        pass

    @classmethod
    def from_dict(cls, fields):
        return cls(**fields)

    def to_dict(self):
        fields = {name: value.to_dict() if isinstance(value, Config) else value for name, value in vars(self).items()}
        return {**fields, "model_type": self.model_type}

    def get_text_config(self):
        names = [name for name in ("text_encoder", "decoder", "text_config") if hasattr(self, name)]
        if len(names) > 1:
            raise ValueError(f"Multiple valid text configs were found in the model config: {names}.")
        return getattr(self, names[0]) if names else self


class VisionConfig(Config):
    defaults = {"hidden_size": 48, "intermediate_size": 96, "out_hidden_size": 256, "embed_dim": 256}


class TextConfig(Config):
    """Grouped-query attention with a low rank, and experts."""

    defaults = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "moe_intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 24,
        "mystery_size": 40,
        "num_hidden_layers": 6,
        "layer_types": ["dense", "dense", "moe", "dense", "moe", "moe"],
        "num_experts": 4,
        "vocab_size": 100,
    }

    def check(self):
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads has to divide num_attention_heads.")


class SightedConfig(Config):
    model_type = "sighted"
    nested = {"text_config": TextConfig, "vision_config": VisionConfig}
    defaults = {"text_config": {}, "vision_config": {}, "projection_dim": 256}


class PlainConfig(Config):
    """The names of GPT-2; a head has an equal share of the width, and the time step's rank is that of Mamba."""

    model_type = "plain"
    attribute_map = {"hidden_size": "n_embd"}
    defaults = {"n_embd": 192, "n_head": 12, "n_inner": None, "n_layer": 2, "time_step_rank": "auto", "vocab_size": 100}

    def check(self):
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.n_embd / 16)


class StubbornConfig(PlainConfig):
    """Computes a field that the file gives."""

    model_type = "stubborn"
    defaults = {**PlainConfig.defaults, "d_inner": 100}

    def check(self):
        super().check()
        self.d_inner = 100


class TwoTextsConfig(Config):
    model_type = "two_texts"
    nested = {"decoder": PlainConfig, "text_encoder": PlainConfig}
    defaults = {"decoder": {}, "text_encoder": {}}


class WidthlessConfig(Config):
    model_type = "widthless"
    nested = {"patcher_config": PlainConfig}
    defaults = {"patcher_config": {}}


def linear(into, out):
    return nn.Linear(into, out, bias=False)


class Conv1D(nn.Module):
    """Its weight has the shape (in, out)."""

    def __init__(self, out, into):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(into, out))


class Experts(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size))
        self.down_proj = nn.Parameter(torch.randn(c.num_experts, c.hidden_size, c.moe_intermediate_size))


class Layer(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_b_proj = linear(c.q_lora_rank, c.num_attention_heads * c.head_dim)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.norm = nn.LayerNorm(c.hidden_size)
        if kind == "moe":
            self.router, self.experts = linear(c.hidden_size, c.num_experts), Experts(c)
        else:
            self.up_proj = linear(c.hidden_size, c.intermediate_size)
            self.down_proj = linear(c.intermediate_size, c.hidden_size)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None)


class SightedForConditionalGeneration(Model):
    def __init__(self, config):
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.fc1 = linear(vision.hidden_size, vision.intermediate_size)
        self.projector = linear(vision.intermediate_size, vision.out_hidden_size)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(Layer(text, kind) for kind in text.layer_types)
        self.lm_head = linear(text.hidden_size, text.vocab_size)


class PlainLMHeadModel(Model):
    def __init__(self, config):
        super().__init__(config)
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}.")
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "fc": Conv1D(inner, config.n_embd),
                    "out_proj": linear(inner, config.n_embd),
                    "dt_proj": linear(config.time_step_rank, inner),
                }
            )
            for _ in range(config.n_layer)
        )
        self.lm_head = linear(config.n_embd, config.vocab_size)
        self.lm_head.weight = self.wte.weight


class PlainModel(PlainLMHeadModel):
    pass


CONFIG_MAPPING = {
    kind.model_type: kind for kind in (SightedConfig, PlainConfig, StubbornConfig, TwoTextsConfig, WidthlessConfig)
}


class AutoConfig:
    @staticmethod
    def from_pretrained(path, *, local_files_only, trust_remote_code):
        assert local_files_only is True
        assert trust_remote_code is False
        fields = json.loads(Path(path).read_text())
        kind = fields.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"The checkpoint has model type `{kind}`, which is not known.")
        return CONFIG_MAPPING[kind].from_dict(fields)


class AutoModelForCausalLM:
    _model_mapping = {PlainConfig: PlainLMHeadModel, StubbornConfig: PlainLMHeadModel}

    @classmethod
    def from_config(cls, config):
        return cls._model_mapping[type(config)](config)


class AutoModel(AutoModelForCausalLM):
    _model_mapping = {SightedConfig: SightedForConditionalGeneration}


class utils:
    @staticmethod
    def cached_file(name, file, *, local_files_only):
        assert local_files_only is True
        if name not in CACHED:
            raise OSError(f"{name} is not cached")
        return str(Path(CACHED[name]) / file)


class logging:
    @staticmethod
    def set_verbosity_error():
        pass
