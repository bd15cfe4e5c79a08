"""The inputs that weights are multiplied with in a forward pass: a sample of them, and who multiplies with which weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

_GOLDEN: Final = 0.6180339887498949  # the golden ratio minus 1
PATCHES: Final = -1
# Copies of a weight in another dtype. What is multiplied with the copy is multiplied with the weight.
_CASTS: Final = ("to", "bfloat16", "half", "float", "double", "type_as", "type")


class InputSample:
    """Keeps at most `limit` rows of the inputs of all calls, spread evenly over them.

    Row i is kept while frac(i * golden ratio) is among the `limit` smallest. For every limit, the kept rows lie evenly. They
    prefer no position within a sequence. Every n-th row would prefer some positions, if sequences have 2^k tokens.

    Args:
        limit: the largest number of rows that are kept.

    Attributes:
        values: the rows, [rows, fan_in]. None until there is one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: Tensor | None = None
        self._keys: Tensor | None = None
        self._seen = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one call.

        Args:
            x: [rows, fan_in].
        """
        if not len(x):
            return
        index = torch.arange(self._seen, self._seen + len(x), dtype=torch.float64, device=x.device)
        self._seen += len(x)
        keys = (index * _GOLDEN).frac()
        chosen = keys.argsort()[: self.limit]
        x, keys = x[chosen], keys[chosen]
        if self.values is not None and self._keys is not None:
            keys = torch.cat([self._keys, keys])
            chosen = keys.argsort()[: self.limit]
            x, keys = torch.cat([self.values, x])[chosen], keys[chosen]
        self.values, self._keys = x, keys


class Use(NamedTuple):
    """How a weight is used.

    Attributes:
        weight: id() of the parameter.
        matrix: index of the matrix in a parameter of three dimensions. 0 in one of two dimensions, and PATCHES in the weight
            of a convolution, which is the matrix (out, inputs of a patch).
        summed: the dimension of the matrix, 0 or 1, over which the product sums: 1 in x W^T, 0 in x W.
    """

    weight: int
    matrix: int
    summed: int


class _View(NamedTuple):
    """A tensor that shows one matrix of a parameter, or all of them: the first one, their number, and whether transposed."""

    param: Tensor
    first: int
    matrices: int
    transposed: bool


class InputWatch(TorchFunctionMode):
    """Collects the inputs of weights from the calls of linear, matmul, mm, bmm, addmm, baddbmm, grouped_mm and convolutions.

    It sees every call while it is entered, whatever module makes it. Of modules that are given to `attach`, it takes the inputs
    of the module instead of those of the functions that the module calls, which may be functions that it does not know. A
    weight is recognised by its memory: as it is, transposed, one matrix of a tensor of three dimensions, and any of these
    in another dtype. Other views, and einsum, are not seen.

    Args:
        weights: the parameters to watch, with two or more dimensions.
        limit: number of inputs that are kept for each matrix.

    Attributes:
        samples: the inputs for each use of a matrix.
    """

    def __init__(self, weights: Sequence[Tensor], limit: int) -> None:
        super().__init__()
        self.samples: dict[Use, InputSample] = {}
        self._limit = limit
        self._weights: dict[int, list[Tensor]] = {}
        for weight in weights:
            self._weights.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)
        # By address, with the copy itself, so that no other tensor gets its address.
        self._copies: dict[int, tuple[Tensor, _View]] = {}
        self._inside = Counter[int]()  # how many attached modules with a weight are being called, by id() of the weight

    def attach(self, module: Any) -> list[RemovableHandle]:
        """Collect the inputs of a module that multiplies its first argument with its `weight`. The handles undo this."""
        weight = id(module.weight)

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside[weight] += 1
            if self._inside[weight] == 1:
                x = args[0] if args else next(iter(kwargs.values()))
                self._sample(Use(weight, 0, 1)).add(x.detach().reshape(-1, x.shape[-1]))

        def end(*_: Any) -> None:
            self._inside[weight] -= 1

        return [
            module.register_forward_pre_hook(begin, with_kwargs=True),
            module.register_forward_hook(end, always_call=True),
        ]

    def _sample(self, use: Use) -> InputSample:
        return self.samples.setdefault(use, InputSample(self._limit))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "").lstrip("_")
        if name in _PRODUCTS:
            number, look = _PRODUCTS[name]
            look(self, number, args, kwargs)
        if name in _CASTS and args and isinstance(out, Tensor) and out is not args[0]:
            view = self._find(args[0])
            if view is not None and out.shape == args[0].shape:
                self._copies[out.untyped_storage().data_ptr()] = (out, view)
        return out

    def _find(self, tensor: Any) -> _View | None:
        """Return what a tensor shows of a watched parameter. None if it shows nothing, or only a part of a matrix."""
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or tensor.layout is not torch.strided:
            return None
        address = tensor.untyped_storage().data_ptr()
        if address in self._copies:
            return _place(tensor, *self._copies[address])
        for param in self._weights.get(address, ()):
            whole = _View(param, 0, len(param) if param.ndim == 3 else 1, False)
            if (placed := _place(tensor, param, whole)) is not None:
                return placed
        return None

    def _add(self, view: _View, summed: int, inputs: Sequence[Tensor]) -> None:
        """Add inputs [rows, fan_in] of each matrix that a view shows. `summed` is the dimension of the view's matrix."""
        if self._inside[id(view.param)]:
            return
        for i, x in enumerate(inputs):
            use = Use(id(view.param), view.first + i, 1 - summed if view.transposed else summed)
            self._sample(use).add(x.detach().reshape(-1, x.shape[-1]))

    def _linear(self, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        x, weight = (_argument(args, kwargs, i, name) for i, name in ((0, "input"), (1, "weight")))
        view = self._find(weight)
        if view is not None and weight.ndim == 2:
            self._add(view, 1, [x])

    def _product(self, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at the two factors of a product, which are the arguments number `at` and `at` + 1."""
        names = ("mat1", "mat2") if at else ("input", "mat2")
        x, w = (_argument(args, kwargs, at + i, names[i]) for i in (0, 1))
        w = kwargs.get("other", w)
        if not (isinstance(x, Tensor) and isinstance(w, Tensor)):
            return
        view = self._find(w)
        if view is not None and w.ndim == 2 and x.ndim:
            self._add(view, 0, [x])
        elif view is not None and w.ndim == 3 and x.ndim == 3 and len(x) in (1, len(w)):
            self._add(view, 0, x.expand(len(w), -1, -1).unbind())
        elif x.ndim == 2 and w.ndim >= 2 and (left := self._find(x)) is not None:
            self._add(left, 1, [w.mT.reshape(-1, w.shape[-2])])

    def _grouped(self, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        x, w = (_argument(args, kwargs, i, name) for i, name in ((0, "mat_a"), (1, "mat_b")))
        offsets = _argument(args, kwargs, 2, "offs")
        view = self._find(w)
        if view is None or w.ndim != 3:
            return
        if x.ndim == 3:
            self._add(view, 0, x.unbind())
        elif isinstance(offsets, Tensor):
            ends = offsets.tolist()
            self._add(view, 0, [x[a:b] for a, b in zip([0, *ends], ends, strict=False)])

    def _convolution(self, at: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Look at a convolution over `at` dimensions. Each patch of its input is one row. Grouped ones are no matrix."""
        x, weight = (_argument(args, kwargs, i, name) for i, name in ((0, "input"), (1, "weight")))
        stride, padding, dilation, groups = (
            _argument(args, kwargs, i, name, default)
            for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
        )
        param = next((p for some in self._weights.values() for p in some if p is weight), None)
        if param is None or groups != 1 or at > 2:
            return
        taps, steps, rates = weight.shape[2:], _pair(stride, at), _pair(dilation, at)
        x = x if x.ndim == at + 2 else x.unsqueeze(0)
        if padding == "same":
            total = [(k - 1) * rate for k, rate in zip(taps, rates, strict=True)]
            edges = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
            x, padding = functional.pad(x, edges), 0
        edges = [0, 0] if padding == "valid" else _pair(padding, at)
        if at == 1:
            x, taps, steps, rates, edges = x.unsqueeze(2), (1, *taps), [1, *steps], [1, *rates], [0, *edges][-2:]
        patches = functional.unfold(x, tuple(taps), tuple(rates), tuple(edges), tuple(steps))
        self._add(_View(param, PATCHES, 1, False), 1, [patches.mT])


def _place(tensor: Tensor, whole: Tensor, view: _View) -> _View | None:
    """Return what a tensor shows of `whole`, which shows `view` of a parameter. None if they do not fit."""
    offset, dims = int(tensor.storage_offset() - whole.storage_offset()), whole.ndim
    if tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or not 2 <= dims <= 3:
        return None
    first, rest = divmod(offset, whole.stride(0)) if dims == 3 and tensor.ndim == 2 else (0, offset)
    if rest or not 0 <= first < view.matrices:
        return None
    count = view.matrices if tensor.ndim == dims else 1
    if tensor.ndim == 3 and (dims != 3 or len(tensor) != len(whole) or tensor.stride(0) != whole.stride(0)):
        return None
    shape, stride = whole.shape[-2:], whole.stride()[-2:]
    for transposed in (False, True):
        if tensor.shape[-2:] == shape and tensor.stride()[-2:] == tuple(stride):
            return _View(view.param, view.first + first, count, view.transposed != transposed)
        shape, stride = shape[::-1], stride[::-1]
    return None


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _pair(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else [int(x) for x in value] * (count if len(value) == 1 else 1)


# Name of a function -> a number for its method of InputWatch, and the method.
_PRODUCTS: Final[Mapping[str, tuple[int, Callable[[InputWatch, int, Sequence[Any], Mapping[str, Any]], None]]]] = {
    "linear": (0, InputWatch._linear),
    "matmul": (0, InputWatch._product),
    "mm": (0, InputWatch._product),
    "bmm": (0, InputWatch._product),
    "addmm": (1, InputWatch._product),
    "baddbmm": (1, InputWatch._product),
    "grouped_mm": (0, InputWatch._grouped),
    "conv1d": (1, InputWatch._convolution),
    "conv2d": (2, InputWatch._convolution),
}


def matrix_of(weight: Tensor, use: Use) -> Tensor:
    """Return a matrix of a weight as (out, in).

    Args:
        weight: a tensor with the shape of the parameter.
        use: which matrix, and over which dimension products sum.

    Returns:
        [out, in], a view.
    """
    if use.matrix == PATCHES:
        return weight.flatten(1)
    matrix = weight[use.matrix] if weight.ndim == 3 else weight
    return matrix if use.summed else matrix.mT
