"""Folders in the transformers layout <-> our parameters. Files are read in fastbert.weights, names of other
implementations in fastbert.ports.
"""

import json
import os
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbert.config import nearest
from fastbert.errors import CheckpointError, ConfigError, DataError, DtypeError, MissingFileError, shown
from fastbert.files import read_json
from fastbert.ports import translated
from fastbert.weights import WEIGHTS, listed, read_tensors, weights_file

CONFIG = "config.json"

# What a folder may not lack; heads and pooler it may, for a model that was trained for something else has others.
_ENCODER = re.compile(r"(model\.)?(embeddings|encoder)\.")
# What published files hold besides parameters, or twice: position buffers (recomputed, not trusted), the decoder, which
# must be the word-embedding table, and its bias under a second name.
_DERIVED = re.compile(
    r"position_ids$|token_type_ids$|(^|roformer\.)encoder\.embed_positions\.weight$|relative_positions_encoding\."
    r"|sentence_encoder\.version$"
)
_DECODER = re.compile(r"(predictions\.decoder|lm_head\.decoder|generator_lm_head)\.weight$")
_BIAS_ALIAS = re.compile(r"(predictions|lm_head)\.decoder\.bias$")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
    names = read_config(path).get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config file {path} has architectures {shown(names)}; expected a list of class names")
    return names[0] if names else None


def read_config(path: Path) -> dict:
    """The keys and values of a config file; `CheckpointError` if it is damaged."""
    return read_json(path, CheckpointError)


def new_folder(path) -> Path:
    """The path of a folder that is about to be written; `DataError` if there is anything there."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} exists already, expected a new folder")
    return path


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
    if model.config.id2label is not None:
        config["label2id"] = {name: index for index, name in model.config.id2label.items()}
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


def load(
    model: nn.Module, folder, *, dtype: torch.dtype | str | None = None, device=None, new_heads: bool = False
) -> None:
    """Fills a model that was built on the meta device from the weights in `folder`.

    Parameters of head and pooler that are missing are initialised and named in a warning; a missing parameter of the
    encoder, or one of the wrong shape, is a `CheckpointError`; with new_heads a head of another shape counts as
    missing.
    """
    source = f"model folder {folder} ({CONFIG}, {weights_file(folder).name})"
    fill(model, read_tensors(folder), source, dtype=dtype, device=device, new_heads=new_heads)


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype | str | None = None,
    device=None,
    new_heads: bool = False,
) -> None:
    """As `load`, from tensors by name; `source` is named in errors and warnings."""
    dtype, device = _target(dtype, device)
    state = load_state(model, tensors, source, new_heads)
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
    if dtype is not None and wanted not in _FLOATS:
        raise DtypeError(f"dtype is {dtype!r}; expected a floating torch.dtype, its name, or None: {_listed_floats()}")
    try:
        found = torch.device("cpu" if device is None else device)
        if found.type not in ("cpu", "cuda", "meta"):
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, ImportError) as error:
        raise ConfigError(f"device is {device!r}: {str(error).splitlines()[0]}") from None
    device = found
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(device)!r}, but there is no CUDA device here")
    return wanted, device


def _draw(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    setattr(owner, leaf, nn.Parameter(torch.empty_like(getattr(owner, leaf), dtype=dtype, device=device)))
    model.initialize(owner)


def load_state(model: nn.Module, tensors: dict[str, Tensor], source: str, new_heads: bool = False) -> dict[str, Tensor]:
    """Our names -> tensors, from `tensors` under the names of transformers or of a port that fastbert.ports knows;
    `source` is named in errors and warnings; with new_heads a head of another shape counts as missing.
    """
    tensors = translated(tensors, model.model_type)
    prefixes = (f"{model.names.prefix}.", "bert.", "")  # some NEZHA ports say "bert."; a bare encoder has no prefix
    state, wrong, missing, used = {}, [], [], set()
    for name, parameter in model.named_parameters():
        published = model.names.of(name, model.config)
        found = _find(published, tensors, model.names.prefix, prefixes)
        if found is None:
            missing.append((name, published))
            continue
        used.add(found)
        if new_heads and not _ENCODER.match(name) and tensors[found].shape != parameter.shape:
            missing.append((name, f"{published} of shape {list(parameter.shape)}"))
        elif reason := _unfit(tensors[found], parameter):
            wrong.append(f"{published} {reason}")
        else:
            state[name] = tensors[found]
    wrong += _untied(model, tensors, state)
    if wrong:
        raise CheckpointError(f"{source} does not fit {type(model).__name__} with this config: " + "; ".join(wrong[:8]))
    unexpected = [name for name in tensors if name not in used and not _is_copy(name)]
    lost = [published for name, published in missing if _ENCODER.match(name)]
    if lost:
        raise CheckpointError(
            f"{source} lacks {len(lost)} tensor(s) of {type(model).__name__}: {_asked(lost, unexpected)}; it has "
            f"{listed(sorted(tensors))}"
        )
    if missing:
        warnings.warn(
            f"{source} has no {_asked([published for _, published in missing], unexpected)}: drawn anew, train before "
            "use",
            stacklevel=5,
        )
    if unexpected:
        warnings.warn(
            f"{source} has tensors that {type(model).__name__} does not use: {listed(unexpected)}", stacklevel=5
        )
    return state


def _unfit(tensor: Tensor, parameter: Tensor) -> str | None:
    """Why a tensor cannot be that parameter. The extremes of a tensor tell infinities and NaN in one pass over it."""
    if tensor.is_nested:
        return "is nested, expected a dense tensor"
    if tensor.shape != parameter.shape:
        return f"has shape {list(tensor.shape)}, expected {list(parameter.shape)}"
    if tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.is_meta:
        kind = "without data" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
        return f"is {kind}, expected a dense tensor of {_listed_floats()}"
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        broken = (~torch.isfinite(tensor)).sum()
        return f"holds {broken} values that are NaN or infinite, of {tensor.numel()}; expected finite numbers"
    return None


def _listed_floats() -> str:
    return ", ".join(map(str, _FLOATS))


def _is_copy(name: str) -> bool:
    return any(pattern.search(name) for pattern in (_DERIVED, _DECODER, _BIAS_ALIAS))


def _asked(names: list[str], there: list[str], most: int = 8) -> str:
    """The first names, each with the name in the file that looks like a misspelling of it."""
    return listed([name + nearest(name, there, 0.9) for name in names[:most]] + names[most:], most)


def _untied(model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    word, bias = state.get("model.embeddings.word.weight"), state.get("head.bias")
    if word is None or not hasattr(model, "head"):
        return []
    wrong = []
    for pattern, ours, what in ((_DECODER, word, "the word embeddings"), (_BIAS_ALIAS, bias, "the head's own bias")):
        for name in filter(pattern.search, tensors if ours is not None else ()):
            if reason := _unfit(tensors[name], ours):
                wrong.append(f"{name} {reason}")
            elif not torch.equal(tensors[name], ours):
                wrong.append(f"{name} differs from {what}, expected the same")
    return wrong


def _find(published: str, tensors: dict, own: str, prefixes: tuple[str, ...]) -> str | None:
    bare = published.removeprefix(f"{own}.")
    candidates = [published, *(prefix + bare for prefix in prefixes)]
    if published.endswith(("predictions.bias", "lm_head.bias")):
        candidates.append(published.removesuffix("bias") + "decoder.bias")
    return next((name for name in candidates if name in tensors), None)
