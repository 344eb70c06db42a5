"""Updates of the models with several losses as CUDA graphs: the same as without, and nothing waits."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_pretraining_models import CPU, TWO_HEADS, build, micro
from test_train_step import Again

from fastbert.optim import UncorrectedAdamW, param_groups
from fastbert.train.feed import Buckets
from fastbert.train.step import TrainStep
from fastbert.train.world import World

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread")]


@contextmanager
def no_waiting():
    """Any wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def updates(family, replayed=None, device=CPU, **options):
    """Parameters after updates of filled batches, with dropout, by AdamW without bias correction."""
    model = build(family, dropout=True, hidden_dropout_prob=0.1).float().to(device).train()
    optimizer = UncorrectedAdamW(param_groups(model, 0.1), capturable=device.type == "cuda")
    step = TrainStep(model, optimizer, lambda _: 1e-3, world=World(device), **options)
    step._graphs = replayed or step._graphs
    buckets = Buckets(5, 14, 0.5, pad_id=0)
    batches = [buckets.fill(micro(family, lengths, 0)) for lengths in ([6, 9, 4, 5], [3, 14], [8, 8, 8])]
    if device.type == "cuda":
        batches = [b._replace(inputs={name: t.pin_memory() for name, t in b.inputs.items()}) for b in batches]
    for update in range(3):
        with no_waiting() if update and device.type == "cuda" else nullcontext():
            for number, each in enumerate(batches):
                step.accumulate(each, 99, 10 * update + number, samples=9, tokens=99)
            step.apply()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("family", [*TWO_HEADS, "electra"])
def test_replaying_the_same_memory_is_the_same(family):
    """What is dropped and what a generator says is drawn anew from each seed."""
    again = Again(CPU)
    found, expected = updates(family, again), updates(family)
    assert again.replayed > 5 and all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", [*TWO_HEADS, "electra"])
def test_captured_is_the_same_and_nothing_waits(family, dtype):
    device = torch.device("cuda")
    found, expected = (updates(family, device=device, dtype=dtype, graphs=graphs) for graphs in (True, False))
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
