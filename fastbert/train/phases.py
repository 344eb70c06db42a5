"""Running a recipe: its plan, then its phases one after the other, each from the weights of the one before."""

from dataclasses import replace
from pathlib import Path

import torch

from fastbert.errors import ConfigError, MissingFileError
from fastbert.train import resume, setup
from fastbert.train.config import PretrainConfig, TextOptions
from fastbert.train.plan import Plan, lacking
from fastbert.train.pretrain import PretrainResult, pretrain
from fastbert.train.recipes import Recipe
from fastbert.train.world import World

_OUT = "runs"


def run_recipe(recipe: Recipe | str, explain_only: bool = False, **changes) -> PretrainResult | None:
    """Prints the plan of a recipe, then trains its phases, each in a folder of its own in `out`, from the model of the
    phase before, with a new optimizer. Returns the result of the last phase, or of the one that was interrupted; None
    with explain_only, or if there was nothing left to do.

    recipe: a name or the path of a YAML file, see fastbert.train.recipes. changes: fields of PretrainConfig, for all
    phases; `out` is runs/<name> if it is not given; of `files` a corpus is made first, in out/corpus. With resume,
    phases that are complete are passed over. Raises what `pretrain` raises, and before any training what would stop a
    later phase.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    configs = phase_configs(recipe, changes)
    if configs[0].threads is not None:
        torch.set_num_threads(configs[0].threads)
    with World.join(configs[0].device, configs[0].timeout) as world:
        configs = [resume.after_restart(config, world) for config in configs]
        for config in configs:
            setup.accumulation(config, world)
            setup.architecture(replace(configs[0], max_length=config.max_length))
        if world.is_main:
            if not explain_only:
                _check_folders(configs)
                _prepare(recipe, configs[0], changes)
            plan = Plan.of(recipe, configs, world)
            print(plan, flush=True)
            if not explain_only:
                if lack := lacking(configs[0]):
                    raise ConfigError(lack)
                plan.check()
        world.wait_for_main("preparing the recipe")
        return None if explain_only else run_phases(configs, world)


def run_phases(configs: list[PretrainConfig], world: World) -> PretrainResult | None:
    """Trains one phase after the other. Those that are complete are passed over where a run is resumed, and one that
    had no checkpoint yet begins again."""
    result = None
    for number, config in enumerate(configs, start=1):
        folder = Path(config.out)
        if config.resume and (folder / setup.MODEL).exists():
            _say(world, f"\nphase {folder.name}: complete already")
            continue
        begun = config.resume and (folder / setup.CHECKPOINTS).exists()
        _say(world, f"\nphase {folder.name}, {number} of {len(configs)}")
        result = pretrain(replace(config, resume=begun, overwrite=config.overwrite or config.resume and not begun))
        if result.interrupted:
            break
        world.barrier()  # the first process has written the model that the next phase begins with
    return result


def phase_configs(recipe: Recipe, changes: dict) -> list[PretrainConfig]:
    """The options of all phases, with changes: where each goes, and what it begins with."""
    out, configs = Path(changes.get("out") or Path(_OUT) / recipe.name), []
    if changes.get("files"):
        text = TextOptions.__dataclass_fields__
        changes = {name: value for name, value in changes.items() if name not in text}
        changes["data"] = str(out / setup.CORPUS)
    for number in range(len(recipe.phases)):
        own = changes | {"out": str(out / recipe.phases[number]["name"])}
        if number:  # another seed, for other masks and another order of the samples
            own["seed"] = configs[0].seed + number
            own["init"] = str(Path(configs[-1].out) / setup.MODEL)
            own = {name: value for name, value in own.items() if name not in ("preset", "model")}
        configs.append(recipe.phase(number, own))
    return configs


def _check_folders(configs: list[PretrainConfig]) -> None:
    """No run is in the way of any phase, and there is one if it is to be resumed."""
    for config in configs:
        setup.check_no_run(config)
    folders = [Path(config.out) for config in configs]
    if configs[0].resume and not any(map(setup.has_run, folders)):
        raise MissingFileError(f"out {str(folders[0].parent)!r} contains no run of the recipe to resume")


def _prepare(recipe: Recipe, config: PretrainConfig, changes: dict) -> None:
    """Makes a corpus of raw text, if that is what was given, as the recipe says."""
    if not changes.get("files") or config.resume and Path(config.data).exists():
        return
    own = {name: value for name, value in changes.items() if name in TextOptions.__dataclass_fields__}
    options = TextOptions.from_dict(recipe.text | own)
    print(setup.prepare_text(options, Path(config.data), overwrite=True), flush=True)


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)
