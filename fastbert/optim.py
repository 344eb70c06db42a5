"""The LAMB optimizer, parameter groups and learning-rate schedules."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastbert.errors import CheckpointError, ConfigError, DtypeError
from fastbert.ops.lamb import LISTS, LambGroup, check_settings, run

SCHEDULES = ("linear", "poly", "nezha", "bert", "electra", "constant")
OPTIMIZERS = ("adamw", "lamb")
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


def main_gradients(parameters: Iterable[Tensor]) -> None:
    """Have 16-bit parameters keep their gradients in float32: from now on backward() adds to a float32 `.grad`, and a
    shared layer's buffer (fastbert.nn.Encoder) becomes it as it is, without a rounding.

    FusedLAMB reads such gradients directly, and GradScaler takes them, also those of fp16 parameters. Parameters of
    other dtypes are left alone: their gradients are not narrower than they are. What is asked for here is part of the
    parameter object: copies and loaded models have to be asked again. DistributedDataParallel, whose buckets have the
    parameters' dtype, refuses such gradients in backward(); there, train float32 parameters under autocast.

    Raises ConfigError if a parameter has a gradient already.
    """
    for parameter in parameters:
        if parameter.dtype in (torch.float16, torch.bfloat16):
            if parameter.grad is not None and parameter.grad.dtype != torch.float32:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} has a gradient in {parameter.grad.dtype}, expected "
                    "none: call zero_grad() before"
                )
            parameter.grad_dtype = torch.float32


def schedule(name: str, *, steps: int, warmup: float = 0, degree: float = 0.5) -> Callable[[int], float]:
    """factor(step): what the learning rate is multiplied by in the update that follows `step` completed ones.

    All but "electra" rise linearly from 0 to 1 over the warm-up of w steps; from there on, of T steps in all,
    "linear": falls linearly to 0 at T, as get_linear_schedule_with_warmup of transformers does;
    "nezha": the same curve, stated as NEZHA's code does: (1 - step/T) / (1 - w/T), without a jump at w;
    "poly": (1 - step/T)^degree, which falls from 1 to (1 - w/T)^degree at the switch (NVIDIA's BERT, degree 0.5);
    "bert": 1 - step/T, which falls from 1 to 1 - w/T at the switch (BERT's and ALBERT's code);
    "electra": min(1, step/w) (1 - step/T), the warm-up as a factor from the first step on (ELECTRA's code);
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
        left = max(0.0, 1 - step / steps)
        if name == "electra":
            return left * min(1.0, step / rise if rise else 1.0)
        if step < rise:
            return step / rise
        if name == "bert":
            return left
        if name == "constant" or rise == steps:
            return 1.0
        return left**degree if name == "poly" else left / (1 - rise / steps)

    return factor


class UncorrectedAdamW(torch.optim.AdamW):
    """AdamW without the correction of bias (Kingma and Ba 2015, arXiv 1412.6980, section 3), as BERT's and ELECTRA's
    code has it: with m and v the plain moments, p -= lr (m / (sqrt(v) + eps) + weight_decay p).

    State and step are those of torch.optim.AdamW in its fused form: in step t it divides m by 1 - b1^t and
    sqrt(v) by sqrt(1 - b2^t), which the learning rate lr (1 - b1^t) / sqrt(1 - b2^t) undoes, but for eps, which is
    smaller by the factor sqrt(1 - b2^t); the weights decay by lr itself, before. t is that of a group's first
    parameter, so all of a group must have a gradient from the first step on. Nothing waits for the device.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        capturable: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, capturable=capturable)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, or none where `found_inf` says so. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        given = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        try:
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                if parameters:
                    lr = torch.as_tensor(group["lr"], dtype=torch.float32, device=parameters[0].device).reshape(())
                    kept = 1 - lr * group["weight_decay"] * (1 if found_inf is None else 1 - found_inf)
                    torch._foreach_mul_(parameters, kept.reshape(()))
                    group["lr"], group["weight_decay"] = self._raised(lr, parameters[0], group["betas"]), 0.0
            step = torch.optim.AdamW.step
            (step.__wrapped__ if getattr(step, "hooked", False) else step)(
                self
            )  # hooks run around this step, not twice
        finally:
            for group, (lr, weight_decay) in zip(self.param_groups, given, strict=True):
                group["lr"], group["weight_decay"] = lr, weight_decay
        return loss

    def _raised(self, lr: Tensor, parameter: Tensor, betas: tuple[float, float]) -> Tensor:
        """The learning rate that undoes the correction in this step."""
        made = self.state[parameter]["step"] if self.state[parameter] else torch.zeros((), device=lr.device)
        step = made.double() + 1
        return (lr * (1 - betas[0] ** step) / (1 - betas[1] ** step).sqrt()).float()


class FusedLAMB(Optimizer):
    """LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2, as apex's FusedLAMB computes it) for fp32, fp16 and bf16
    parameters, all groups in one launch. Formulas: fastbert.reference.lamb.

    params: as for any torch.optim.Optimizer; `param_groups` makes the groups of BERT. Every setting but max_grad_norm
    can differ between groups. lr: a number, or a float32 tensor of one element.
    max_grad_norm: where the norm of all gradients of all groups is larger, they are scaled down to it; None: never.
    always_adapt: scale the step of tensors without weight decay by |p| / |u| too (NVLAMB).
    master_weights: "auto" keeps fp32 weights of fp16 and bf16 parameters, and each step writes both; False rounds the
    weights themselves, and steps smaller than half their spacing are lost. Moments are fp32 in either case.
    capturable: keep lr in a tensor on the device, so that a step captured in a CUDA graph follows the schedule. All
    else is on the device anyway and never waited for.
    backend: which twin of fastbert.ops.lamb runs; None: the first that can.

    A step in which any gradient is not finite changes nothing and is not counted. torch.amp.GradScaler drives it
    without synchronisation: scaler.step(optimizer) straight after backward(), for unscaling and clipping are done here.
    `grad_norm` holds the last norm of all gradients, before clipping, float64 on their device.
    DTensor parameters (FSDP2) are taken: norms are those of whole tensors. The flat parameters of the older
    FullyShardedDataParallel are not: nothing tells where a tensor ends in them.

    state_dict: step, exp_avg, exp_avg_sq and for a master `master` of each parameter. It can be loaded on any device;
    into parameters of another dtype, where fp32 parameters take the values of the masters; and from torch's Adam and
    AdamW, whose lr, betas, eps and weight_decay come along. Load the model's weights first.
    Raises ConfigError, DtypeError, CheckpointError and what fastbert.ops.lamb raises.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf as tensors
    _loading: dict | None = None  # the state dict that is being loaded, as the hooks before it left it

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        always_adapt: bool = False,
        master_weights: str | bool = "auto",
        capturable: bool = False,
        backend: str | None = None,
    ):
        if master_weights not in ("auto", False):
            raise ConfigError(f"master_weights is {master_weights!r}, expected 'auto' or False")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm is {max_grad_norm!r}, expected None or more than 0")
        self.master_weights, self.capturable, self.backend = master_weights, capturable, backend
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = {"bias_correction": bias_correction, "grad_averaging": grad_averaging, "always_adapt": always_adapt}
        super().__init__(params, settings | flags)

    def add_param_group(self, param_group: dict) -> None:
        """As torch.optim.Optimizer.add_param_group; ConfigError or DtypeError for what it cannot take."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        self._place_lr(self.param_groups[-1])

    def __getstate__(self) -> dict:
        own = ("master_weights", "capturable", "backend", "max_grad_norm", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step, or none if a gradient is not finite. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.grad_norm = run(
            list(self._lamb_groups()),
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            max_grad_norm=self.max_grad_norm,
            backend=self.backend,
        )
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the state, moments and masters in full precision whatever the dtype of the parameters."""
        self._loading = state_dict
        last = self.register_load_state_dict_pre_hook(lambda _, seen: setattr(self, "_loading", seen))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._loading = None

    def __setstate__(self, state: dict) -> None:
        """Called while a state is loaded, between the hooks, and by pickle."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # that another optimizer does not have
                group.setdefault(name, value)
            self._check_group(group)
            self._place_lr(group)
        if self._loading is None:
            return
        # The base class has cast moments to the dtype of their parameters: they are taken anew.
        saved = [index for group in self._loading["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, parameters, strict=True):
            if index in self._loading["state"]:
                self.state[p] = self._restored(p, self._loading["state"][index])

    def _lamb_groups(self) -> Iterator[LambGroup]:
        for group in self.param_groups:
            sharded: dict[tuple, list[tuple]] = {}
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise DtypeError(f"the gradient of {_name(group, i)} is sparse, expected a dense one")
                state, shards = self._state_of(p), ()
                tensors = [p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], state.get("master", p)]
                if is_sharded(p):
                    shards, tensors[1] = _shards(p), placed_as(grad, p)
                    tensors = [t.to_local() if is_sharded(t) else t for t in tensors]
                if tensors[1].stride() != tensors[0].stride():
                    tensors[1] = tensors[1].contiguous()
                sharded.setdefault(shards, []).append(tensors)
            fields = LambGroup.__dataclass_fields__.keys() - LISTS
            settings = {key: value for key, value in group.items() if key in fields}
            for shards, rows in sharded.items():
                lists = dict(zip(LISTS, map(list, zip(*rows, strict=True)), strict=True))
                yield LambGroup(**settings, **lists, shards=shards)

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            wide = torch.promote_types(p.dtype, torch.float32)
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        if self._has_master(p) != ("master" in state):  # new, or of another dtype than before
            if self._has_master(p):
                state["master"] = p.detach().to(torch.float32, copy=True)
            else:
                del state["master"]
        return state

    def _restored(self, p: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        if missing := {"step", "exp_avg", "exp_avg_sq"} - saved.keys():
            raise CheckpointError(f"state_dict: {min(missing)!r} of a parameter is missing, got {sorted(saved)}")
        wide = torch.promote_types(p.dtype, torch.float32)
        names = [name for name in ("exp_avg", "exp_avg_sq", "master") if name in saved]
        state = {name: saved[name].detach().to(p.device, wide, copy=True) for name in names}
        for name, t in state.items():
            if t.shape != p.shape:
                raise CheckpointError(f"state_dict: {name} has shape {tuple(t.shape)}, expected {tuple(p.shape)}")
            state[name] = placed_as(t, p)
        step = torch.as_tensor(saved["step"], dtype=torch.float32).detach()
        state["step"] = step.to(p.device, copy=True).reshape(())
        if not self._has_master(p) and "master" in state:
            master = state.pop("master")
            if p.dtype == wide:
                with torch.no_grad():
                    p.copy_(master)
        elif self._has_master(p) and "master" not in state:
            state["master"] = p.detach().to(wide, copy=True)
        return state

    def _has_master(self, p: Tensor) -> bool:
        return self.master_weights == "auto" and p.dtype in (torch.float16, torch.bfloat16)

    def _place_lr(self, group: dict) -> None:
        if not group["params"]:
            return
        device, lr = group["params"][0].device, group["lr"]
        if self.capturable and not isinstance(lr, Tensor):
            lr = torch.tensor(float(lr), dtype=torch.float32)
        if isinstance(lr, Tensor) and (self.capturable or lr.device.type != "cpu"):
            group["lr"] = lr.to(device)

    def _check_group(self, group: dict) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.dtype != torch.float32):
            raise ConfigError(f"lr is a {lr.dtype} tensor of shape {tuple(lr.shape)}, expected one float32")
        if not isinstance(lr, Tensor) and not lr >= 0:
            raise ConfigError(f"lr is {lr!r}, expected at least 0")
        check_settings(group["betas"], group["eps"], group["weight_decay"])
        every = [p for each in self.param_groups for p in each["params"]]
        if len(devices := dict.fromkeys(p.device for p in every)) > 1:
            names = ", ".join(map(str, devices))
            raise ConfigError(
                f"the parameters are on several devices ({names}), expected one: make an optimizer of each"
            )
        for i, p in enumerate(group["params"]):
            if not p.is_floating_point():
                raise DtypeError(f"{_name(group, i)} is {p.dtype}, expected a floating dtype")


def _name(group: dict, index: int) -> str:
    if "param_names" in group:
        return group["param_names"][index]
    return f"parameter {index} of a group, of shape {tuple(group['params'][index].shape)},"


def is_sharded(t: Tensor) -> bool:
    """Whether it is a DTensor, of which each process has a part."""
    return hasattr(t, "to_local")  # asked so, because importing the class takes longer than importing fastbert


def placed_as(t: Tensor, p: Tensor) -> Tensor:
    """A gradient or a saved state that lies as its parameter does: tensor parallelism leaves sums that nobody has added
    yet, and a whole tensor may be loaded for a sharded parameter."""
    if not is_sharded(p):
        return t
    if not is_sharded(t):
        from torch.distributed.tensor import distribute_tensor  # what is not sharded need not import it

        return distribute_tensor(t, p.device_mesh, p.placements)
    return t if t.placements == p.placements else t.redistribute(placements=p.placements)


def _shards(p: Tensor) -> tuple:
    """The process groups over which a DTensor is sharded."""
    mesh = p.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(p.placements) if not placement.is_replicate())
