"""The checksum CRC-32C (Castagnoli), of arrays as large as word tables.

A CRC is linear over the field of two elements: the data are cut into rows that are worked through side by side, sixteen
bits at a time, and the remainders are put together by the map that so many zero bytes are.
"""

from functools import cache

import numpy as np

_POLYNOMIAL = 0x82F63B78
_LANES = 1 << 13
_BITS = np.arange(32, dtype=np.uint32)


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of bytes, uint8 `[n]`."""
    lanes = 1
    while lanes < _LANES and lanes * 64 < data.size:
        lanes *= 2
    width = -(-data.size // (2 * lanes)) * 2
    rows = np.zeros(lanes * width, np.uint8)
    rows[rows.size - data.size :] = data  # zeros in front change nothing while the remainder is zero
    rows = rows.view("<u2").reshape(lanes, width // 2)
    remainders = np.zeros(lanes, np.uint32)
    for column in range(width // 2):
        remainders = _TWO_BYTES[(remainders ^ rows[:, column]) & 0xFFFF] ^ (remainders >> 16)
    gap = _zeros(width)
    while remainders.size > 1:
        remainders = _apply(gap, remainders[0::2]) ^ remainders[1::2]
        gap = _apply(gap, gap)
    begin = _apply(_zeros(data.size), np.array([0xFFFFFFFF], np.uint32))
    return int(remainders[0] ^ begin[0]) ^ 0xFFFFFFFF


def _apply(matrix: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The linear map with the images `matrix` uint32 `[32]` of the single bits, of each value."""
    return np.bitwise_xor.reduce(np.where(values[:, None] >> _BITS & 1, matrix, np.uint32(0)), axis=1)


def _zeros(count: int) -> np.ndarray:
    """The map that `count` zero bytes are."""
    result = np.uint32(1) << _BITS
    for exponent in range(count.bit_length()):
        if count >> exponent & 1:
            result = _apply(_doubled(exponent), result)
    return result


@cache
def _doubled(exponent: int) -> np.ndarray:
    if exponent == 0:
        return _byte(np.uint32(1) << _BITS)
    half = _doubled(exponent - 1)
    return _apply(half, half)


def _byte(values: np.ndarray) -> np.ndarray:
    """The remainders after one zero byte more."""
    for _ in range(8):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return values


_TWO_BYTES = _byte(_byte(np.arange(1 << 16, dtype=np.uint32)))
