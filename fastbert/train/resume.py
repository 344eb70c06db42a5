"""Going on with a run: where from, and whether it is the same run."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastbert.errors import CheckpointError, ConfigError, shown
from fastbert.train import state
from fastbert.train.config import PretrainConfig, TextOptions
from fastbert.train.journal import read_log
from fastbert.train.setup import CHECKPOINTS
from fastbert.train.spikes import WINDOW
from fastbert.train.world import World, launch

# What a resumed run may be told anew: how it is written and watched, and where. That the data are the same is seen
# from their checksums, that batch_size x accumulation x processes is, from the product.
_FREE = {entry.name for entry in dataclasses.fields(TextOptions)} | set(
    "data out resume overwrite device threads compile cuda_graphs log_every validate_every validation_samples "
    "checkpoint_every keep_last keep_best async_checkpoints spikes spike_sigmas parallel reduce_dtype timeout "
    "tensorboard batch_size accumulation global_batch similar_words".split()
)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_number(value) -> bool:
    return type(value) is float or _is_count(value)


def _are_numbers(value, count: int | None = None) -> bool:
    return isinstance(value, list) and len(value) == (count or len(value)) and all(map(_is_number, value))


def _are_counts(value) -> bool:
    return isinstance(value, dict) and all(_is_number(count) and math.isfinite(count) for count in value.values())


def _has(value, **parts: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(fits(value.get(name)) for name, fits in parts.items())


def _is_window(value) -> bool:
    return _are_numbers(value, 3) or _has(value, losses=_are_numbers, counts=_are_counts)


def _is_scale(value) -> bool:
    return _has(value, scale=_is_number, good=_is_count)


def _is_old_scale(value) -> bool:
    return value == {} or _has(value, scale=_is_number, _growth_tracker=_is_count)


def _is_history(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_are_numbers(row, WINDOW) for row in value)


def _are_spikes(value) -> bool:
    return _has(value, recent=_is_history, count=_is_count)


def _is_best(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and isinstance(value[1], str)


# What a checkpoint's state holds: whether it may be None or absent, what it must be, and that in words.
_STATE = {
    "step": (False, _is_count, "a count"),
    "update": (False, _is_count, "a count"),
    "data": (False, lambda value: isinstance(value, str), "a checksum"),
    "global_batch": (False, _is_count, "a count"),
    "config": (False, lambda value: isinstance(value, dict), "options by name"),
    "window": (False, _is_window, "losses and counts"),
    "loss": (True, _is_number, "a number"),
    "validation_loss": (True, _is_number, "a number"),
    "loss_scale": (True, _is_scale, "scale and good"),
    "scaler": (True, _is_old_scale, "scale and _growth_tracker"),
    "spikes": (True, _are_spikes, f"recent, two lists of {WINDOW} numbers, and count"),
    "best": (True, _is_best, "a loss and the name of a checkpoint"),
}


def after_restart(config: PretrainConfig, world: World) -> PretrainConfig:
    """The options for processes that torchrun has started anew (--max-restarts, or another number of nodes): the run
    that its first processes have begun in the out folder goes on, or begins again if it has no checkpoint yet.
    """
    if config.resume:
        return config
    found, folder = 0, Path(config.out)
    if world.is_main and launch() is not None:
        begun = read_log(folder, "begin")
        if begun and begun[-1].get("launch") == launch():
            found = 2 if state.newest_first(folder / CHECKPOINTS) else 1
    (found,) = world.max(found)
    return replace(config, resume=found == 2, overwrite=found == 1) if found else config


def find_checkpoint(config: PretrainConfig, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, the same in all processes, and what was found to be damaged; None to begin."""
    if not config.resume:
        return None, []
    root, damaged = Path(config.out) / CHECKPOINTS, []
    (step,) = world.max(state.step_of(state.latest(root, damaged.append)) if world.is_main else 0)
    return root / state.name_of(int(step)), damaged


def read_state(checkpoint: Path) -> dict:
    """The state of a checkpoint; CheckpointError if something is not in it, or is of another kind."""
    content = state.read_state(checkpoint)
    for name, (optional, fits, expected) in _STATE.items():
        value = content.setdefault(name, None)
        if not (optional and value is None) and not fits(value):
            raise CheckpointError(f"{checkpoint / state.STATE}: {name} is {shown(value)}, expected {expected}")
    return content


def check_resumable(config: PretrainConfig, content: dict, global_batch: int, data: str) -> None:
    """ConfigError for a setting that would make another run of it, with the old and the new value."""
    begun, advice = content["config"], "to train on with other settings, begin a new run with init=<model folder>"
    # A run may have been begun before an option was there: it has the option's default.
    begun = _plain(PretrainConfig()) | begun
    pairs = [(name, begun[name], value) for name, value in _plain(config).items() if name not in _FREE]
    pairs.append(("batch_size x accumulation x processes", content["global_batch"], global_batch))
    pairs.append(("data (checksum)", content["data"], data))
    for name, old, new in pairs:
        if old != new:
            raise ConfigError(f"{name} is {new!r}, but the run in {config.out} was begun with {old!r}; {advice}")


def loss_scale_of(content: dict) -> dict | None:
    """That of a checkpoint's state, or None; before 0.1 was out it was kept as torch.amp.GradScaler keeps it."""
    if old := content.get("scaler"):
        return {"scale": old["scale"], "good": old["_growth_tracker"]}
    return content.get("loss_scale")


def window_of(content: dict) -> dict:
    """What had happened since the last record when a checkpoint was made; once there was one loss, per label."""
    window = content["window"]
    if isinstance(window, dict):
        return window
    loss, labels, tokens = window
    return {"losses": [loss], "counts": {"label": labels, "sample": 0, "token": tokens}}


def begun_config(folder: Path) -> dict:
    """The settings that the run in `folder` was begun with: the log tells, or where it is lost the newest checkpoint;
    empty if there is none."""
    begun = [record.get("config") for record in read_log(folder, "begin")]
    if not begun and (checkpoints := state.newest_first(folder / CHECKPOINTS)):
        begun = [read_state(checkpoints[0])["config"]]
    if not begun or not isinstance(begun[0], dict):
        return {}
    return {name: value for name, value in begun[0].items() if name not in ("overwrite", "resume")}


def _plain(config: PretrainConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))
