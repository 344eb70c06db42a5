"""Index arithmetic on ragged data: many runs of different length, laid end to end."""

import numpy as np


def first_of(counts: np.ndarray) -> np.ndarray:
    """Index at which each run begins: the exclusive cumulative sum of `counts`."""
    first = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=first[1:])
    return first


def expand(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The runs starts[i], starts[i]+1, ..., starts[i]+counts[i]-1 of every i, laid end to end (int64)."""
    return np.repeat(starts - first_of(counts), counts) + np.arange(counts.sum(), dtype=np.int64)
