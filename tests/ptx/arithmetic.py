"""Arithmetic of PTX on arrays: what each instruction that touches no memory computes, for each lane.

Values are NumPy arrays of the type that the instruction names. Results follow the PTX ISA bit by bit, with one exception:
approximate instructions give the exact result with an error that looks random, of the size that the ISA allows.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_TYPES = {
    **{
        f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
        for bits in (8, 16, 32, 64)
        for kind, letter in zip("bus", "uui", strict=True)
    },
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"),
    "f16x2": np.dtype("u4"),
    "pred": np.dtype("?"),
}
_SMALLEST = np.float32(2.0**-126)  # the smallest normal number
_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_libm.fma.restype, _libm.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma_f64 = np.frompyfunc(_libm.fma, 3, 1)


def type_of(name: str) -> np.dtype[Any]:
    """The type of a part of an instruction's name, such as "f32"."""
    return _TYPES[name]


def is_type(name: str) -> bool:
    """Whether a part of an instruction's name is a type."""
    return name in _TYPES


def bits_of(values: Array) -> Array:
    """The same bits as unsigned integers."""
    return values.view(f"u{values.itemsize}")


def fma(a: Array, b: Array, c: Array) -> Array:
    """a b + c, rounded once."""
    if a.dtype == np.float64:
        return np.asarray(_fma_f64(a, b, c), np.float64)
    # The product is exact in float64. The sum is rounded to odd there, so that rounding to float32 is the only rounding.
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    inexact = np.isfinite(total) & (lost != 0) & (bits_of(total) & np.uint64(1) == 0)
    towards = np.where(lost > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, towards), total).astype(np.float32)


def _flush(x: Array) -> Array:
    """Subnormal numbers become zero."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """The same function, with every subnormal argument and result taken as zero."""
    return lambda *values: _flush(function(*map(_flush, values)))


def _approximate(exact: Array, error: float) -> Array:
    """float64 values as float32, with a relative error of at most `error` beside rounding. It depends on the value alone."""
    mixed = bits_of(exact) * np.uint64(0x9E3779B97F4A7C15)
    return (exact * (1 + error * (mixed >> np.uint64(11)).astype(np.float64) / 2**52 - error)).astype(np.float32)


def rsqrt(x: Array) -> Array:
    """rsqrt.approx.f32. The ISA allows a relative error of 2^-22.9, rounding included."""
    return _approximate(1 / np.sqrt(x.astype(np.float64)), 2**-22.9 - 2**-24)


def sqrt_approx(x: Array) -> Array:
    """sqrt.approx.f32. The ISA allows a relative error of 2^-23, rounding included."""
    return _approximate(np.sqrt(x.astype(np.float64)), 2**-24)


def ex2(x: Array) -> Array:
    """ex2.approx.f32. The ISA allows a relative error of 2^-22, rounding included."""
    return _approximate(np.exp2(x.astype(np.float64)), 2**-22 - 2**-24)


def div_full(a: Array, b: Array) -> Array:
    """div.full.f32. The ISA allows an error of 2 units in the last place."""
    return _approximate(a.astype(np.float64) / b.astype(np.float64), 2**-23)


def rcp_f64(x: Array) -> Array:
    """rcp.approx.ftz.f64: a reciprocal whose lower 32 bits are zero."""
    with np.errstate(all="ignore"):
        return (bits_of(1 / x) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def prmt(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of the eight of a and b. Bit 3 of a selection repeats the sign of the byte."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = (both >> (choice & np.uint64(7)) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        byte = np.where(choice & np.uint64(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        out |= byte << np.uint32(8 * i)
    return out


def shift(left: bool) -> Callable[[Array, Array], Array]:
    """Shifts by more than the width give what shifting in steps gives."""

    def shifted(x: Array, n: Array) -> Array:
        width = 8 * x.itemsize
        small = np.minimum(n, width - 1).astype(x.dtype)
        moved = x << small if left else x >> small
        beyond = np.zeros_like(x) if left or x.dtype.kind == "u" else moved
        return np.where(n < width, moved, beyond)

    return shifted


def field(x: Array, first: Array, n: Array) -> Array:
    """bfe: n bits from bit `first` on. A signed field is extended by its sign. Here, the field lies within the number."""
    unused = np.uint32(8 * x.itemsize) - n
    return (x << (unused - first).astype(x.dtype)) >> unused.astype(x.dtype)


def product(half: str) -> Callable[[Array, Array], Array]:
    """The lower half, the upper half, or the whole ("wide") of a product of integers."""

    def multiplied(a: Array, b: Array) -> Array:
        if half == "lo":
            return a * b
        wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
        whole = a.astype(wide) * b.astype(wide)
        return whole if half == "wide" else (whole >> wide.type(8 * a.itemsize)).astype(a.dtype)

    return multiplied


def to_bfloat16(x: Array) -> Array:
    """cvt.rn.bf16.f32."""
    bits = bits_of(x)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def pair(convert: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """Two 16-bit numbers in a word: the first one in the upper half."""

    def packed(a: Array, b: Array) -> Array:
        return bits_of(convert(a)).astype(np.uint32) << np.uint32(16) | bits_of(convert(b)).astype(np.uint32)

    return packed


def convert(to: str, rounding: Sequence[str], source: str) -> Callable[[Array], Array]:
    """cvt from a type to a type, by their names.

    Raises:
        ValueError: the conversion is not known.
    """
    goal = type_of(to)
    if source == "bf16" and to == "f32":
        return lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if to == "bf16" and source == "f32":
        return to_bfloat16
    if source[0] == "f" and to[0] == "f":
        return lambda x: x.astype(goal)
    if source[0] in "us" and to[0] == "f":
        return lambda x: x.astype(goal)
    if source[0] == "f" and to[0] in "us" and "rzi" in rounding:
        limits = np.iinfo(goal)

        def towards_zero(x: Array) -> Array:
            whole = np.trunc(np.where(np.isnan(x), 0, x)).astype(np.longdouble)
            return np.clip(whole, limits.min, limits.max).astype(goal)

        return towards_zero
    if source[0] in "us" and to[0] in "us":
        return lambda x: x.astype(goal)
    raise ValueError(f"No conversion from {source} to {to} is known here.")


def compare(name: str, a: Array, b: Array) -> Array:
    """setp: a comparison. Those of floats that end with u are true for NaN."""
    if name in ("num", "nan"):
        unordered = np.isnan(a) | np.isnan(b)
        return unordered if name == "nan" else ~unordered
    plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    functions = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
    functions["ge"] = np.greater_equal
    if a.dtype.kind != "f":
        return functions[plain](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if len(plain) == 3:
        return functions[plain[:2]](a, b) | unordered
    return functions[plain](a, b) & ~unordered


def _extreme(function: Any, ordinary: Any) -> Callable[..., Array]:
    """min and max: NaN loses against a number, unless the name has NaN."""

    def chosen(a: Array, b: Array, flags: Sequence[str]) -> Array:
        if "xorsign" in flags:
            sign = (bits_of(a) ^ bits_of(b)) & np.uint32(0x80000000)
            return (bits_of(function(np.abs(a), np.abs(b))) | sign).view(a.dtype)
        return ordinary(a, b) if "NaN" in flags or a.dtype.kind != "f" else function(a, b)

    return chosen


_EXTREMES = {"min": _extreme(np.fmin, np.minimum), "max": _extreme(np.fmax, np.maximum)}
_PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "shl": shift(left=True),
    "shr": shift(left=False),
    "prmt": prmt,
    "fma": fma,
    "bfe": field,
}


def _divided(a: Array, b: Array) -> Array:
    """The quotient of integers, towards zero. A division by zero has no defined result, so none is asked for."""
    if (b == 0).any():
        raise ZeroDivisionError("An integer is divided by zero.")
    return (np.abs(a.astype(object)) // np.abs(b.astype(object)) * np.sign(a) * np.sign(b)).astype(a.dtype)


@functools.cache
def function_of(name: tuple[str, ...]) -> tuple[Callable[..., Array], list[str], str]:
    """What an instruction computes: (function, type of each source, type of the result).

    A NaN that is computed is always the same one.

    Args:
        name: the parts of its name, such as ("add", "rn", "f32").

    Raises:
        ValueError: the instruction is not known.
    """
    function, sources, result = _function_of([part for part in name if part != "ftz"])
    if "ftz" in name and result == "f32":
        function = _flushing(function)
    if result not in ("f32", "f64") or name[0] in ("neg", "abs", "selp"):
        return function, sources, result
    integer = np.dtype("i4" if result == "f32" else "i8")
    nan = np.array(np.iinfo(integer).max, integer).view(type_of(result))[()]
    return lambda *values: np.where(np.isnan(found := function(*values)), nan, found), sources, result


def _function_of(name: Sequence[str]) -> tuple[Callable[..., Array], list[str], str]:
    base, flags = name[0], [part for part in name[1:] if not is_type(part)]
    types = [part for part in name[1:] if is_type(part)]
    t = types[-1] if types else ""
    if base == "cvt" and types[0].endswith("x2"):
        single = convert(types[0][:-2], flags, t)
        return pair(single), [t, t], types[0]
    if base == "cvt":
        return convert(types[0], flags, t), [t], types[0]
    if base == "setp" and len(flags) == 1:
        return lambda a, b: compare(flags[0], a, b), [t, t], "pred"
    if base == "selp":
        return lambda a, b, p: np.where(p, a, b), [t, t, "pred"], t
    if base in _EXTREMES:
        return lambda a, b: _EXTREMES[base](a, b, flags), [t, t], t
    if base in ("mul", "mad") and t[0] in "usb":
        half = next(flag for flag in flags if flag in ("lo", "hi", "wide"))
        result = f"{t[0]}{2 * int(t[1:])}" if half == "wide" else t
        multiply = product(half)
        if base == "mul":
            return multiply, [t, t], result
        return lambda a, b, c: multiply(a, b) + c, [t, t, result], result
    if base == "mul" and flags in (["rn"], []):
        return np.multiply, [t, t], t
    if base == "div" and flags == (["rn"] if t[0] == "f" else []):
        return (np.divide if t[0] == "f" else _divided), [t, t], t
    if base == "div" and flags == ["full"]:
        return div_full, [t, t], t
    if base == "sqrt" and flags == ["rn"]:
        return np.sqrt, [t], t
    approximate = {"rsqrt": rsqrt, "sqrt": sqrt_approx, "ex2": ex2, "rcp": rcp_f64}
    if base in approximate and flags == ["approx"]:
        return approximate[base], [t], t
    if base in _PLAIN and set(flags) <= {"rn"}:
        n = {"fma": 3, "prmt": 3, "bfe": 3, "neg": 1, "abs": 1, "not": 1}.get(base, 2)
        sources = {"shl": [t, "u32"], "shr": [t, "u32"], "bfe": [t, "u32", "u32"]}.get(base, [t] * n)
        return _PLAIN[base], sources, t
    raise ValueError(f"The instruction {'.'.join(name)} is not known here.")
