"""Updates that stand out from those before them, found and left out on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

WINDOW = 128  # updates
_LEAST = 64  # updates in the window before any is judged


class Spike(NamedTuple):
    """An update whose loss or norm of gradients stood out."""

    update: int
    loss: float
    grad_norm: float
    usual_loss: float
    usual_grad_norm: float


class Spikes:
    """Judges each update by the loss and the norm of the gradients: it spikes where one of them is more than `sigmas`
    standard deviations above the mean of the last WINDOW updates, as in the skip-step optimizers of OLMo-core. What
    spikes counts in the window too: a level that stays becomes the usual one.

    action: "skip": such an update is not made, as one whose gradients overflow; "stop": nothing is made from then on.
    """

    def __init__(self, action: str, sigmas: float, device: torch.device):
        self.action, self.sigmas = action, sigmas
        self.recent = torch.zeros(2, WINDOW, dtype=torch.float64, device=device)  # losses and norms
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.found = torch.zeros(WINDOW, len(Spike._fields), dtype=torch.float64, device=device)
        self.spiked = torch.zeros(1, dtype=torch.int64, device=device)  # how many so far
        self.skips = torch.zeros(1, dtype=torch.bool, device=device)  # whether this update is one that is left out
        self._places = torch.arange(WINDOW, device=device)
        self._told = 0

    def judge(self, update: Tensor, loss: Tensor, norm: Tensor, halted: Tensor) -> Tensor:
        """Whether this update spikes, `[1]`. One that is not finite does not, nor does it count, nor does any once
        updates are `halted`.
        """
        now = torch.stack([loss, norm.double()])
        known = (self._places < self.count).double()
        total = known.sum().clamp(min=1)
        mean = (self.recent * known).sum(1) / total
        spread = (((self.recent - mean[:, None]) * known).square().sum(1) / (total - 1).clamp(min=1)).sqrt()
        judged = now.isfinite().all() & ~halted
        spiked = (now > mean + self.sigmas * spread).any() & (self.count >= _LEAST) & judged
        counts = judged & ~spiked if self.action == "stop" else judged  # what stops a run comes again when it goes on
        place = self._places == self.count % WINDOW
        self.recent.copy_(torch.where(place & counts, now[:, None], self.recent))
        self.count += counts
        row = torch.cat([update.double(), now, mean])
        at = self._places == self.spiked % WINDOW
        self.found.copy_(torch.where((at & spiked)[:, None], row, self.found))
        self.spiked += spiked
        self.skips.copy_(spiked)
        return spiked

    def look(self) -> list[Spike]:
        """Those since the last look, the last WINDOW of them at most: waits for the device."""
        spiked = int(self.spiked)
        rows = self.found.tolist()
        new = [rows[i % WINDOW] for i in range(max(self._told, spiked - WINDOW), spiked)]
        self._told = spiked
        return [Spike(int(update), *figures) for update, *figures in new]

    def state(self) -> dict:
        return {"recent": self.recent.tolist(), "count": int(self.count)}

    def load(self, state: dict) -> None:
        self.recent.copy_(torch.tensor(state["recent"], dtype=torch.float64))
        self.count.fill_(state["count"])


def describe(spike: Spike, sigmas: float) -> str:
    """What is told of one."""
    usual = f"usual are {spike.usual_loss:.4g} and {spike.usual_grad_norm:.4g}"
    return (
        f"loss {spike.loss:.4g} and gradient norm {spike.grad_norm:.4g} of update {spike.update} stand out by more "
        f"than {sigmas:g} standard deviations ({usual})"
    )
