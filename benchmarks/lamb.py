"""`lamb`: one step over all parameters of a model, in two groups: those that are decayed, and biases and norms.

A step is all that a user's step does: the norm of all gradients, the check that it is finite, clipping, moments, trust
ratios, update, and for 16-bit parameters the copy of the float32 masters. dtype: of parameters and gradients.

Floors: 28 bytes a parameter. fp32: gradient, parameter and both moments in (16), parameter and moments out (12). fp16
and bf16: gradient in (2), master and moments in and out (24), parameter out (2). The norm reads the gradients before
that, 4 bytes or 2, of which a cache may hold what is read again. What is too large to stay on chip until the trust
ratio is there costs 40: weight and moments are read once more.

eager is reference.lamb, foreach the same of PyTorch's multi-tensor operations; neither waits for a GPU. The other peers
compute something else: AdamW needs no trust ratio, and without -clipped neither it nor pytorch-optimizer's LAMB takes
the norm of all gradients. Of 16-bit parameters these peers step the masters, with the gradients cast before and the
parameters written after: none of them has masters of its own.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial

import torch
from torch import Tensor

import fastbert
from fastbert import reference
from fastbert.optim import FusedLAMB, param_groups
from fastbert.testing import Mismatch, compare

from .ceilings import DTYPES, Work
from .clocks import Step
from .harness import Benchmark, Case, Missing, Provider
from .op import compiled, generator_on, imported

LR, BETAS, EPS, MAX_NORM = 6e-3, (0.9, 0.999), 1e-6, 1.0
DECAYS = 0.01, 0.0  # of the two groups
DONE = 9  # steps before the one that is measured
BYTES_PER_PARAMETER = 28
COMPILED = 50  # tensors
Groups = list[list[Tensor]]


class LambBenchmark(Benchmark):
    op = "lamb"
    modes = ("step",)
    tiny = {"preset": "albert-tiny-chinese"}

    def shapes(self, cuda: bool) -> list[dict]:
        gpu = ["bert-base-chinese", "albert-base-v2", "bert-large-uncased"]
        return [{"preset": preset} for preset in (gpu if cuda else ["albert-base-v2", "electra-base-generator"])]

    def inputs(self, case: Case, seed: int) -> dict[str, Groups]:
        return make_lists(sizes(case["preset"]), case, seed)

    def providers(self, case: Case) -> list[Provider]:
        """Each makes a function of the inputs that returns the step."""
        fastbert.EncoderConfig.from_preset(case["preset"])  # ConfigError if there is none
        ours = [Provider(f"fastbert-{name}", partial(_ours, name)) for name in ("cuda", "torch")]
        other = {"comparable": False, "checked": False}
        pytorch_optimizer = {"package": "pytorch-optimizer", **other}
        peers = [
            Provider("foreach", lambda case: partial(partial, foreach)),
            Provider("adamw-fused", _adamw, **other),
            Provider("adamw-fused-clipped", partial(_adamw, clipped=True), **other),
            Provider("timm-lamb", _timm, package="timm", **other),
            Provider("pytorch-optimizer-lamb", _pytorch_optimizer, **pytorch_optimizer),
            Provider("pytorch-optimizer-clipped", partial(_pytorch_optimizer, clipped=True), **pytorch_optimizer),
            Provider("eager", lambda case: partial(partial, composed)),
            Provider("compiled", _compiled),
        ]
        return [*ours, *peers]

    def check(self, provider: Provider, op: Callable, case: Case) -> str:
        """compare() on copies; on a CPU without the tensors of a million elements and more."""
        shapes = [[s for s in group if case.cuda or s.numel() < 10**6] for group in sizes(case["preset"])]
        lists = make_lists(shapes, case, seed=1)
        wide = {name: lists[name] for name in ("masters", "exp_avgs", "exp_avg_sqs")}
        wide["grads"] = _in_dtype(lists["grads"], torch.float32)
        rows = compare(partial(_stepped, op, DTYPES[case.dtype]), _truth, wide, poison=provider.ours)
        _check_refusal(op, lists)
        return f"{len(rows)} tensors: at most {max(row.error / row.bound for row in rows):.2f} of the bound"

    def step(self, op: Callable, inputs: dict[str, Groups], mode: str) -> Step:
        return torch.no_grad()(op(**inputs))

    def work(self, case: Case, mode: str) -> Work:
        return Work(bytes=BYTES_PER_PARAMETER * parameters(case))

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        return {"parameters_per_s": 1e6 * parameters(case) / p50_us}


@cache
def sizes(preset: str) -> list[list[torch.Size]]:
    """The shapes of the parameters of a preset's masked-language model, in the two groups of an optimizer."""
    config = fastbert.EncoderConfig.from_preset(preset)
    with torch.device("meta"):
        model = fastbert.model_class(config.model_type, "masked_lm")(config)
    return [[parameter.shape for parameter in group["params"]] for group in param_groups(model, DECAYS[0])]


def parameters(case: Case) -> int:
    return sum(size.numel() for group in sizes(case["preset"]) for size in group)


def make_lists(shapes: list[list[torch.Size]], case: Case, seed: int) -> dict[str, Groups]:
    """What a run in its tenth step would have, with gradients of twice the largest norm; weights of size 1, so that
    their decay counts. masters: the parameters themselves in fp32."""
    generator, dtype = generator_on(case.device, seed), DTYPES[case.dtype]
    size = _clipped_size(shapes)

    def normal(scale: float) -> Groups:
        draw = partial(torch.randn, generator=generator, device=case.device)
        return [[draw(s).mul_(scale) for s in group] for group in shapes]

    masters = normal(1.0)
    return {
        "params": _in_dtype(masters, dtype),
        "grads": _in_dtype(normal(2 * size), dtype),
        "exp_avgs": normal(0.6 * size),
        "exp_avg_sqs": _map(lambda v: v.square_().add_(1e-3 * size**2), normal(0.1 * size)),
        "steps": _map(lambda w: w.new_full((), DONE), masters),
        "masters": masters,
    }


def _in_dtype(groups: Groups, dtype: torch.dtype) -> Groups:
    """The same tensors, where they are in this dtype."""
    return _map(lambda t: t.to(dtype), groups)


def _clipped_size(groups: Groups | list[list[torch.Size]]) -> float:
    """The root of the mean square of gradients whose norm is MAX_NORM."""
    return MAX_NORM / sum(each.numel() for group in groups for each in group) ** 0.5


def _flat(groups: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    return [t for group in groups for t in group]


def _map(function: Callable[[Tensor], Tensor], groups: Groups) -> Groups:
    return [[function(t) for t in group] for group in groups]


# ---------------------------------------------------------------- checks


def _stepped(op: Callable, dtype: torch.dtype, masters: Groups, grads: Groups, **moments: Groups) -> tuple:
    """What a step makes of copies. The parameters beside masters, and the numbers of steps, can only be one thing."""
    masters, exp_avgs, exp_avg_sqs = (_map(Tensor.clone, groups) for groups in (masters, *moments.values()))
    lists = {"masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {"params": _in_dtype(masters, dtype), "grads": _in_dtype(grads, dtype)}
    lists["steps"] = _map(lambda w: w.new_full((), DONE), masters)
    op(**lists)()
    if not all(map(torch.equal, _flat(lists["params"]), _flat(_in_dtype(masters, dtype)))):
        raise Mismatch("params: expected the masters, rounded")
    if any(step.item() != DONE + 1 for step in _flat(lists["steps"])):
        raise Mismatch(f"steps: expected {DONE + 1} for every tensor")
    return _in_units(masters, exp_avgs, exp_avg_sqs)


def _truth(masters: Groups, grads: Groups, exp_avgs: Groups, exp_avg_sqs: Groups) -> tuple:
    divisor, _ = reference.lamb_scale(_flat(grads), 1.0, MAX_NORM)
    groups = zip(masters, grads, exp_avgs, exp_avg_sqs, DECAYS, strict=True)
    results = [reference.lamb(*lists, step=DONE + 1, grad_scale=divisor, **_settings(d)) for *lists, d in groups]
    return _in_units(*zip(*results, strict=True))


def _in_units(masters: Groups, exp_avgs: Groups, exp_avg_sqs: Groups) -> tuple:
    """All of size 1, of which compare() takes what rounding moves for no error."""
    size = _clipped_size(masters)
    return masters, _map(lambda m: m / size, exp_avgs), _map(lambda v: v / (0.01 * size**2), exp_avg_sqs)


def _check_refusal(op: Callable, lists: dict[str, Groups]) -> None:
    """A step with a gradient that is not finite changes nothing."""
    _flat(lists["grads"])[-1].view(-1)[-1] = float("inf")
    changing = [t for name, groups in lists.items() if name != "grads" for t in _flat(groups)]
    before = [t.clone() for t in changing]
    op(**lists)()
    if not all(map(torch.equal, before, changing)):
        raise Mismatch("a step with an infinite gradient changed something")


# ---------------------------------------------------------------- providers: a function of the lists returns the step


def _settings(weight_decay: float) -> dict:
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}


def _ours(backend: str, case: Case) -> Callable:
    def start(**lists: Groups) -> Step:
        groups = [{"params": params, **_settings(decay)} for params, decay in zip(lists["params"], DECAYS, strict=True)]
        optimizer = FusedLAMB(groups, max_grad_norm=MAX_NORM, capturable=case.cuda, backend=backend)
        names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "masters")
        for p, g, m, v, step, master in zip(*(_flat(lists[name]) for name in names), strict=True):
            p.grad = g
            masters = {} if master is p else {"master": master}
            optimizer.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v, **masters}
        return optimizer.step

    return start


def composed(*, params, grads, exp_avgs, exp_avg_sqs, steps, masters) -> None:
    """A step of reference.lamb, tensor by tensor."""
    norm, keep = _norm(_flat(grads))
    waits = norm.device.type == "cpu"
    if waits and not keep:
        return
    for i, decay in enumerate(DECAYS):
        old = masters[i], exp_avgs[i], exp_avg_sqs[i]
        at = {"step": steps[i][0].double() + 1, "grad_scale": (norm / MAX_NORM).clamp(min=1.0)}
        new = reference.lamb(masters[i], grads[i], exp_avgs[i], exp_avg_sqs[i], **at, **_settings(decay))
        for t, value in zip(_flat(old), _flat(new), strict=True):
            t.copy_(value if waits else torch.where(keep, value, t))
        for step in steps[i]:
            step.add_(keep)
        for p, w in zip(params[i], masters[i], strict=True):
            if p is not w:
                p.copy_(w)


def foreach(*, params, grads, exp_avgs, exp_avg_sqs, steps, masters) -> None:
    """The same of PyTorch's multi-tensor operations. A step that is not made has gradients 0, decays nothing and
    has a learning rate of 0."""
    norm, keep = _norm(_flat(grads))
    divisor = (norm / MAX_NORM).clamp(min=1.0).float()
    beta1, beta2 = (torch.where(keep, beta, 1.0) for beta in BETAS)
    for p, g, m, v, step, w, decay in zip(params, grads, exp_avgs, exp_avg_sqs, steps, masters, DECAYS, strict=True):
        g = [torch.where(keep, t.float() / divisor, 0.0) for t in g]
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, g, alpha=1 - BETAS[0])
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - BETAS[1])
        torch._foreach_add_(step, keep.float())
        correction1, correction2 = (1 - beta ** step[0].double() for beta in BETAS)
        u = torch._foreach_div(v, correction2)
        torch._foreach_sqrt_(u)
        torch._foreach_add_(u, EPS)
        torch._foreach_mul_(u, correction1)
        u = torch._foreach_div(m, u)
        rate = -LR * keep
        if decay:
            torch._foreach_add_(u, w, alpha=decay)
            sums = [torch.stack(torch._foreach_norm(ts, 2, torch.float64)) for ts in (w, u)]
            rate = rate * torch.where((sums[0] == 0) | (sums[1] == 0), 1.0, sums[0] / sums[1])
            torch._foreach_mul_(u, list(rate.float().unbind()))
        else:
            torch._foreach_mul_(u, rate)
        torch._foreach_add_(w, u)
        if p[0] is not w[0]:
            torch._foreach_copy_(p, w)


def _norm(grads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The norm of all gradients, in float64, and whether it is finite."""
    norm = torch.stack(torch._foreach_norm(grads, 2, torch.float64)).norm()
    return norm, norm.isfinite()


def _compiled(case: Case) -> Callable:
    count = sum(map(len, sizes(case["preset"])))
    if count > COMPILED:
        raise Missing(f"torch.compile takes minutes for {count} tensors; it is tried with up to {COMPILED}")
    return partial(partial, compiled(composed))


def _optimizer(build: Callable, before: Callable, *, params, grads, masters, **_moments) -> Step:
    """A step of a peer, which keeps moments of its own; `before` gets the gradients and the optimizer."""
    narrow = params[0][0] is not masters[0][0]
    wide = _in_dtype(grads, torch.float32)
    for w, g in zip(_flat(masters), _flat(wide), strict=True):
        w.grad = g
    groups = [{"params": group, "weight_decay": decay} for group, decay in zip(masters, DECAYS, strict=True)]
    optimizer = build(groups, lr=LR, betas=BETAS, eps=EPS)
    grads, wide, params, masters = map(_flat, (grads, wide, params, masters))

    def step() -> None:
        if narrow:
            torch._foreach_copy_(wide, grads)
        before(wide, optimizer)
        optimizer.step()
        if narrow:
            torch._foreach_copy_(params, masters)

    return step


def _nothing(grads: list[Tensor], optimizer) -> None:
    return


def _clip(grads: list[Tensor], optimizer) -> None:
    """AdamW skips a step whose norm is not finite, as GradScaler tells it to."""
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
    torch._foreach_mul_(grads, (MAX_NORM / (norm + EPS)).clamp(max=1.0))


def _adamw(case: Case, clipped: bool = False) -> Callable:
    """capturable: so that its steps can be CUDA graphs, as the others' are."""
    adamw = partial(torch.optim.AdamW, fused=True, capturable=case.cuda)
    return partial(_optimizer, adamw, _clip if clipped else _nothing)


def _timm(case: Case) -> Callable:
    """It clips to 1 by itself."""
    return partial(_optimizer, imported("timm.optim.lamb", "Lamb", "timm"), _nothing)


def _pytorch_optimizer(case: Case, clipped: bool = False) -> Callable:
    """It can clip to 1 by itself, and as it comes does not."""
    lamb = imported("pytorch_optimizer", "Lamb", "pytorch-optimizer")
    return partial(_optimizer, partial(lamb, pre_norm=clipped), _nothing)


BENCHMARK = LambBenchmark()
