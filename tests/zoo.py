"""Small copies of models that people train, with parameters whose role is hard to tell."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))


class LlamaLayer(nn.Module):
    """Grouped-query attention (one key and value head for four query heads), qk-norm, and a SwiGLU of width 3d."""

    def __init__(self, d: int) -> None:
        super().__init__()
        head = d // 8
        self.attention_norm, self.ffn_norm = RMSNorm(d), RMSNorm(d)
        self.wq, self.wk = nn.Linear(d, d, bias=False), nn.Linear(d, 2 * head, bias=False)
        self.wv, self.wo = nn.Linear(d, 2 * head, bias=False), nn.Linear(d, d, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head), RMSNorm(head)
        self.gate_proj, self.up_proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, 3 * d, bias=False)
        self.down_proj = nn.Linear(3 * d, d, bias=False)


class Llama(nn.Module):
    """Has an untied head."""

    def __init__(self, d: int, layers: int = 2) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(96, d)
        self.layers = nn.ModuleList(LlamaLayer(d) for _ in range(layers))
        self.norm = RMSNorm(d)
        self.lm_head = nn.Linear(d, 96, bias=False)


class Conv1D(nn.Module):
    """The layer of transformers' GPT-2: its weight has the shape (in, out)."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W + b."""
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class GPT2(nn.Module):
    """Conv1D layers, learned positions, and a head that is tied to the embedding."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(96, d), nn.Embedding(32, d)
        self.h = nn.ModuleList(
            [nn.ModuleDict({"ln_1": nn.LayerNorm(d), "c_attn": Conv1D(3 * d, d), "c_fc": Conv1D(4 * d, d)})]
        )
        self.h[0]["c_proj"] = Conv1D(d, 4 * d)
        self.lm_head = nn.Linear(d, 96, bias=False)
        self.lm_head.weight = self.wte.weight


class Experts(nn.Module):
    """Packed experts: each weight has the shape (experts, out, in)."""

    def __init__(self, n: int, d: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(n, 4 * d, d))
        self.down = nn.Parameter(torch.randn(n, d, 2 * d))


class MoE(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, 4, bias=False)
        self.experts = Experts(4, d)


class Mamba(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, 4, groups=d)
        self.A_log, self.D = nn.Parameter(torch.randn(d, 16)), nn.Parameter(torch.ones(d))
        self.dt_proj = nn.Linear(d // 16, d)
        self.mixture = nn.Parameter(torch.randn(d, 16))


class ViT(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, 17, d))
        self.patch_embed = nn.Conv2d(3, d, 4, 4)
        self.attention = nn.MultiheadAttention(d, 4)
        self.mixer = nn.Conv2d(d, d, 3, padding=1)
        self.mixing, self.temperature = nn.Parameter(torch.zeros(1, 5, d)), nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(d, 10)


class LoRALinear(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.base = nn.Linear(d, d)
        self.base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(d, 4, bias=False), nn.Linear(4, d, bias=False)


class Recurrent(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d, d)
        self.bilinear = nn.Bilinear(d, d, 3)
