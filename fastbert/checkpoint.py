"""Folders in the transformers layout <-> our parameters, safetensors first. Nothing here unpickles: `pytorch_model.bin`
goes through `weights_only`.
"""

import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert.errors import CheckpointError, ConfigError, DtypeError, MissingFileError

CONFIG, WEIGHTS, INDEX, LEGACY = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"

# What a folder may lack: a model that was trained for something else has no such parameters.
_HEADS = ("head.", "sentence_head.", "pooler.", "model.pooler.")
# What published files hold besides parameters, or twice: position buffers (recomputed, not trusted), the decoder, which
# must be the word-embedding table, and its bias under a second name.
_DERIVED = re.compile(r"position_ids$|token_type_ids$|embed_positions\.weight$|relative_positions_encoding\.")
_DECODER = re.compile(r"(predictions\.decoder|lm_head\.decoder|generator_lm_head)\.weight$")
_BIAS_ALIAS = re.compile(r"(predictions|lm_head)\.decoder\.bias$")


def config_file(folder) -> Path:
    """The path of `config.json` in `folder`; `MissingFileError` if there is no such folder or file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"model folder {folder} does not exist; expected a folder with {CONFIG} and {WEIGHTS}")
    if not (folder / CONFIG).is_file():
        raise MissingFileError(f"model folder {folder} has no {CONFIG}")
    return folder / CONFIG


def architecture(folder) -> str | None:
    """The class name that `config.json` gives under "architectures", None if it gives none."""
    path = config_file(folder)
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"config file {path} is not a JSON object: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config file {path} has architectures {names!r}; expected a list of class names")
    return names[0] if names else None


def save(model: nn.Module, folder) -> None:
    """Writes the model's config and parameters, under their published names, into `folder`; each file appears whole or
    not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = model.published_names()
    tensors = {names[name]: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    tensors |= model.published_constants()
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = {"architectures": [type(model).__name__]} | model.config.to_dict() | {"torch_dtype": dtype}
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _replace(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, folder, *, dtype: torch.dtype | str | None = None, device=None) -> None:
    """Fills a model that was built on the meta device from the weights in `folder`.

    Parameters of head and pooler that are missing are initialised and named in a warning; a missing parameter of the
    encoder, or one of the wrong shape, is a `CheckpointError`.
    """
    dtype, device = _target(dtype, device)
    state = load_state(model, read_tensors(folder), f"model folder {folder}")
    missing = [name for name, _ in model.named_parameters() if name not in state]
    model.load_state_dict(
        {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()}, strict=False, assign=True
    )
    for name in missing:
        _draw(model, name, dtype or next(iter(state.values())).dtype, device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _target(dtype, device) -> tuple[torch.dtype | None, torch.device]:
    """`DtypeError` for what is no floating dtype, `ConfigError` for a device that is unknown or absent."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise DtypeError(f"dtype is {dtype!r}; expected a floating torch.dtype, its name, or None")
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(device)!r}, but there is no CUDA device here")
    return wanted, device


def _draw(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, leaf, nn.Parameter(torch.empty_like(getattr(owner, leaf), dtype=dtype, device=device)))
    model.initialize(owner)


def load_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Our names -> tensors, from `tensors` under the names of transformers or of the original PyTorch ports; `source`
    is named in errors and warnings.
    """
    tensors = {_modern(name): tensor for name, tensor in tensors.items()}
    prefixes = (f"{model.names.prefix}.", "bert.", "")  # some NEZHA ports say "bert."; a bare encoder has no prefix
    state, wrong, missing, used = {}, [], [], set()
    for name, parameter in model.named_parameters():
        published = model.names.of(name, model.config)
        found = _find(published, tensors, model.names.prefix, prefixes)
        if found is None:
            missing.append((name, published))
        elif tensors[found].shape != parameter.shape:
            wrong.append(f"{published} has shape {list(tensors[found].shape)}, expected {list(parameter.shape)}")
        else:
            state[name] = tensors[found]
        used.add(found)
    wrong += _untied(model, tensors, state)
    if wrong:
        raise CheckpointError(f"{source} does not fit {type(model).__name__} with this config: " + "; ".join(wrong))
    lost = [published for name, published in missing if not name.startswith(_HEADS)]
    if lost:
        raise CheckpointError(
            f"{source} lacks {len(lost)} tensor(s) of {type(model).__name__}: {_listed(lost)}; it has "
            f"{_listed(sorted(tensors))}"
        )
    if missing:
        warnings.warn(
            f"{source} has no {_listed([published for _, published in missing])}: drawn anew, train before use",
            stacklevel=4,
        )
    copies = (_DERIVED, _DECODER, _BIAS_ALIAS)
    unexpected = [name for name in tensors if name not in used and not any(copy.search(name) for copy in copies)]
    if unexpected:
        warnings.warn(
            f"{source} has tensors that {type(model).__name__} does not use: {_listed(unexpected)}", stacklevel=4
        )
    return state


def _untied(model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    word = state.get("model.embeddings.word.weight")
    if word is None or not hasattr(model, "head"):
        return []
    decoders = [name for name in tensors if _DECODER.search(name)]
    return [
        f"{name} differs from the word embeddings, expected a tied decoder"
        for name in decoders
        if not torch.equal(tensors[name], word)
    ]


def _modern(name: str) -> str:
    return re.sub(r"\.(gamma|beta)$", lambda match: {"gamma": ".weight", "beta": ".bias"}[match[1]], name)


def _find(published: str, tensors: dict, own: str, prefixes: tuple[str, ...]) -> str | None:
    bare = published.removeprefix(f"{own}.")
    candidates = [published, *(prefix + bare for prefix in prefixes)]
    if published.endswith(("predictions.bias", "lm_head.bias")):
        candidates.append(published.removesuffix("bias") + "decoder.bias")
    return next((name for name in candidates if name in tensors), None)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_tensors(folder) -> dict[str, Tensor]:
    """All tensors of a model folder by the names in its files, on the CPU."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return _read_safetensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / LEGACY).is_file():
        try:
            tensors = torch.load(folder / LEGACY, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"weights file {folder / LEGACY} cannot be read with weights_only: {error}") from None
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"weights file {folder / LEGACY} holds something else; expected tensors by name")
        return dict(tensors)
    raise MissingFileError(f"model folder {folder} has no weights; expected {WEIGHTS}, {INDEX} or {LEGACY}")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"index file {folder / INDEX} is not a JSON object with a weight_map: {error}") from None
    tensors = {}
    for name in files:
        if not (folder / name).is_file() or Path(name).name != name:
            raise MissingFileError(
                f"weights file {folder / name}, named in {INDEX}, does not exist in the model folder"
            )
        tensors |= _read_safetensors(folder / name)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(f"model folder {folder} lacks tensors that {INDEX} names: {_listed(absent)}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights file {path} is damaged or not safetensors: {error}") from None
