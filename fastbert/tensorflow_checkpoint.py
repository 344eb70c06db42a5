"""TensorFlow checkpoints -> tensors by their names in them, without TensorFlow.

`model.ckpt.index` is a sorted table of strings in blocks, each with a checksum, as LevelDB has it; its values are
protocol buffers that say where in `model.ckpt.data-00000-of-00001` each tensor is. Both are described in TensorFlow's
sources: core/lib/io/table_format.txt and core/protobuf/tensor_bundle.proto.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbert.crc32c import crc32c
from fastbert.errors import CheckpointError, MissingFileError
from fastbert.files import read_bytes
from fastbert.wire import fields, varint

_FOOTER, _MAGIC, _TRAILER = 48, 0xDB4775248B80FB57, 5
_LONGEST_KEY = 4096  # bytes, of which a file may repeat all but a few in each entry
_DTYPES = {
    1: (np.float32, torch.float32),
    2: (np.float64, torch.float64),
    3: (np.int32, torch.int32),
    9: (np.int64, torch.int64),
    14: (np.int16, torch.bfloat16),  # numpy has no bfloat16: its bits
    19: (np.float16, torch.float16),
}


@dataclass(frozen=True)
class Entry:
    """One tensor: the number of its dtype and, in bytes, its place in the data file of the number `shard`."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class TensorflowCheckpoint:
    """The checkpoint at `path`: a prefix such as `folder/bert_model.ckpt`, the path of an index, or a folder with one
    checkpoint. `entries` are what it has, by name; nothing but the index is read until a tensor is asked for.

    `MissingFileError`: there is no checkpoint of TensorFlow's second format (a `.index` with its data).
    `CheckpointError`: there is more than one in the folder, or its index is damaged or compressed.
    """

    def __init__(self, path):
        self.prefix = _prefix(Path(path))
        index = Path(f"{self.prefix}.index")
        try:
            values = dict(_table(read_bytes(index, CheckpointError)))
            header = dict(fields(values.pop(b"")))
            if _typed(header, 2, int):
                raise ValueError("its numbers are big-endian")
            self.shards = _typed(header, 1, int)
            whole = (key for key in values if not key.startswith(b"\0"))  # the other keys are those of slices
            self.entries = {key.decode(): _entry(values[key]) for key in whole}
        except (ValueError, LookupError, TypeError) as error:
            reason = str(error)[:300]
            raise CheckpointError(
                f"index file {index} is damaged or not of a TensorFlow checkpoint: {reason}"
            ) from None

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU, after its checksum was compared. `MissingFileError`: its data file does not
        exist. `CheckpointError`: it is damaged, is no float16, bfloat16, float32, float64, int32 or int64, or is cut in
        slices, as partitioned variables are.
        """
        entry, where = self.entries[name], f"tensor {name} of TensorFlow checkpoint {self.prefix}"
        if entry.sliced:
            raise CheckpointError(f"{where} is cut in slices, as partitioned variables are; expected a whole one")
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{where} has dtype number {entry.dtype}; expected one of {list(_DTYPES)}")
        if len(entry.shape) > 32 or any(size >= 1 << 40 for size in entry.shape):
            raise CheckpointError(f"{where} has shape {list(entry.shape)[:40]}; expected at most 32 sizes below 2^40")
        stored, dtype = _DTYPES[entry.dtype]
        size = int(np.prod(entry.shape, dtype=object)) * np.dtype(stored).itemsize
        if entry.size != size:
            raise CheckpointError(f"{where} has {entry.size} bytes; expected {size} for shape {list(entry.shape)}")
        path = Path(f"{self.prefix}.data-{entry.shard:05d}-of-{self.shards:05d}")
        if not path.is_file():
            raise MissingFileError(f"data file {path}, which has the {where}, does not exist")
        if path.stat().st_size < entry.offset + size:
            raise CheckpointError(f"data file {path} ends before the {where}: it is truncated")
        data = np.fromfile(path, np.uint8, size, offset=entry.offset)
        if _masked(crc32c(data)) != entry.checksum:
            raise CheckpointError(f"{where} is damaged: the checksum of its bytes in {path} is not that of the index")
        return torch.from_numpy(data.view(stored).reshape(entry.shape)).view(dtype)


def _prefix(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(one.stem for one in found)
            raise CheckpointError(
                f"folder {path} has the TensorFlow checkpoints {names}; expected one, or a path of one"
            )
        path = found[0] if found else path
    if path.suffix == ".index":
        path = path.with_suffix("")
    if not Path(f"{path}.index").is_file():
        raise MissingFileError(
            f"there is no TensorFlow checkpoint at {path}; expected {path}.index or a folder with one"
        )
    return path


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a table: the footer says where the index is, that where the blocks are."""
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError("the last eight bytes are not those of a table")
    numbers, position = [], 0
    for _ in range(4):
        number, position = varint(footer, position)
        numbers.append(number)
    end = 0
    for _, handle in _block(data, *numbers[2:]):
        offset, position = varint(handle, 0)
        if offset < end:
            raise ValueError(f"a block begins at {offset}, expected it behind the one before, which ends at {end}")
        size, _ = varint(handle, position)
        end = offset + size
        yield from _block(data, offset, size)


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a block; of each key only what differs from the one before is there."""
    whole = np.frombuffer(data, np.uint8)[offset : offset + size + _TRAILER]
    if len(whole) != size + _TRAILER:
        raise ValueError(f"a block at {offset} ends behind the file")
    if whole[size] != 0:
        raise ValueError(f"the block at {offset} is compressed (kind {whole[size]}); expected it as it is")
    if _masked(crc32c(whole[: size + 1])) != int.from_bytes(whole[size + 1 :].tobytes(), "little"):
        raise ValueError(f"the checksum of the block at {offset} is not that of its bytes")
    block = whole[:size].tobytes()
    restarts = int.from_bytes(block[-4:], "little")
    position, end, key = 0, size - 4 * (restarts + 1), b""
    while position < end:
        shared, position = varint(block, position)
        own, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or shared + own > _LONGEST_KEY:
            raise ValueError(f"a key of {shared} + {own} bytes in the block at {offset} follows one of {len(key)}")
        key = key[:shared] + block[position : position + own]
        position += own
        yield key, block[position : position + length]
        position += length
    if position != end:
        raise ValueError(f"the block at {offset} does not end with its last entry")


def _entry(value: bytes) -> Entry:
    parts = list(fields(value))
    last = dict(parts)
    shape = [size for number, size in fields(_typed(last, 2, bytes)) if number == 2]
    return Entry(
        dtype=_typed(last, 1, int),
        shape=tuple(_typed(dict(fields(size)), 1, int) for size in shape),
        shard=_typed(last, 3, int),
        offset=_typed(last, 4, int),
        size=_typed(last, 5, int),
        checksum=int.from_bytes(_typed(last, 6, bytes), "little"),
        sliced=7 in last,
    )


def _typed(parts: dict, number: int, kind: type):
    """A field, 0 or empty where it was left out."""
    value = parts.get(number, kind())
    if type(value) is not kind:
        raise ValueError(f"field {number} is {value!r}, expected {kind.__name__}")
    return value


def _masked(checksum: int) -> int:
    """As TensorFlow stores checksums: turned and moved."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
