"""Checkpoints: folders that are complete or absent, with a checksum of every file, and without pickle.

A checkpoint is a model folder in the transformers layout (config.json, model.safetensors, tokenizer files) with
optimizer.safetensors, state.json and manifest.json beside it. It is written under a temporary name, synced to disk and
then renamed; which one is the latest is found by looking, so that there is no pointer that could be wrong. Tensors are
whole, whatever the number of processes that made them.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert.errors import CheckpointError, FastBertError, MissingFileError, StorageError, shown
from fastbert.files import is_plain_name, read_json
from fastbert.optim import is_sharded, placed_as

STATE, OPTIMIZER, MANIFEST = "state.json", "optimizer.safetensors", "manifest.json"
_NAME = re.compile(r"step-\d{8,}")
_CHUNK = 1 << 18
_HERE, _RENAME_EXCHANGE = -100, 2  # of renameat2: AT_FDCWD, and its flag


@contextmanager
def storing(target: Path) -> Iterator[None]:
    """StorageError for what the file system, or safetensors of it, says while `target` is written."""
    try:
        yield
    except FastBertError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target} cannot be written: {error}") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place, synced to disk, if the body succeeds, and vanishes if
    not. StorageError if it cannot be written.
    """
    temporary = target.with_name(f".{target.name}.new")
    with storing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            _take_place(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole, synced to disk, or not at all. StorageError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it is there, so that no part of it is ever seen under its name."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def name_of(step: int) -> str:
    """The name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.rpartition("-")[2])


def save(root: Path, step: int, write_model: Callable[[Path], None], optimizer: dict[str, Tensor], state: dict) -> Path:
    """Writes the checkpoint of `step` under `root`. write_model(folder) writes the model and its tokenizer."""
    folder = root / name_of(step)
    with new_folder(folder) as temporary:
        write_model(temporary)
        save_file(optimizer, temporary / OPTIMIZER)
        _write_json(temporary / STATE, state)
        paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        files = {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in paths}
        _write_json(temporary / MANIFEST, {"format": "fastbert checkpoint", "version": 1, "files": files})
    return folder


def prune(root: Path, step: int, keep_last: int, best: str | None = None) -> None:
    """Removes all but the newest `keep_last` checkpoints up to that of `step`, and the one with the name `best`. Where
    a run has gone back behind damaged ones, these are neither counted nor removed."""
    for folder in [folder for folder in newest_first(root) if step_of(folder) <= step][keep_last:]:
        if folder.name != best:
            remove_folder(folder)


def remove_remains(root: Path) -> None:
    """Removes what a process that was killed has left of folders that it was writing or removing."""
    for pattern in (".step-*.new", ".step-*.old"):
        for folder in root.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def latest(root: Path, report: Callable[[str], None]) -> Path:
    """The newest undamaged checkpoint under `root`.

    Damaged ones are named in a call of `report` and passed over. MissingFileError if there is no checkpoint,
    CheckpointError if none is undamaged.
    """
    folders = newest_first(root)
    if not folders:
        raise MissingFileError(f"{root} has no complete checkpoint to resume from")
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            report(f"{error}; trying the checkpoint before it")
    raise CheckpointError(f"all {len(folders)} checkpoints in {root} are damaged")


def verify(folder: Path) -> None:
    """CheckpointError unless every file that the manifest names is there with its size and checksum."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    files = read_json(path, CheckpointError).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} is damaged: files is {shown(files)}, expected files with bytes and sha256")
    for name in (OPTIMIZER, STATE, *files):
        if name not in files or not _is_inside(name):
            raise CheckpointError(f"{path} is damaged: it {'names' if name in files else 'lacks'} {shown(name)}")
        if not isinstance(files[name], dict) or not files[name].keys() >= {"bytes", "sha256"}:
            raise CheckpointError(f"{path} is damaged: {name} is {shown(files[name])}, expected bytes and sha256")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, which {MANIFEST} names")
    for name, entry in files.items():
        size, checksum, found = entry["bytes"], entry["sha256"], (folder / name).stat().st_size
        if found != size:
            raise CheckpointError(f"{folder / name} is damaged: it has {found} bytes, {MANIFEST} says {shown(size)}")
        if (found := _fingerprint(folder / name)["sha256"]) != checksum:
            raise CheckpointError(
                f"{folder / name} is damaged: its sha256 is {found}, {MANIFEST} says {shown(checksum)}"
            )


def read_state(folder: Path) -> dict:
    """The contents of state.json."""
    return read_json(folder / STATE, CheckpointError)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, by `<parameter>/<quantity>`, as it is: on its device, and sharded if it is."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.detach()
        for parameter, quantities in optimizer.state.items()
        for key, value in quantities.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts back what `optimizer_tensors` gave, as whole tensors; CheckpointError if it does not fit the model."""
    parameters, state = dict(model.named_parameters()), {}
    try:
        with safe_open(folder / OPTIMIZER, framework="pt", device="cpu") as file:
            for key in file.keys():
                name, _, quantity = key.rpartition("/")
                state.setdefault(name, {})[quantity] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / OPTIMIZER} is damaged: {error}") from None
    if odd := sorted(set(state) ^ set(parameters)):
        raise CheckpointError(f"{folder / OPTIMIZER} does not fit the model: {odd[0]!r} is only in one of them")
    for name, quantities in state.items():
        parameter = parameters[name]
        for key, value in quantities.items():
            if value.shape not in ((), parameter.shape):
                raise CheckpointError(
                    f"{folder / OPTIMIZER} does not fit the model: {name}/{key} has shape {list(value.shape)}, "
                    f"expected {list(parameter.shape)}"
                )
            if is_sharded(parameter) and value.dim():
                quantities[key] = placed_as(value.to(parameter.device), parameter)
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content = optimizer.state_dict()
    content["state"] = {index: state[names[parameter]] for index, parameter in enumerate(ordered)}
    optimizer.load_state_dict(content)


def _take_place(folder: Path, target: Path) -> None:
    """Gives a folder the name `target`; what had it, if anything, gets the folder's name in the same moment."""
    if not target.exists():
        folder.rename(target)
    elif not _exchange(folder, target):  # a file system that cannot: for a moment there is neither
        doomed = _aside(target)
        folder.rename(target)
        shutil.rmtree(doomed, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once, as Linux can."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _aside(folder: Path) -> Path:
    """Takes the name from a folder, if it is there; returns what it is called now."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    return doomed


def _is_inside(name: str) -> bool:
    """Whether it is the name of a file in a folder, or in a folder of that."""
    path = PurePosixPath(name)
    return bool(path.parts) and all(map(is_plain_name, path.parts))


def newest_first(root: Path) -> list[Path]:
    """The checkpoints under `root`, complete or damaged."""
    return sorted((path for path in root.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def _fingerprint(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
