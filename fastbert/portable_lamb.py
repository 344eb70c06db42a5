"""LAMB as reference.lamb, composed of PyTorch's multi-tensor operations: norm, scale, moments, and the update."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lamb_norm(grads: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all gradients, float64."""
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]).square().sum()


def lamb_scale(
    total: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None, max_grad_norm: float | None
) -> tuple[Tensor, Tensor | bool]:
    """What gradients with this sum of squares are divided by, and whether the step is made: on the CPU a bool, on other
    devices a tensor, which nobody waits for."""
    scale = torch.ones_like(total) if grad_scale is None else grad_scale.double().squeeze()
    keep = total.isfinite() & scale.isfinite() & (scale > 0)
    if found_inf is not None:
        keep = keep & (found_inf.squeeze() == 0)
    if max_grad_norm is not None:
        scale = scale * (total.sqrt() / scale / max_grad_norm).clamp(min=1.0)
    return scale, bool(keep) if total.device.type == "cpu" else keep


def lamb_moments(group, scale: Tensor) -> tuple[list[Tensor], tuple, Tensor]:
    """The updates u, the new moments, and sums of squares [tensors, 2] of weights and updates, float64, of a LambGroup.
    On the CPU the moments are changed in place."""
    b1, b2 = group.betas
    weights, moments = group.masters, (group.exp_avgs, group.exp_avg_sqs)
    if scale.device.type != "cpu":
        moments = tuple([t.clone() for t in tensors] for tensors in moments)
    m, v = moments
    grads = torch._foreach_div([g.to(t.dtype) for g, t in zip(group.grads, m, strict=True)], _number(scale))
    # m += b3 g - (1 - b1) m, and v likewise: 0.999 in float32 would make v 1.3e-5 too large in the long run
    torch._foreach_lerp_(m, grads, 1 - b1)
    if not group.grad_averaging:
        torch._foreach_add_(m, grads, alpha=b1)
    torch._foreach_lerp_(v, torch._foreach_mul(grads, grads), 1 - b2)
    # u = m / (correction1 (sqrt(v / correction2) + eps)) + weight_decay p
    denominators, steps = torch._foreach_sqrt(v), [_number(step.double()) + 1 for step in group.steps]
    if group.bias_correction:
        first, second = [1 - b1**t for t in steps], [1 - b2**t for t in steps]
        torch._foreach_mul_(denominators, [a / b**0.5 for a, b in zip(first, second, strict=True)])
        torch._foreach_add_(denominators, [a * group.eps for a in first])
    else:
        torch._foreach_add_(denominators, group.eps)
    updates = torch._foreach_div(m, denominators)
    if group.weight_decay != 0:
        wide = [w.to(u.dtype) for w, u in zip(weights, updates, strict=True)]
        torch._foreach_add_(updates, wide, alpha=group.weight_decay)
    norms = [torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in ts]) for ts in (weights, updates)]
    return updates, moments, torch.stack(norms, dim=1).square()


def lamb_apply(group, updates: list[Tensor], moments: tuple, sums: Tensor, keep: Tensor | bool) -> None:
    """The rest of the step, from the sums over whole tensors: where `keep`, everything takes its new value."""
    weights = group.masters
    ratios = torch.where((sums == 0).any(1), 1.0, (sums[:, 0] / sums[:, 1]).sqrt())
    scales = _number(group.lr) * (ratios if group.adapts else torch.ones_like(ratios))
    torch._foreach_mul_(updates, [_number(scale) for scale in scales.unbind()])
    new = [w - u for w, u in zip(weights, updates, strict=True)]
    if keep is True:
        torch._foreach_copy_(weights, new)
        torch._foreach_add_(group.steps, 1)
    else:
        for old, values in zip((weights, group.exp_avgs, group.exp_avg_sqs), (new, *moments), strict=True):
            torch._foreach_copy_(old, [torch.where(keep, b, a) for a, b in zip(old, values, strict=True)])
        torch._foreach_add_(group.steps, keep.float())
    for p, w in zip(group.params, weights, strict=True):
        if w is not p:
            p.copy_(w)


def _number(x: Tensor | float) -> Tensor | float:
    """A number, where reading it does not mean waiting for a device."""
    return x.item() if isinstance(x, Tensor) and x.device.type == "cpu" else x
