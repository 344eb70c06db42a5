"""Parameter groups and learning-rate schedules."""

from collections.abc import Callable

from torch import nn

from fastbert.errors import ConfigError

SCHEDULES = ("linear", "poly", "nezha", "constant")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: what is decayed, and with weight_decay 0 every bias and every weight of a
    normalisation module.

    The modules decide, not their names: `full_layer_layer_norm` (ALBERT) and `lm_head.layer_norm` (RoBERTa) slip
    through the usual search for "LayerNorm". A shared tensor is in one group once; frozen parameters are in none.
    """
    decayed, exempt = {}, {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            group = exempt if name == "bias" or isinstance(module, _NORMS) else decayed
            if parameter.requires_grad:
                group[parameter] = None
    return [
        {"params": [parameter for parameter in decayed if parameter not in exempt], "weight_decay": weight_decay},
        {"params": list(exempt), "weight_decay": 0.0},
    ]


def schedule(name: str, *, steps: int, warmup: float = 0, degree: float = 0.5) -> Callable[[int], float]:
    """factor(step): what the learning rate is multiplied by in the update that follows `step` completed ones.

    All rise linearly from 0 to 1 over the warm-up of w steps; from there on, of T steps in all,
    "linear": falls linearly to 0 at T, as get_linear_schedule_with_warmup of transformers does;
    "nezha": the same curve, stated as NEZHA's code does: (1 - step/T) / (1 - w/T), without a jump at w;
    "poly": (1 - step/T)^degree, which falls from 1 to (1 - w/T)^degree at the switch (NVIDIA's BERT, degree 0.5);
    "constant": stays 1.

    warmup: a number of steps, or, below 1, a share of `steps`. After `steps` the factor stays at its last value.
    Raises ConfigError for an unknown name or a value out of range.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule is {name!r}, expected one of {', '.join(map(repr, SCHEDULES))}")
    if steps < 1:
        raise ConfigError(f"steps is {steps}, expected at least 1")
    rise = warmup * steps if warmup < 1 else warmup
    if not 0 <= rise <= steps:
        raise ConfigError(f"warmup is {warmup}, expected 0 to {steps} steps, or a share of them below 1")
    if degree <= 0:
        raise ConfigError(f"degree is {degree}, expected a positive number")

    def factor(step: int) -> float:
        if step < rise:
            return step / rise
        left = max(0.0, 1 - step / steps)
        if name == "constant" or rise == steps:
            return 1.0
        return left**degree if name == "poly" else left / (1 - rise / steps)

    return factor
