"""Models of which every process has a part: FSDP2 (torch.distributed.fsdp.fully_shard), as TrainStep wants it."""

import warnings

import torch
from torch import Tensor, nn

from fastbert.nn import EncoderLayer
from fastbert.optim import is_sharded
from fastbert.train.world import World


def shard(model: nn.Module, world: World, dtype: torch.dtype | None, reduce_dtype: torch.dtype | None) -> None:
    """Shards weights, gradients and moments-to-be of a model over all processes, each layer by itself, in place.

    dtype: what the model runs in, gathered in it, beside weights in float32; reduce_dtype: what gradients are summed
    in, over micro-batches and over processes; None: float32. Gradients are sums, not means.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    # The losses are a view, which nothing here changes in place; a learning rate of one element has one dimension.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="Found a non-scalar tensor with numel=1")
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(dtype, reduce_dtype or torch.float32, cast_forward_inputs=False)
    for layer in [module for module in model.modules() if isinstance(module, EncoderLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no product with a sum


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, which all processes must ask for together if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
