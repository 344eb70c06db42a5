"""Live models of transformers on fastbert's operations, in place.

    report = fastbert.hf.accelerate(model)  # any model with a BERT, RoBERTa, ALBERT, ELECTRA or RoFormer in it
    print(report)
    fastbert.hf.restore(model)

Only the `forward` of the encoders in it changes. Modules, parameters (the same objects), names, config and what
save_pretrained writes stay as they are; optimizers, PEFT, Trainer, pipelines, DDP, autocast, hooks, frozen weights and
gradient checkpointing go on as before. Padding is not computed: where attention_mask is 0, results are zero, which
transformers fills with numbers that nobody reads. Heads that do read them (answers to questions, summaries of the last
token) get them: there, and in a batch with a sequence that begins with padding, padding is computed. Hooks on linear
layers see `[B, L, C]` as ever; modules put in their place (adapters) are called with rows `[T, C]`.

As it is in transformers, without fastbert: whatever asks for attentions, masks of more than two dimensions, caches,
decoders, chunked feed-forward blocks, hooks or replaced modules around the linear layers, tracing. A warning says so,
once per reason.
"""

from collections.abc import Iterator

from torch import nn

from fastbert.errors import ConfigError
from fastbert.hf.families import FAMILIES, family_of
from fastbert.hf.forward import Forward
from fastbert.hf.report import Left, Replaced, Report, backends

__all__ = ["Left", "Replaced", "Report", "accelerate", "restore"]

# Where the classes come from that may be around an encoder and read nothing for padding: heads, wrappers, containers.
_HARMLESS = ("transformers.models.", "peft.", "torch.")


def accelerate(model: nn.Module, *, unpad: bool | None = None) -> Report:
    """Let every encoder in `model` run on fastbert, in place, and say what was done.

    model: a model of transformers, bare or wrapped (PEFT, DDP, torch.compile), or any module with one in it. Encoders
      are of exactly the classes in `fastbert.hf.families`.
    unpad: whether padding is left out; None: where what is around the encoder is known not to read it: nothing, or
      heads of transformers, wrapped or not.

    What is accelerated already stays so, and the report says so; `unpad` then holds anew if it is given. `ConfigError`
    if `model` is no module or nothing in it can be accelerated: it says what was seen.
    """
    _check_module("accelerate", model)
    replaced, left = [], []
    for path, encoder in _encoders(model):
        try:
            replaced.append(_accelerate(model, path, encoder, unpad))
        except ConfigError as error:
            left.append(Left(path, type(encoder).__name__, str(error)))
    done = [each.path for each in replaced]
    left += _rest("", model, done, {each.path for each in left})
    if not replaced:
        seen = "; ".join(map(str, left))
        known = ", ".join(sorted({name.rpartition(".")[2] for name in FAMILIES}))
        raise ConfigError(
            f"accelerate: nothing in {type(model).__name__} is an encoder that is known ({known}): {seen}"
        )
    return Report(tuple(replaced), tuple(left))


def restore(model: nn.Module) -> list[str]:
    """Undo `accelerate`: every encoder in `model` runs as transformers runs it. Returns their paths.

    `ConfigError` if `model` is no module, nothing in it is accelerated, or an encoder's forward was wrapped since.
    """
    _check_module("restore", model)
    found = [(path, module) for path, module in _encoders(model) if "forward" in module.__dict__]
    wrapped = [path or "the model" for path, module in found if not isinstance(module.__dict__["forward"], Forward)]
    if wrapped or not found:
        what = f"the forward of {', '.join(wrapped)} was wrapped since" if wrapped else "nothing in it is accelerated"
        raise ConfigError(f"restore: {type(model).__name__}: {what}")
    for _, module in found:
        del module.__dict__["forward"]
    return [path for path, _ in found]


def _check_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{function}: got {type(model).__name__}, expected a torch module: a model of transformers")


def _encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((path, module) for path, module in model.named_modules() if family_of(module) is not None)


def _accelerate(model: nn.Module, path: str, encoder: nn.Module, unpad: bool | None) -> Replaced:
    forward = encoder.__dict__.get("forward")
    again = isinstance(forward, Forward)
    if forward is not None and not again:
        raise ConfigError("its forward was replaced already")
    if not again:
        forward = Forward(encoder, not _reads_padding(model, path) if unpad is None else unpad)
    elif unpad is not None:
        forward.unpad = unpad
    reason = forward.obstacle()
    if reason is not None:
        raise ConfigError(reason)
    encoder.forward = forward
    view = forward.view
    layers = sum(map(len, view.ours.encoder.applications))
    return Replaced(path, type(encoder).__name__, layers, forward.unpad, backends(view), again)


def _reads_padding(model: nn.Module, path: str) -> bool:
    """Whether what is around an encoder may read results for padding: the softmax over the places of an answer does,
    a summary of another token than the first does, and of modules of others nobody knows."""
    above = path.split(".") if path else []
    for end in range(len(above)):
        around = model.get_submodule(".".join(above[:end]))
        if not type(around).__module__.startswith(_HARMLESS) or isinstance(around, nn.Sequential):
            return True
        if any(kind.__name__.endswith("ForQuestionAnswering") for kind in type(around).__mro__):
            return True
    return any(getattr(module, "summary_type", "first") != "first" for module in model.modules())


def _rest(path: str, module: nn.Module, done: list[str], named: set[str]) -> Iterator[Left]:
    """The largest parts with weights in which nothing was accelerated."""
    if path in done or path in named or not any(True for _ in module.parameters()):
        return
    inside = [each for each in (*done, *named) if not path or each.startswith(f"{path}.")]
    if not inside:
        yield Left(path, type(module).__name__, "which is not fastbert's to run")
        return
    for name, child in module.named_children():
        yield from _rest(f"{path}.{name}" if path else name, child, done, named)
