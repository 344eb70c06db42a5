"""Names of models on the Hugging Face hub -> folders on this machine, by huggingface_hub, which is the extra hf.

Nothing is downloaded for a folder that exists nor for what is clearly a path; `HF_HUB_OFFLINE=1` is respected, and what
is in the cache is not downloaded again.
"""

import os
import re
from os import PathLike
from pathlib import Path

from fastbert.errors import MissingFileError

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_CONFIG = ["config.json", "tokenizer_config.json"]
_TOKENIZER = ["tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json"]
_SAFETENSORS, _BIN = "model*.safetensors*", "pytorch_model*.bin*"
_WEIGHTS = [_SAFETENSORS, "generator/config.json", f"generator/{_SAFETENSORS}"]  # what save_pretrained may write


def local_folder(name: str | PathLike, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder `name`; if there is none and `name` is a string of the form "name" or "owner/name", that of the hub's
    model of that name, which is downloaded unless it is in the cache.

    revision: a branch, tag or commit of the hub's model; default: main.
    weights: with the weights, of safetensors if the model has any, else of `pytorch_model.bin`; otherwise only configs
      and tokenizer.

    `MissingFileError`: there is no such folder, and no such model, or huggingface_hub is not installed, or the model is
    not in the cache and there is no network.
    """
    folder = Path(name)
    if folder.is_dir() or not isinstance(name, str) or not _ID.fullmatch(name):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingFileError(
            f"folder {name} does not exist; to download the model of that name from the Hugging Face hub, install "
            "fastbert-kernels[hf]"
        ) from None
    files = [*_CONFIG, *_TOKENIZER]
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=files + _WEIGHTS * weights))
        if weights and not any(found.glob(_SAFETENSORS)):
            found = Path(snapshot_download(name, revision=revision, allow_patterns=[*files, _BIN]))
    except Exception as error:  # errors of connections have no common base but this one
        raise MissingFileError(_absent(name, revision, error)) from error
    return found


def _absent(name: str, revision: str | None, error: Exception) -> str:
    what = f"folder {name} does not exist, and the model {name}{f' at revision {revision}' if revision else ''}"
    reason = " ".join(str(error).split())
    kind = {kind.__name__ for kind in type(error).__mro__}
    if "LocalEntryNotFoundError" in kind:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the Hugging Face hub cannot be reached"
        return f"{what} is not in the cache of huggingface_hub, and {why}: {reason}"
    return f"{what} cannot be downloaded from the Hugging Face hub: {reason}"
