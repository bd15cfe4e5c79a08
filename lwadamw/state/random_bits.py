"""Random bits for rounding, in plain torch: the same bits, one for one, as in kernels/stochastic.py.

The bits of an element are a function of five numbers: the seed, the stream, the step, and the index of the element in the
whole, unsharded parameter (draws.py gives seed, stream and index). So nothing has to be stored or carried along. The bits do
not depend on grouping, chunks or sharding.

There are two functions, as in the kernels: `random_bits` for weights, `hash_bits` for 8-bit moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
DRAW = 8  # elements that share one draw of 128 bits, as layout.DRAW
HASH_DRAW = 2  # elements that share one hash of 32 bits, as layout.HASH_DRAW
PHILOX_ROUNDS = 7  # as layout.PHILOX_ROUNDS


def random_bits(index: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """Return 16 random bits per element, for stochastic rounding of a weight.

    Element e gets half (e mod 2) of word (e mod 8) // 2 of Philox 4x32 with 7 rounds. The key is the seed. The counter
    consists of e // 8 (lower 32 bits, upper 32 bits), step and stream.

    Args:
        index: index of each element in the whole parameter, int64 of any shape.
        seed: `rounding_seed` of the group, 64 bits.
        stream: the stream of the parameter, 32 bits.
        step: the step that is being taken, as `state["step"]` counts it, 32 bits.

    Returns:
        int32 of the shape of `index`, 0 <= bits < 2^16.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    draw = index // DRAW
    c0, c1 = draw & _MASK, draw >> 32
    c2, c3 = torch.full_like(draw, step & _MASK), torch.full_like(draw, stream & _MASK)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    place = index % DRAW
    word = torch.where(place < 4, torch.where(place < 2, c0, c1), torch.where(place < 6, c2, c3))
    return torch.where(place % 2 == 0, word & 0xFFFF, word >> 16).to(torch.int32)


def hash_bits(index: Tensor, seed: int, stream: int, step: int) -> Tensor:
    """Return 16 random bits per element, for rounding 8-bit moments.

    Element e gets half (e mod 2) of a hash of e // 2 and the other numbers with murmur3's 32-bit finaliser. In the kernels,
    Philox would take a tenth of all instructions here.

    Args:
        index: index of each element in the whole parameter, int64 of any shape.
        seed: `rounding_seed` of the group, 64 bits.
        stream: the stream of the parameter, 32 bits.
        step: the step that is being taken, 32 bits.

    Returns:
        int32 of the shape of `index`, 0 <= bits < 2^16.
    """
    key = _mixed(torch.tensor((seed & _MASK) ^ 0x9E3779B9, device="cpu"))
    key = _mixed(_mixed(key ^ (seed >> 32 & _MASK) ^ stream) ^ step).to(index.device)
    word = _mixed((_product(0x9E3779B1, index // HASH_DRAW & _MASK)[1] + key) & _MASK)
    return torch.where(index % HASH_DRAW == 0, word & 0xFFFF, word >> 16).to(torch.int32)


def _mixed(h: Tensor) -> Tensor:
    """Return murmur3's 32-bit finaliser of h."""
    h = _product(0x85EBCA6B, h ^ h >> 16)[1]
    h = _product(0xC2B2AE35, h ^ h >> 13)[1]
    return h ^ h >> 16


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and the lower 32 bits of the product of two 32-bit numbers, without overflow of int64."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | (low & 0xFFFF)
