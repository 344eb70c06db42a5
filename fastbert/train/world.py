"""The processes that train together, and the device of this one."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastbert.errors import ConfigError


@dataclass(frozen=True)
class World:
    """rank of size processes; rank 0 alone writes. Counts and flags are reduced on the CPU, so that no GPU is waited
    for.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def join(cls, device: str) -> Iterator["World"]:
        """The world that torchrun describes in the environment, or the process group that exists already, or one
        process alone.
        """
        resolved = resolve_device(device)
        owner = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
        if owner:
            dist.init_process_group("cpu:gloo,cuda:nccl" if resolved.type == "cuda" else "gloo")
        try:
            together = dist.is_initialized()
            yield cls(resolved, dist.get_rank() if together else 0, dist.get_world_size() if together else 1)
        finally:
            if owner:
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in double precision."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Largest values over all processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Returns once every process is here."""
        self.sum(0.0)

    def add(self, tensor: torch.Tensor) -> None:
        """Puts the sum over all processes in place of a tensor on the device: one exchange, after all else."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def align(self, tensors: Iterable[torch.Tensor]) -> None:
        """Puts the first process's values into tensors on the device: other processors may have drawn others."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def _reduce(self, values, operation) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()


def resolve_device(name: str) -> torch.device:
    """ "auto", or a device as torch writes it. Of several GPUs, a process takes the one of its local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, expected 'auto', 'cpu', 'cuda' or 'cuda:<number>'")
    if device.type == "cpu":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r} (GPU {index}), but torch sees {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
