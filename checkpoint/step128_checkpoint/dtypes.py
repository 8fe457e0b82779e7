"""Data types of safetensors files, and bfloat16 for numpy, which has none: two shifts and a rounding rule."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]

BF16 = "BF16"
FLOAT_DTYPES = frozenset({"F32", "F16", BF16})
"""Types that a weight may have before quantization."""

BYTES_PER_ELEMENT: dict[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    BF16: 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

_NUMPY_DTYPES: dict[str, str] = {"F32": "<f4", "F16": "<f2", BF16: "<u2", "U8": "u1"}


def raw_array(data: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """View bytes as an array of the given safetensors type; bfloat16 comes as its uint16 bit patterns.

    Raises:
        ValueError: ``dtype`` is not one that the tools compute with (F32, F16, BF16, U8).
    """
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"values of type {dtype} cannot be computed with; {', '.join(_NUMPY_DTYPES)} can")
    return np.frombuffer(data, dtype=_NUMPY_DTYPES[dtype]).reshape(shape)


def to_float32(data: bytes | bytearray, dtype: str, shape: tuple[int, ...]) -> Float32Array:
    """Read bytes of type F32, F16 or BF16 as float32 of the given shape; exact for all three."""
    raw = raw_array(data, dtype, shape)
    if dtype == BF16:
        # A bfloat16 is the upper half of a float32.
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


def from_float32(values: Float32Array, dtype: str) -> NDArray[np.generic]:
    """Round float32 to F32, F16 or BF16 (nearest, ties to even); bfloat16 comes as its uint16 bit patterns.

    NaN stays NaN under BF16: its payload is kept from being rounded away.
    """
    if dtype == "F32":
        return np.ascontiguousarray(values, dtype="<f4")
    if dtype == "F16":
        return np.ascontiguousarray(values, dtype="<f2")
    if dtype != BF16:
        raise ValueError(f"float32 cannot be rounded to {dtype}")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    round_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + round_to_even) >> np.uint32(16)).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")


# Bits of the exponent, all of them set in NaN and infinity and in no finite number.
_EXPONENT_BITS: dict[str, tuple[str, int]] = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), BF16: ("<u2", 0x7F80)}


def all_finite(data: bytes | bytearray | memoryview, dtype: str) -> bool:
    """Whether values of a floating type hold neither NaN nor infinity; True for types that cannot (or are 8-bit)."""
    if dtype not in _EXPONENT_BITS:
        return True
    unsigned, exponent = _EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, dtype=unsigned)
    return not bool(((bits & bits.dtype.type(exponent)) == exponent).any())
