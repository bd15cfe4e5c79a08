"""Sums of products, one sum per thread. A thread adds the products of its own elements."""

import triton
import triton.language as tl

from .layout import K_THREADS


@triton.jit
def add_products_of_two(total, b_a, b_b, N: tl.constexpr):
    """Add the products of two blocks, [N, 2], to sums, [N]."""
    a_0, a_1 = tl.split(tl.reshape(b_a, [N, 2]))
    b_0, b_1 = tl.split(tl.reshape(b_b, [N, 2]))
    return tl.fma(a_1, b_1, tl.fma(a_0, b_0, total))


@triton.jit
def add_products_of_four(total, b_a, b_b, N: tl.constexpr):
    """Add the products of two blocks, [N, 4], to sums, [N]."""
    a_0, a_1 = tl.split(tl.reshape(b_a, [2 * N, 2]))
    b_0, b_1 = tl.split(tl.reshape(b_b, [2 * N, 2]))
    return add_products_of_two(add_products_of_two(total, a_0, b_0, N), a_1, b_1, N)


@triton.jit
def add_products(total, b_a, b_b, EACH: tl.constexpr):
    """Add the products of two blocks, [K_THREADS * EACH], to a sum of each thread, [K_THREADS].

    One fused multiply-add takes each product. A sum over an axis would take two instructions. Triton 3.2 has no functions that
    call themselves.
    """
    if EACH == 8:
        a_0, a_1 = tl.split(tl.reshape(b_a, [4 * K_THREADS, 2]))
        b_0, b_1 = tl.split(tl.reshape(b_b, [4 * K_THREADS, 2]))
        total = add_products_of_four(add_products_of_four(total, a_0, b_0, K_THREADS), a_1, b_1, K_THREADS)
    elif EACH == 4:
        total = add_products_of_four(total, b_a, b_b, K_THREADS)
    elif EACH == 2:
        total = add_products_of_two(total, b_a, b_b, K_THREADS)
    else:
        tl.static_assert(EACH == 1)
        total = tl.fma(b_a, b_b, total)
    return total
