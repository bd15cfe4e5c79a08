"""Guarded memory: tensors inside larger allocations whose other bytes are canaries, which nobody may write or use.

Every canary byte is 0xFF. Read as bfloat16, float16, float32 or float64, a canary is NaN. So a kernel that reads past the end
of a tensor and uses what it has read makes a NaN.
"""

import torch

_PAD = (
    64  # canary bytes before and after a tensor, a multiple of every itemsize and of the 16 bytes that kernels align to
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def contiguous_strides(shape):
    """Return the strides of a contiguous tensor of a shape."""
    return torch.empty(shape, device="meta").stride()


class Guards:
    """All guarded memory of one test. `check` asserts that no canary has been touched."""

    def __init__(self):
        self._memory = []  # (bytes, bytes as they have to be, 0xFF for each byte that its tensor may change)

    def empty(self, shape, dtype, stride=None, shift=0):
        """Return a tensor of canaries with canaries around it, and in the gaps that its strides leave.

        Args:
            shape: its shape.
            dtype: its dtype.
            stride: its strides, of elements. None: it is contiguous.
            shift: how many elements its first one lies behind an address that 64 divides.
        """
        stride = contiguous_strides(shape) if stride is None else stride
        size = torch.empty(0, dtype=dtype).element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
        length = 2 * _PAD + -(-(shift + span) * size // 8) * 8
        memory = torch.full((length,), 0xFF, dtype=torch.uint8)
        may_change = torch.zeros(length, dtype=torch.uint8)
        first = _PAD // size + shift
        may_change.view(_BITS[size]).as_strided(shape, stride, first).fill_(255 if size == 1 else -1)
        self._memory.append((memory, memory.clone(), may_change))
        return memory.view(dtype).as_strided(shape, stride, first)

    def copy(self, tensor, stride=None, shift=0):
        """Return a guarded copy of a tensor. Its strides are those of the tensor unless others are given."""
        dense = torch.empty_like(tensor, device="meta").stride()
        return self.empty(tensor.shape, tensor.dtype, dense if stride is None else stride, shift).copy_(tensor.detach())

    def freeze(self, tensor):
        """From now on the elements of a tensor have to stay as they are. Memory that is not guarded is left alone."""
        for memory, expected, may_change in self._memory:
            if _same_memory(memory, tensor):
                bits, where = _BITS[tensor.element_size()], (tensor.shape, tensor.stride(), tensor.storage_offset())
                now, then, free = (m.view(bits).as_strided(*where) for m in (memory, expected, may_change))
                then.copy_(now)
                free.zero_()

    def holds(self, tensor):
        """Return whether a tensor lies in guarded memory."""
        return any(_same_memory(memory, tensor) for memory, _, _ in self._memory)

    def check(self):
        """Assert that every canary and every frozen byte is as it was."""
        for memory, expected, may_change in self._memory:
            touched = (memory != expected) & (may_change == 0)
            assert not touched.any(), f"bytes {touched.nonzero().flatten().tolist()} of {len(memory)} were written"


def _same_memory(memory, tensor):
    return memory.data_ptr() == tensor.untyped_storage().data_ptr()
