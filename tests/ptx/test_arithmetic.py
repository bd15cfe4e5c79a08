"""Instructions that touch no memory compute what the PTX ISA says."""

import ctypes
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx import arithmetic


def test_fma_rounds_once():
    """Among others where the product almost cancels, and where float64 would round a second time."""
    random = np.random.default_rng()
    a, b, c = (random.standard_normal(4000) * 2.0 ** random.integers(-40, 40, 4000) for _ in range(3))
    a, b, c = a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)
    c[:1000] = -(a[:1000] * b[:1000])
    c[1000:2000] = np.spacing(a[1000:2000] * b[1000:2000]).astype(np.float64) * 2.0 ** random.integers(-30, 30, 1000)
    libm = ctypes.CDLL(None)
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    expected = [libm.fmaf(*map(float, values)) for values in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(arithmetic.fma(a, b, c), np.array(expected, np.float32))


def test_fma_of_float64_rounds_once():
    a, b, c = np.random.default_rng().standard_normal((3, 500))
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(arithmetic.fma(a, b, c), [float(value) for value in exact])


def _prmt(a, b, selector):
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = b""
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = source[choice & 7]
        out += bytes([(255 if byte > 127 else 0) if choice & 8 else byte])
    return int.from_bytes(out, "little")


def _shr(x, n):
    return x >> n if n < 32 else -1 if x < 0 else 0


# name -> (types of the arguments, what Python's integers give)
WHOLE = {
    "prmt.b32": ("u4 u4 u4", _prmt),
    "shl.b32": ("u4 n", lambda x, n: x << n & 0xFFFFFFFF if n < 32 else 0),
    "shr.u32": ("u4 n", lambda x, n: x >> n if n < 32 else 0),
    "shr.s32": ("i4 n", _shr),
    "mul.hi.u32": ("u4 u4", lambda a, b: a * b >> 32),
    "mul.wide.s32": ("i4 i4", lambda a, b: a * b),
    "mul.wide.u32": ("u4 u4", lambda a, b: a * b),
    "mad.lo.s32": ("i4 i4 i4", lambda a, b, c: (a * b + c + 2**31) % 2**32 - 2**31),
    "bfe.u32": ("u4 n n", lambda x, first, n: x >> first & (1 << n) - 1),
    "bfe.s32": ("i4 n n", lambda x, first, n: (x >> first & (1 << n) - 1 ^ 1 << n - 1) - (1 << n - 1)),
    "cvt.s32.s8": ("i1", lambda x: x),
    "cvt.u32.u64": ("u8", lambda x: x % 2**32),
    "div.s32": ("i4 i4", lambda a, b: int(math.copysign(abs(a) // abs(b), a) * math.copysign(1, b))),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_equal_those_of_python(name):
    random, (kinds, expected) = np.random.default_rng(), WHOLE[name]

    def draw(kind):
        if kind == "n":
            return random.integers(*((1, 16) if name.startswith("bfe") else (0, 40)), 300).astype(np.uint32)
        limits = np.iinfo(kind)
        return random.integers(limits.min, limits.max, 300, kind, endpoint=True)

    arguments = [draw(kind) for kind in kinds.split()]
    function, _, result = arithmetic.function_of(tuple(name.split(".")))
    found = function(*arguments).view(arithmetic.type_of(result))
    assert found.tolist() == [expected(*map(int, values)) for values in zip(*arguments, strict=True)]


def test_conversions_to_bfloat16_equal_those_of_torch():
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4e38, 1e-40, 1.00390625])])
    found = arithmetic.to_bfloat16(x.numpy())
    assert found.tolist() == x.to(torch.bfloat16).view(torch.uint16).tolist()
    assert arithmetic.to_bfloat16(np.array([math.nan], np.float32))[0] == 0x7FFF


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("max.f32", (math.nan, 1.0), 1.0),
        ("max.NaN.f32", (math.nan, 1.0), math.nan),
        ("min.f32", (math.nan, 1.0), 1.0),
        ("min.xorsign.abs.f32", (-3.0, 2.0), -2.0),
        ("min.xorsign.abs.f32", (-1.0, -2.0), 1.0),
        ("setp.lt.f32", (math.nan, 1.0), False),
        ("setp.geu.f32", (math.nan, 1.0), True),
        ("setp.num.f32", (math.nan, 1.0), False),
        ("setp.neu.f32", (1.0, 1.0), False),
        ("cvt.rzi.s32.f32", (-2.7,), -2),
        ("cvt.rzi.u32.f32", (-2.7,), 0),
        ("cvt.rzi.s32.f32", (1e30,), 2**31 - 1),
        ("rsqrt.approx.ftz.f32", (0.0,), math.inf),
        ("rsqrt.approx.ftz.f32", (1e-40,), math.inf),
        ("sqrt.approx.ftz.f32", (1e-40,), 0.0),
    ],
)
def test_special_values(name, values, expected):
    function, _, _ = arithmetic.function_of(tuple(name.split(".")))
    with np.errstate(all="ignore"):
        found = function(*(np.array([value], np.float32) for value in values))[0]
    assert found == expected or (math.isnan(expected) and math.isnan(found))
