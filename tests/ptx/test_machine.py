"""The pretended GPU computes what compiled kernels say, and refuses what a GPU would do wrong in silence."""

import re

import pytest
import torch
import triton
import triton.language as tl

from lwadamw.kernels import layout
from tests.ptx.gpu import compile_for
from tests.ptx.machine import Machine
from tests.ptx.memory import AccessError, Global
from tests.ptx.program import parse

if layout.INTERPRETED or torch.cuda.is_available():
    pytest.skip("make test-compiled runs this", allow_module_level=True)

SIZE = 1024


@triton.jit
def double_kernel(source, target, n, SIZE: tl.constexpr):
    """target = 2 source, in blocks of SIZE elements that are copied to shared memory two blocks ahead."""
    for i in tl.range(0, n, SIZE, num_stages=3):
        offsets = i + tl.arange(0, SIZE)
        tl.store(target + offsets, 2 * tl.load(source + offsets))


@triton.jit
def softmax_kernel(source, target, n, SIZE: tl.constexpr):
    """One program for each row of `n` elements. The largest and the sum cross all warps."""
    offsets = tl.arange(0, SIZE)
    row = tl.program_id(0) * n
    x = tl.load(source + row + offsets, mask=offsets < n, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(target + row + offsets, e / tl.sum(e, 0), mask=offsets < n)


@triton.jit
def reverse_kernel(source, target, SIZE: tl.constexpr):
    """Each warp reads what other warps wrote to shared memory."""
    x = tl.load(source + tl.arange(0, SIZE))
    tl.store(target + tl.arange(0, SIZE), tl.flip(x, 0))


def run(kernel, n_programs, *arguments, change=lambda ptx: ptx, spans=None, seed=0, **constants):
    """Compile a kernel, change its PTX, and execute it.

    Args:
        spans: what the kernel may access; None: its arguments.
    """
    compiled = compile_for(kernel, arguments, n_programs, enable_fp_fusion=False, num_warps=8, **constants)
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    memory = Global(spans_of(*arguments) if spans is None else spans)
    Machine(parse(change(compiled.asm["ptx"])), n_programs, values, memory, compiled.metadata.shared, seed).run()


def spans_of(*tensors):
    """The memory of these tensors alone."""
    return [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors if isinstance(t, torch.Tensor)]


def without(pattern, which=0):
    """A change of PTX that leaves out one of the instructions that match a pattern."""

    def change(ptx):
        found = list(re.finditer(rf"^\s*{pattern}[^\n]*$", ptx, re.MULTILINE))
        assert found, pattern
        return ptx[: found[which].start()] + ptx[found[which].end() :]

    return change


@pytest.mark.parametrize("n", [1000, 777])
def test_reductions_over_all_warps_equal_those_of_torch(n):
    x = torch.randn(3, n)
    y = torch.empty_like(x)
    run(softmax_kernel, 3, x, y, n, SIZE=SIZE)
    torch.testing.assert_close(y, x.softmax(1), rtol=1e-5, atol=1e-9)


def test_what_warps_exchange_arrives():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    for seed in range(5):
        run(reverse_kernel, 1, x, y, SIZE=SIZE, seed=seed)
        assert torch.equal(y, x.flip(0))


def test_copies_to_shared_memory_arrive_in_time():
    x, y = torch.randn(3 * SIZE), torch.empty(3 * SIZE)
    run(double_kernel, 1, x, y, 3 * SIZE, SIZE=SIZE)
    assert torch.equal(y, 2 * x)


def test_a_kernel_that_does_not_wait_for_its_copies_is_refused():
    x, y = torch.randn(3 * SIZE), torch.empty(3 * SIZE)
    with pytest.raises(AccessError, match="before copies to shared memory are waited for"):
        run(double_kernel, 1, x, y, 3 * SIZE, SIZE=SIZE, change=lambda p: re.sub(r"cp\.async\.wait_group.*", "", p))


def test_a_copy_whose_source_is_written_meanwhile_is_refused():
    """The kernel writes the element that it has begun to copy for its next block."""
    x = torch.randn(4 * SIZE)
    with pytest.raises(AccessError, match="written while it is copied"):
        run(double_kernel, 1, x, x[SIZE:], 3 * SIZE, SIZE=SIZE)


def test_a_kernel_without_its_barrier_is_refused():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    for seed in range(5):
        with pytest.raises(AccessError, match="no barrier between them"):
            run(reverse_kernel, 1, x, y, SIZE=SIZE, change=without(r"bar\.sync"), seed=seed)


@pytest.mark.parametrize("kind", ["read", "write"])
def test_an_access_beyond_a_tensor_is_refused(kind):
    """By one element, although the memory behind it belongs to the same storage."""
    x, y = torch.randn(1000), torch.empty(1000)
    short = {"read": (x[:-1], y), "write": (x, y[:-1])}[kind]
    with pytest.raises(AccessError, match=rf"{kind}s 4 bytes at 0x[0-9a-f]+, which is in no tensor"):
        run(softmax_kernel, 1, x, y, 1000, SIZE=SIZE, spans=spans_of(*short))


def test_a_wide_access_that_is_misaligned_is_refused():
    """The kernel is compiled for aligned tensors, and gets others."""
    x, y = torch.randn(SIZE + 1), torch.empty(SIZE)
    compiled = compile_for(reverse_kernel, (x, y), 1, num_warps=8, enable_fp_fusion=False, SIZE=SIZE)
    machine = Machine(parse(compiled.asm["ptx"]), 1, [x[1:].data_ptr(), y.data_ptr()], Global(spans_of(x, y)), 8192)
    with pytest.raises(AccessError, match="misaligned"):
        machine.run()


def test_programs_that_write_to_one_place_are_refused():
    """Even if they write the same."""
    x, y = torch.randn(2 * 1000), torch.empty(2 * 1000)
    with pytest.raises(AccessError, match="global memory that another program writes"):
        run(softmax_kernel, 2, x, y, 1000, SIZE=SIZE, change=lambda p: p.replace("%ctaid.x", "0"))


def test_an_unknown_instruction_is_refused():
    x, y = torch.randn(SIZE), torch.empty(SIZE)
    with pytest.raises(ValueError, match=r"st\.global\.mystery"):
        run(reverse_kernel, 1, x, y, SIZE=SIZE, change=lambda p: p.replace("st.global", "st.global.mystery"))
