"""One step of LAMB for groups of parameters, in place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastbert import extension, portable_lamb, reference
from fastbert.backend import pick, serves
from fastbert.errors import ConfigError, DtypeError, ShapeError
from fastbert.ops import checks

_NORM, _MOMENTS, _APPLY = 1, 2, 4  # LambPhase of csrc/lamb.h
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "masters")  # of tensors, in a LambGroup


@dataclass(kw_only=True)
class LambGroup:
    """Parameters that share their settings, and all that belongs to them: lists of equally many tensors.

    params: float32, float16, bfloat16 or float64. grads: the same shapes, any of these dtypes. exp_avgs (m) and
    exp_avg_sqs (v): the same shapes, float32 (float64 for float64). steps: the number of steps each has made, a float32
    of one element. masters: float32 weights of 16-bit parameters, which are then copies of them; the parameter itself
    where there is none. None: no masters at all.
    lr: a number, or a float32 tensor of one element on the device of the parameters, which a captured CUDA graph reads
    anew. shards: process groups over which all tensors here are sharded; norms are summed over them, on the same
    backend and with the same groups in all processes.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    masters: Sequence[Tensor] | None = None
    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = True
    grad_averaging: bool = True
    always_adapt: bool = False
    shards: tuple = ()

    def __post_init__(self):
        if self.masters is None:
            self.masters = self.params

    @property
    def adapts(self) -> bool:
        """Whether the step is scaled by the trust ratio |p| / |u|."""
        return self.always_adapt or self.weight_decay != 0


@torch.no_grad()
def lamb(
    groups: Sequence[LambGroup],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Changes params, masters, exp_avgs, exp_avg_sqs and steps of all groups by one LAMB step, in place.

    Formulas: reference.lamb and reference.lamb_scale. All gradients are divided by grad_scale (a tensor of one element)
    and, where their norm G over all groups then exceeds max_grad_norm (None: no limit), by G / max_grad_norm. Where any
    of them is not finite, or found_inf (a tensor of one element) is not 0, nothing is changed, the steps included.
    On CUDA nothing is waited for, and the call can be captured in a CUDA graph. torch.compile leaves it as it is.

    Returns G, float64 of one element: infinite or NaN where a gradient was.

    Backend "cuda" is the compiled extension, for tensors on CUDA and, where only its CPU part was built, on the CPU.
    "torch" also takes float64 and tensors that are not contiguous. Raises ShapeError, DtypeError, ConfigError (a
    setting out of range), BackendError.
    Source: You et al. (2019), arXiv 1904.00962, algorithm 2, as apex's FusedLAMB computes it.
    """
    checks.tensors("grad_scale", "found_inf", grad_scale=grad_scale, found_inf=found_inf)
    for name, t in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if t is not None and t.numel() != 1:
            raise ShapeError(f"{name}: got shape {tuple(t.shape)}, expected one element")
    if max_grad_norm is not None:
        checks.number("max_grad_norm", max_grad_norm, lambda x: x > 0, "None or more than 0")
    for i, group in enumerate(groups):
        _check_tensors(f"groups[{i}]", group)
    return run(groups, grad_scale=grad_scale, found_inf=found_inf, max_grad_norm=max_grad_norm, backend=backend)


@torch.no_grad()
def run(
    groups: Sequence[LambGroup],
    *,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float | None,
    backend: str | None,
) -> Tensor:
    """`lamb` for tensors that were made to fit: only settings and devices are checked."""
    for i, group in enumerate(groups):
        _check_numbers(f"groups[{i}]", group)
    groups = [group for group in groups if group.params]
    tensors = [t for group in groups for name in LISTS for t in getattr(group, name)]
    devices = dict.fromkeys([t.device for t in tensors])
    if len(devices) > 1:
        names = ", ".join(map(str, devices))
        raise ShapeError(f"the tensors are on several devices ({names}), expected one: make a call for each")
    name = pick("lamb", _BACKENDS, backend, tensors, any(group.shards for group in groups))
    if not groups:
        return torch.zeros((), dtype=torch.float64)
    scalars = {"grad_scale": grad_scale, "found_inf": found_inf}
    scalars = {name: None if t is None else t.to(tensors[0].device, torch.float32) for name, t in scalars.items()}
    if found_inf is not None:  # of shards, each process may have seen its own
        scalars["found_inf"] = scalars["found_inf"].clone()
        for process_group in dict.fromkeys(shard for group in groups for shard in group.shards):
            dist.all_reduce(scalars["found_inf"], dist.ReduceOp.MAX, group=process_group)
    return _TWINS[name](groups, **scalars, max_grad_norm=max_grad_norm)


def _check_tensors(where: str, group: LambGroup) -> None:
    for name in LISTS:
        tensors = getattr(group, name)
        checks.lists(**{f"{where}.{name}": tensors})
        if len(tensors) != len(group.params):
            expected = f"expected {len(group.params)} as in params"
            raise ShapeError(f"{where}.{name}: got {len(tensors)} tensors, {expected}")
    for i, p in enumerate(group.params):
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise DtypeError(f"{where}.params[{i}]: got {p.dtype}, expected float32, float16, bfloat16 or float64")
        wide = torch.promote_types(p.dtype, torch.float32)
        for name in ("grads", "exp_avgs", "exp_avg_sqs", "masters"):
            t = getattr(group, name)[i]
            if t.layout != torch.strided:
                raise DtypeError(f"{where}.{name}[{i}]: got a {t.layout} tensor, expected a dense one")
            checks.shape(f"{where}.{name}[{i}]", t, p.shape, f"as params[{i}]")
            if name == "grads" and not t.is_floating_point():
                raise DtypeError(f"{where}.grads[{i}]: got {t.dtype}, expected a floating dtype")
            if name != "grads" and t is not p and t.dtype != wide:
                raise DtypeError(f"{where}.{name}[{i}]: got {t.dtype}, expected {wide} for params[{i}] in {p.dtype}")
        if group.steps[i].numel() != 1 or group.steps[i].dtype != torch.float32:
            got = f"{group.steps[i].dtype} {tuple(group.steps[i].shape)}"
            raise ShapeError(f"{where}.steps[{i}]: got {got}, expected one float32")


def _check_numbers(where: str, group: LambGroup) -> None:
    if isinstance(group.lr, Tensor):
        if group.lr.numel() != 1 or group.lr.dtype != torch.float32:
            raise ConfigError(f"{where}.lr: got {group.lr.dtype} {tuple(group.lr.shape)}, expected one float32")
    else:
        checks.number(f"{where}.lr", group.lr, lambda x: x >= 0, "at least 0")
    check_settings(group.betas, group.eps, group.weight_decay, where + ".")


def check_settings(betas: tuple[float, float], eps: float, weight_decay: float, where: str = "") -> None:
    """ConfigError for a setting out of range."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ConfigError(f"{where}betas: got {betas!r}, expected two numbers")
    for i, beta in enumerate(betas):
        checks.number(f"{where}betas[{i}]", beta, lambda x: 0 <= x < 1, "0 <= beta < 1")
    checks.number(f"{where}eps", eps, lambda x: x >= 0, "at least 0")
    checks.number(f"{where}weight_decay", weight_decay, lambda x: x >= 0, "at least 0")


def _extension_serves(tensors: list[Tensor], _sharded: bool = False) -> str | None:
    if reason := extension.load():
        return reason
    if not all([t.is_contiguous() for t in tensors]):
        return "not all tensors are contiguous"
    if torch.float64 in {t.dtype for t in tensors}:
        return "it does not take float64"
    key = "CUDA" if tensors and tensors[0].is_cuda else "CPU"
    if tensors and tensors[0].device.type not in ("cuda", "cpu"):
        return f"it does not run on {tensors[0].device}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastbert::lamb_", key):
        return f"the extension was built without its {key} part: install it again where nvcc is, or remove it"
    return None


def _reference_serves(_tensors: list[Tensor], sharded: bool = False) -> str | None:
    return "it does not sum over shards" if sharded else None


class _Extension:
    """One call's arguments of the compiled operator, for groups that are sharded alike."""

    def __init__(self, groups: list[LambGroup], scalars: dict, max_grad_norm: float | None):
        self.shards = groups[0].shards
        lists = {name: [t for group in groups for t in getattr(group, name)] for name in LISTS}
        lrs, rows = [], []
        for group in groups:
            on_device = isinstance(group.lr, Tensor) and group.lr.device == group.params[0].device
            lr, index = (0.0, len(lrs)) if on_device else (float(group.lr), -1)
            lrs += [group.lr] if on_device else []
            flags = group.bias_correction + 2 * group.grad_averaging + 4 * group.adapts
            rows.append((len(group.params), lr, index, *group.betas, group.eps, group.weight_decay, flags))
        self.totals = torch.empty(2 + 2 * len(lists["params"]), dtype=torch.float64, device=lists["params"][0].device)
        self.settings = torch.tensor(rows, dtype=torch.float64)
        self.arguments = lists | {"lrs": lrs} | scalars
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        self.workspace = None
        self.changed = [lists[name] for name in LISTS if name != "grads"]

    def given(self, phases: int) -> dict:
        """The operator's arguments."""
        own = {"settings": self.settings, "max_grad_norm": self.max_grad_norm, "totals": self.totals}
        return self.arguments | own | {"workspace": self.workspace, "phases": phases}

    def run(self, phases: int) -> None:
        fresh = torch.ops.fastbert.lamb_(**self.given(phases))
        if self.workspace is None:
            self.workspace = fresh
        if phases & _APPLY:
            torch.autograd.graph.increment_version([t for tensors in self.changed for t in tensors])


def _extension(groups: list[LambGroup], *, max_grad_norm: float | None, **scalars: Tensor | None) -> Tensor:
    calls = [_Extension(alike, scalars, max_grad_norm) for alike in _by_shards(groups)]
    if len(calls) == 1 and not calls[0].shards:
        calls[0].run(_NORM | _MOMENTS | _APPLY)
        return _norm(calls[0].totals[0], scalars["grad_scale"])
    for call in calls:
        call.run(_NORM)
        _sum_over(call.shards, call.totals[0])
    total = torch.stack([call.totals[0] for call in calls]).sum()
    for call in calls:
        call.totals[0] = total
        call.run(_MOMENTS)
        _sum_over(call.shards, call.totals[2:])
        call.run(_APPLY)
    return _norm(total, scalars["grad_scale"])


def _portable(groups: list[LambGroup], *, grad_scale, found_inf, max_grad_norm: float | None) -> Tensor:
    totals = []
    for alike in _by_shards(groups):
        totals.append(portable_lamb.lamb_norm([g for group in alike for g in group.grads]))
        _sum_over(alike[0].shards, totals[-1])
    total = torch.stack(totals).sum()
    scale, keep = portable_lamb.lamb_scale(total, grad_scale, found_inf, max_grad_norm)
    for group in groups if keep is not False else ():
        updates, moments, sums = portable_lamb.lamb_moments(group, scale)
        _sum_over(group.shards, sums)
        portable_lamb.lamb_apply(group, updates, moments, sums, keep)
    return _norm(total, grad_scale)


def _reference(groups: list[LambGroup], *, grad_scale, found_inf, max_grad_norm: float | None) -> Tensor:
    grads = [g for group in groups for g in group.grads]
    divisor, norm = reference.lamb_scale(grads, 1.0 if grad_scale is None else grad_scale.item(), max_grad_norm)
    if not norm.isfinite() or (found_inf is not None and found_inf.item() != 0):
        return norm
    for group in groups:
        for p, master, g, m, v, step in zip(
            group.params, group.masters, group.grads, group.exp_avgs, group.exp_avg_sqs, group.steps, strict=True
        ):
            results = reference.lamb(
                [master],
                [g],
                [m],
                [v],
                step=int(step.item()) + 1,
                lr=float(group.lr),
                betas=group.betas,
                eps=group.eps,
                weight_decay=group.weight_decay,
                bias_correction=group.bias_correction,
                grad_averaging=group.grad_averaging,
                always_adapt=group.always_adapt,
                grad_scale=divisor,
            )
            for t, (new,) in zip((master, m, v), results, strict=True):
                t.copy_(new)
            step.add_(1)
            if master is not p:
                p.copy_(master)
    return norm


def _by_shards(groups: list[LambGroup]) -> list[list[LambGroup]]:
    alike: dict[tuple, list[LambGroup]] = {}
    for group in groups:
        alike.setdefault(tuple(group.shards), []).append(group)
    return list(alike.values())


def _sum_over(shards: tuple, sums: Tensor) -> None:
    for process_group in shards:
        dist.all_reduce(sums, group=process_group)


def _norm(total: Tensor, grad_scale: Tensor | None) -> Tensor:
    """|g| from the sum of squares of the gradients before they are divided by grad_scale."""
    return total.sqrt() if grad_scale is None else total.sqrt() / grad_scale.squeeze()


_BACKENDS = {"cuda": _extension_serves, "torch": serves, "reference": _reference_serves}
_TWINS = {"cuda": _extension, "torch": _portable, "reference": _reference}
