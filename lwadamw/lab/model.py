"""A LLaMA-style byte-level language model whose only scaled dimension is its width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ffn over width. One number for all widths, so that every fan_in of the model is a whole multiple of the width and an
# int base_width says all there is to say; 3 is LLaMA's 8/3 rounded up to a whole number.
FFN_RATIO: Final = 3
# After 500 steps at width 64, lr 0.01, weight decay 1.6 (one seed) 0.1 ends 0.13 nats higher, LLaMA's 0.02 0.21 nats.
EMBEDDING_STD: Final = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a `Transformer`. Wider models have more heads of the same size.

    Raises:
        ValueError: a size is not positive, or the heads do not fill the width.
    """

    width: int
    depth: int = 4
    head_dim: int = 32
    context: int = 128  # tokens the model is trained on; longer inputs work
    vocab: int = 256  # bytes
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "head_dim", "context", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelConfig: {name}={getattr(self, name)} is not positive.")
        if self.head_dim % 2:
            raise ValueError(f"ModelConfig: head_dim={self.head_dim} is odd, but rotary embedding turns pairs.")
        if self.width % self.head_dim:
            raise ValueError(
                f"ModelConfig: width={self.width} is not a whole number of heads. Give a multiple of head_dim={self.head_dim}."
            )

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def ffn(self) -> int:
        return FFN_RATIO * self.width


def rope(length: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, fp32[length, head_dim/2] each."""
    pair = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    position = torch.arange(length, device=device, dtype=torch.float32)
    turn = torch.outer(position, config.rope_base ** (-pair / config.head_dim))
    return turn.cos(), turn.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + head_dim/2]) of [..., length, head_dim] by their position's angles."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary embedding; the projection of queries, keys and values is one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # [batch, heads, length, head_dim] each
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, width))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y: Tensor = x + self.ffn(self.ffn_norm(x))
        return y


class Transformer(nn.Module):
    """RMSNorm before every sublayer and before the head, rotary positions, SwiGLU, an untied head, no biases.

    Matrices start with variance 1/fan_in and the head at zero, so that at every width the first loss is ln(vocab) and
    nothing of the head's own initial scale is left to transfer. Everything else is the same at every width.

    Args:
        config: the shape.
        seed: of the initial weights, which are drawn on the CPU and so do not depend on the device.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        self._initialize(torch.Generator("cpu").manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _draw(module.weight, module.in_features**-0.5, generator)
        _draw(self.embedding.weight, EMBEDDING_STD, generator)
        self.head.weight.zero_()

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, [batch, length, vocab], from int64[batch, length]."""
        x = self.embedding(tokens)
        cos, sin = rope(tokens.shape[1], self.config, tokens.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token after the first, of int64[batch, length + 1]."""
        logits = self(windows[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _draw(weight: Tensor, std: float, generator: torch.Generator) -> None:
    if not weight.is_meta:
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)
