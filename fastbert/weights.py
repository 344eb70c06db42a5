"""Weight files -> tensors by the names in them, safetensors first. Nothing here unpickles: `pytorch_model.bin` goes
through `weights_only`, which builds tensors and refuses all else before any of it runs.
"""

import mmap
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastbert.errors import CheckpointError, MissingFileError, shown
from fastbert.files import is_plain_name, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY, LEGACY_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_ARCHIVE = b"PK\x03\x04"


def read_tensors(folder) -> dict[str, Tensor]:
    """All tensors of a model folder by the names in its files, on the CPU.

    Read is the first that there is of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` and
    `pytorch_model.bin.index.json`; an index names the file of each tensor. `MissingFileError`: there is none of them,
    or no file that the index names. `CheckpointError`: a file is damaged, holds something else than tensors or would
    run code; the index names a file outside the folder, or it and the files disagree.
    """
    path = weights_file(folder)
    read = read_safetensors if path.name in (WEIGHTS, INDEX) else read_bin
    return _read_shards(path, read) if path.name in (INDEX, LEGACY_INDEX) else read(path)


def weights_file(folder) -> Path:
    """The file of a model folder that is read first: the weights, or their index."""
    names = (WEIGHTS, INDEX, LEGACY, LEGACY_INDEX)
    found = next((Path(folder) / name for name in names if (Path(folder) / name).is_file()), None)
    if found is None:
        raise MissingFileError(f"model folder {folder} has no weights; expected {', '.join(names)}")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; `CheckpointError` if it is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise CheckpointError(f"weights file {path} is damaged or not safetensors: {str(error)[:300]}") from None


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of one file that torch.save wrote; `CheckpointError` if it holds anything else or is damaged."""
    return plain_tensors(read_pickle(path), path)


def read_pickle(path: Path, classes: Sequence[type] = ()):
    """What torch.save wrote of tensors, containers, numbers, text and instances of `classes`; `CheckpointError` if
    there is anything else in it, before any of it runs, or it is damaged.
    """
    try:
        with torch.serialization.safe_globals(list(classes)), _opened(path) as source:
            return torch.load(source, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or malicious file makes torch raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        last = " ".join(str(error).strip().splitlines()[-1:])  # before it stands advice to read the file unsafely
        reason = f"it refers to {found[1]}, which is no tensor" if found else f"{type(error).__name__} {last}".strip()
        raise CheckpointError(f"weights file {path} cannot be read with weights_only: {reason}") from None


@contextmanager
def _opened(path: Path) -> Iterator[Path | mmap.mmap]:
    """What torch.load is given: the path of an archive; of a file as it was before 1.6 its mapped bytes, for of an open
    file it would take as much memory as some length in it says."""
    with open(path, "rb") as file:
        if file.read(len(_ARCHIVE)) == _ARCHIVE:
            _check_archive(path)
            yield path
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _check_archive(path: Path) -> None:
    """CheckpointError if more would come out of an archive than is in it: torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"weights file {path} has the compressed record {shown(record.filename)}; expected none"
            )
    if (total := sum(record.file_size for record in records)) > path.stat().st_size:
        raise CheckpointError(f"weights file {path} has records of {total} bytes in {path.stat().st_size}")


def plain_tensors(content, path: Path) -> dict[str, Tensor]:
    """The content of the file `path`, which must be tensors by name."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"weights file {path} holds a {type(content).__name__}; expected tensors by name")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"weights file {path} holds {name!r}, a {type(tensor).__name__}; expected tensors by name only"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    files = _files(index)
    tensors, owner = {}, {}
    some = {name: tensor for tensor, name in files.items()}
    for name in sorted(some):
        path = index.parent / name
        if not is_plain_name(name):
            raise CheckpointError(
                f"index file {index} names the file {shown(name)} for {some[name]}; expected one in its own folder"
            )
        if not path.is_file():
            raise MissingFileError(f"weights file {path}, named in {index.name} for {some[name]}, does not exist")
        for tensor_name, tensor in read(path).items():
            if tensor_name in owner:
                raise CheckpointError(
                    f"tensor {tensor_name} is in {owner[tensor_name]} and in {name}; expected it once"
                )
            if files.get(tensor_name) != name:
                known = shown(files.get(tensor_name))
                raise CheckpointError(f"tensor {tensor_name} is in {path}; index file {index} names {known} for it")
            tensors[tensor_name], owner[tensor_name] = tensor, name
    if absent := sorted(set(files) - set(tensors)):
        raise CheckpointError(f"model folder {index.parent} lacks tensors that {index.name} names: {listed(absent)}")
    return tensors


def _files(index: Path) -> dict[str, str]:
    files = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"index file {index} has the weight_map {shown(files)}; expected files by tensor")
    for tensor, name in files.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"index file {index}: weight_map has {shown(name)} for {tensor}; expected a file name"
            )
    return files


def listed(names: list[str], most: int = 8) -> str:
    """The first names, and how many there are besides."""
    return ", ".join(name if len(name) <= 120 else f"{name[:117]}..." for name in names[:most]) + (
        f" and {len(names) - most} more" if len(names) > most else ""
    )
