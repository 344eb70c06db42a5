"""Forward and backward of whole models on the CPU: fastbert against transformers, same process, weights and threads.

    python -m benchmarks.encoder_cpu              # all cases; transformers 5: all families but NEZHA; 4.40.2: NEZHA
    python -m benchmarks.encoder_cpu --families bert --dropout 0 --rounds 5
    python -m benchmarks.encoder_cpu --families albert --padding 0 --profile

A case is a family, a part (masked_lm: labels on 15 % of the tokens; encoder: no head), a dropout (0 or 0.1) and a
share of padding. Before it is timed, its outputs and the norm of its gradient must agree with transformers (without
dropout). The providers take turns. A ratio compares medians of one run:

    ratio = median of the fastest transformers provider / median of this provider      (above 1: faster)

`fastbert` is what `fastbert pretrain` runs: the vocabulary is computed for labelled tokens only. `fastbert-logits`
returns the logits of all tokens, as transformers does. transformers runs eager and, where it has it, SDPA.
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

import fastbert
from benchmarks.harness import environment, percentiles, time_interleaved, write_rows

FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "albert": "Albert",
    "electra": "Electra",
    "roformer": "RoFormer",
    "nezha": "Nezha",
}


@dataclass(frozen=True)
class Case:
    """What is compared with what."""

    family: str
    part: str
    dropout: float
    padding: float

    def __str__(self) -> str:
        return f"{self.family:9}{self.part:10} dropout {self.dropout:<4g} padding {self.padding:4.0%}"


def transformers_config(case: Case, arguments: argparse.Namespace) -> dict:
    """The transformers config of a case; fields that are not the shape's have the family's usual values."""
    config = {
        "vocab_size": arguments.vocab,
        "hidden_size": arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.heads,
        "intermediate_size": 4 * arguments.hidden,
        "max_position_embeddings": arguments.length + 2,  # RoBERTa's positions begin at 2
        "hidden_dropout_prob": case.dropout,
        "attention_probs_dropout_prob": case.dropout,
        "hidden_act": "gelu",
    }
    if case.family == "roberta":
        config |= {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    if case.family in ("albert", "electra"):
        config["embedding_size"] = 128
    if case.family == "albert":
        config["hidden_act"] = "gelu_new"
    if case.family == "nezha":
        config["max_relative_position"] = 64
    return config


def build(case: Case, arguments: argparse.Namespace) -> tuple[dict[str, nn.Module], nn.Module]:
    """({provider: transformers model}, fastbert model): one set of random weights."""
    import transformers

    name = FAMILIES[case.family] + ("ForMaskedLM" if case.part == "masked_lm" else "Model")
    model_class = getattr(transformers, name)

    def make(attention: str) -> nn.Module:
        config = model_class.config_class(**transformers_config(case, arguments))  # its own: the choice is kept in it
        return model_class._from_config(config, attn_implementation=attention)

    eager = make("eager")
    theirs = {"transformers-eager": eager}
    if getattr(model_class, "_supports_sdpa", False):
        theirs["transformers-sdpa"] = make("sdpa")
        theirs["transformers-sdpa"].load_state_dict(eager.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        eager.save_pretrained(folder)
        ours = getattr(fastbert, name).from_pretrained(folder)
    for model in (*theirs.values(), ours):
        model.train(case.dropout > 0)
    return theirs, ours


def make_batch(case: Case, arguments: argparse.Namespace) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (15 % of the real tokens).

    With padding, lengths are spread evenly around their mean, at 50 % padding from 1/2 to 3/2 of it.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.length)
    mean, spread = (1 - case.padding) * arguments.length, min(0.5, case.padding / (1 - case.padding))
    lengths = torch.linspace(1 + spread, 1 - spread, arguments.batch).mul(mean).round()
    real = torch.arange(arguments.length) < lengths[:, None]
    ids = torch.randint(5, arguments.vocab, shape, generator=generator).where(
        real, 1 if case.family == "roberta" else 0
    )
    labels = ids.where(real & (torch.rand(shape, generator=generator) < 0.15), -100)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}


def make_step(model: nn.Module, case: Case, batch: dict[str, Tensor], **options: bool) -> Callable[[], Tensor]:
    """A function that runs forward and backward once and returns the loss.

    The encoder's loss is a fixed random projection of its last hidden state.
    """
    batch = dict(batch)
    if case.part == "encoder":
        del batch["labels"]
        generator = torch.Generator().manual_seed(1)
        probe = (
            torch.randn(*batch["input_ids"].shape, model.config.hidden_size, generator=generator)
            * batch["attention_mask"][..., None]
        )

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        output = model(**batch, **options)
        loss = output.loss if case.part == "masked_lm" else (output.last_hidden_state * probe).sum()
        loss.backward()
        return loss.detach()

    return step


def gradient_norm(model: nn.Module) -> float:
    """The 2-norm of all gradients together; a tied tensor counts once."""
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))


def check(case: Case, theirs: dict[str, nn.Module], ours: nn.Module, batch: dict[str, Tensor]) -> None:
    """Stop unless loss, outputs at real positions and the norm of the gradient agree in float32, without dropout."""
    real = batch["attention_mask"].bool()
    found = {}
    for provider, model in (("fastbert", ours), *theirs.items()):
        model.eval()
        loss = make_step(model, case, batch)()
        with torch.no_grad():
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        found[provider] = (output[0][real], loss, torch.tensor(gradient_norm(model)))
        model.train(case.dropout > 0)
    for provider in theirs:
        for what, got, want in zip(
            ("output", "loss", "gradient norm"), found["fastbert"], found[provider], strict=True
        ):
            error, size = (got - want).abs().max().item(), want.abs().max().item()
            if not error <= 1e-4 * size:
                raise SystemExit(f"{case}: {what} differs from {provider} by {error:.2e}, of {size:.2e}; not timed")


def measure(case: Case, arguments: argparse.Namespace) -> list[dict]:
    """Check and time one case; print its lines; return its rows."""
    torch.manual_seed(0)
    theirs, ours = build(case, arguments)
    batch = make_batch(case, arguments)
    check(case, theirs, ours, batch)
    steps = {"fastbert": make_step(ours, case, batch)}
    if case.part == "masked_lm":
        steps = {
            "fastbert": make_step(ours, case, batch, return_logits=False),
            "fastbert-logits": make_step(ours, case, batch),
        }
    steps |= {provider: make_step(model, case, batch) for provider, model in theirs.items()}
    if arguments.profile:
        profile(case, steps)
        return []
    found = {provider: percentiles(times) for provider, times in time_interleaved(steps, arguments.rounds).items()}
    fastest = min(found[provider]["p50_ms"] for provider in theirs)
    rows = []
    for provider, timing in found.items():
        ratio = fastest / timing["p50_ms"]
        print(
            f"{case}  {provider:19}{timing['p20_ms']:9.1f}{timing['p50_ms']:9.1f}{timing['p80_ms']:9.1f}{ratio:8.2f}",
            flush=True,
        )
        shape = {name: getattr(arguments, name) for name in ("batch", "length", "layers", "hidden", "heads", "vocab")}
        mode = {
            "dropout": case.dropout,
            "padding": case.padding,
            "direction": "forward+backward",
            "rounds": arguments.rounds,
        }
        numbers = {name: round(value, 3) for name, value in (*timing.items(), ("ratio", ratio))}
        rows.append(
            {
                "benchmark": "encoder_cpu",
                "model": case.family,
                "part": case.part,
                "provider": provider,
                "dtype": "float32",
            }
            | shape
            | mode
            | numbers
        )
    return [row | environment() for row in rows]


def profile(case: Case, steps: dict[str, Callable[[], Tensor]]) -> None:
    """Print where each provider's time goes, three steps together."""
    for provider, step in steps.items():
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(3):
                step()
        print(f"\n{case} {provider}")
        print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=60))


def parse_arguments() -> argparse.Namespace:
    """The command line; the families depend on the transformers that is installed."""
    import transformers

    offered = [family for family, name in FAMILIES.items() if hasattr(transformers, f"{name}ForMaskedLM")]
    default = (
        ["nezha"] if "nezha" in offered else offered
    )  # the release with NEZHA is old: the others are compared with the new one
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--families",
        nargs="+",
        choices=offered,
        default=default,
        help=f"default: {' '.join(default)} (transformers {transformers.__version__})",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=["masked_lm", "encoder"], default=["masked_lm", "encoder"], help="default: both"
    )
    parser.add_argument(
        "--dropout",
        nargs="+",
        type=float,
        default=[0.0, 0.1],
        help="default: 0 0.1; 0 is evaluation mode with gradients",
    )
    parser.add_argument(
        "--padding",
        nargs="+",
        type=float,
        default=[0.0, 0.5],
        help="shares of padded positions, each below 1; default: 0 0.5",
    )
    for name, value in {
        "batch": 2,
        "length": 512,
        "layers": 4,
        "hidden": 384,
        "heads": 6,
        "vocab": 21128,
        "threads": 2,
        "rounds": 15,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead of timing")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/cpu.jsonl")
    return parser.parse_args()


def main() -> None:
    """Run the cases that the command line names."""
    from transformers.utils import logging

    arguments = parse_arguments()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    if not arguments.profile:
        print(f"{'case':48}{'provider':19}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'ratio':>8}")
    for case in map(
        Case, *zip(*product(arguments.families, arguments.parts, arguments.dropout, arguments.padding), strict=True)
    ):
        rows = measure(case, arguments)
        if arguments.write and rows:
            write_rows(rows, "cpu.jsonl")


if __name__ == "__main__":
    main()
