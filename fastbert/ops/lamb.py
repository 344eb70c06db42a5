"""One step of LAMB for a group of parameters, in place."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves
from fastbert.errors import ConfigError, DtypeError, ShapeError
from fastbert.ops import checks


@torch.no_grad()
def lamb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    always_adapt: bool = False,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """Changes params, exp_avgs (m) and exp_avg_sqs (v) by one LAMB step, in place: formulas in fastbert.reference.

    params, exp_avgs, exp_avg_sqs: lists of equally many tensors, all float32 (or all float64, without backend "cuda");
    masters, if the model is in 16 bits. grads: the same shapes, any floating dtype ("cuda": float32). step: counts from
    1. grad_scale divides every gradient: the caller folds the loss scale and the clipping by the global norm into it.
    What happens to gradients that are not finite is the caller's business: they make the result so.

    Backend "cuda" is the compiled extension, for tensors on CUDA and, where only its CPU part was built, on the CPU.
    Raises ShapeError, DtypeError, ConfigError (a number out of range), BackendError.
    Source: You et al. (2019), arXiv 1904.00962, algorithm 2, as apex's FusedLAMB computes it.
    """
    _check_tensors(params, grads, exp_avgs, exp_avg_sqs)
    _check_numbers(step, lr, betas, eps, weight_decay, grad_scale)
    name = pick("lamb", _BACKENDS, backend, params, grads, exp_avgs, exp_avg_sqs)
    if len(params) == 0:
        return
    _TWINS[name](
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        grad_averaging=grad_averaging,
        always_adapt=always_adapt,
        grad_scale=grad_scale,
    )


def _check_tensors(params: Sequence[Tensor], grads: Sequence[Tensor], *moments: Sequence[Tensor]) -> None:
    checks.lists(params=params)
    for name, tensors in zip(("grads", "exp_avgs", "exp_avg_sqs"), (grads, *moments), strict=True):
        checks.lists(**{name: tensors})
        if len(tensors) != len(params):
            raise ShapeError(f"{name}: got {len(tensors)} tensors, expected {len(params)} as in params")
        for i, (t, p) in enumerate(zip(tensors, params, strict=True)):
            if t.shape != p.shape:
                raise ShapeError(f"{name}[{i}]: got shape {tuple(t.shape)}, expected {tuple(p.shape)} as params[{i}]")
            if t.dtype != p.dtype and not (tensors is grads and t.is_floating_point()):
                raise DtypeError(f"{name}[{i}]: got {t.dtype}, expected {p.dtype} as params[{i}]")
    for i, p in enumerate(params):
        if p.dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"params[{i}]: got {p.dtype}, expected torch.float32 (of 16-bit parameters, the masters)")


def _check_numbers(
    step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_scale: float
) -> None:
    checks.number("step", step, lambda x: x >= 1, "at least 1, an int", whole=True)
    checks.number("lr", lr, lambda x: x >= 0, "at least 0")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigError(f"betas: got {betas!r}, expected two numbers")
    for i, beta in enumerate(betas):
        checks.number(f"betas[{i}]", beta, lambda x: 0 <= x < 1, "0 <= beta < 1")
    checks.number("eps", eps, lambda x: x >= 0, "at least 0")
    checks.number("weight_decay", weight_decay, lambda x: x >= 0, "at least 0")
    checks.number("grad_scale", grad_scale, lambda x: x > 0, "more than 0")


def _extension_serves(*lists: Sequence[Tensor]) -> str | None:
    if importlib.util.find_spec("fastbert._C") is None:
        return "the extension is not built: pip install --no-build-isolation ."
    tensors = [t for tensors in lists for t in tensors]
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        return f"the tensors are on several devices: {', '.join(sorted(map(str, devices)))}"
    if not all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
        return "not all tensors are contiguous float32"
    import fastbert._C  # noqa: F401

    key = "CUDA" if tensors and tensors[0].is_cuda else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::lamb_", key):
        return f"the extension was built without its {key} part"
    return None


def _extension(params, grads, exp_avgs, exp_avg_sqs, *, betas, **numbers):
    torch.ops.fastbert.lamb_(params, grads, exp_avgs, exp_avg_sqs, beta1=betas[0], beta2=betas[1], **numbers)


def _reference(params, grads, exp_avgs, exp_avg_sqs, **numbers):
    results = reference.lamb(params, grads, exp_avgs, exp_avg_sqs, **numbers)
    for tensors, new in zip((params, exp_avgs, exp_avg_sqs), results, strict=True):
        for t, value in zip(tensors, new, strict=True):
            t.copy_(value)


_BACKENDS = {"cuda": _extension_serves, "torch": serves, "reference": serves}
_TWINS = {"cuda": _extension, "torch": portable.lamb, "reference": _reference}
