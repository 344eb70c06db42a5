"""Whole models, fastbert against transformers: forward, forward and backward, and a training step with AdamW.

Shapes: a `family`, a `part` (masked_lm: labels on 15 % of the tokens; encoder: no head), B sequences of at most L
tokens, of which `fill` is the mean share (spread evenly between L and (2 fill - 1) L), and the sizes of the model.
`fastbert` returns the logits of all tokens, as transformers does. `fastbert-labelled` computes what `fastbert pretrain`
does: the vocabulary and the last layer for labelled tokens only, which is less, so its time is nobody's rival. In 16
bits both train under autocast, parameters in float32; the step of `fastbert pretrain` itself: train.py.

Before anything is timed, outputs, the loss of the head, the gradient of the word table and the norm of all gradients
are held to transformers' eager model in float64: their error may be twice that of the same model in the dtype that is
measured, plus the slack of fastbert.testing. NEZHA needs transformers 4.40.2, the last release that had it.
"""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

import fastbert
from fastbert.errors import ConfigError
from fastbert.testing import FLOOR, Comparison, Mismatch

from .attention import lengths
from .ceilings import DTYPES, Work
from .clocks import Step
from .harness import Benchmark, Case, Missing, Provider
from .op import compiled

NAMES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "albert": "Albert",
    "electra": "Electra",
    "roformer": "RoFormer",
    "nezha": "Nezha",
}
LABELLED = 0.15
LABELLED_ONLY = {"return_logits": False}
CPU_SIZES = {"layers": 4, "hidden": 384, "heads": 6, "vocab": 21128}
BASE = {"layers": 12, "hidden": 768, "heads": 12, "vocab": 21128}
LARGE = {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 30522}


@dataclass(eq=False)
class Runnable:
    """A model and how it is called; its optimizer is made when it is first asked for."""

    model: nn.Module
    case: Case
    options: dict = field(default_factory=dict)
    call: Callable | None = None  # the model, compiled perhaps
    called: Callable | None = None  # what users call, if that is something else again

    def __post_init__(self):
        self.call = self.call or self.model
        self.model.train(self.case["dropout"] > 0)

    def output(self, batch: dict):
        dtype = DTYPES[self.case.dtype]
        kind = "cuda" if self.case.cuda else "cpu"
        narrow = dtype.itemsize == 2 and next(self.model.parameters()).dtype == torch.float32
        with torch.autocast(kind, dtype) if narrow else contextlib.nullcontext():
            return self.call(**batch, **self.options)

    def loss(self, inputs: dict) -> Tensor:
        output = self.output(self.batch(inputs))
        return (output.last_hidden_state * inputs["probe"]).sum() if self.case["part"] == "encoder" else output.loss

    def batch(self, inputs: dict) -> dict:
        """What the model takes of the inputs."""
        besides = ("probe", "labels") if self.case["part"] == "encoder" else ("probe",)
        return {name: t for name, t in inputs.items() if name not in besides}

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)


class ModelBenchmark(Benchmark):
    op = "model"
    modes = ("fwd", "fwd+bwd", "step")
    tiny = {"L": 32, "layers": 1, "hidden": 64, "heads": 2, "vocab": 200}
    graph = False  # as users run them

    def shapes(self, cuda: bool) -> list[dict]:
        batch = {"B": 32, "L": 512} if cuda else {"B": 2, "L": 512}
        sizes = BASE if cuda else CPU_SIZES
        return [
            {"family": family, "part": part, **batch, **sizes, "dropout": 0.0, "fill": fill}
            for part in ("masked_lm", "encoder")
            for family in ("bert", "albert", "roformer", "nezha", "roberta", "electra")
            for fill in (1.0, 0.5)
        ]

    def dtypes(self, cuda: bool):
        return ("bf16", "fp16") if cuda else ("fp32",)

    def inputs(self, case: Case, seed: int) -> dict:
        """A padded batch: input_ids, attention_mask, labels, and the probe of the encoder's loss."""
        generator = torch.Generator(case.device).manual_seed(seed)
        on = {"generator": generator, "device": case.device}
        shape = (case["B"], case["L"])
        real = torch.arange(case["L"], device=case.device) < torch.tensor(lengths(case), device=case.device)[:, None]
        padding = 1 if case["family"] == "roberta" else 0
        ids = torch.randint(5, case["vocab"], shape, **on).where(real, padding)
        labels = ids.where(real & (torch.rand(shape, **on) < LABELLED), -100)
        probe = torch.randn(*shape, case["hidden"], **on) * real[..., None]
        return {"input_ids": ids, "attention_mask": real.long(), "labels": labels, "probe": probe}

    def providers(self, case: Case) -> list[Provider]:
        if case["family"] not in NAMES:
            raise ConfigError(f"family: got {case['family']!r}, expected one of {', '.join(NAMES)}")
        if case["part"] not in ("masked_lm", "encoder"):
            raise ConfigError(f"part: got {case['part']!r}, expected masked_lm or encoder")
        found = [Provider("fastbert", partial(self._ours, {}))]
        if case["part"] == "masked_lm":
            found.append(Provider("fastbert-labelled", partial(self._ours, LABELLED_ONLY), comparable=False))
        found += [
            Provider(f"transformers-{form}", partial(self._theirs, form), package="transformers")
            for form in ("eager", "sdpa")
        ]
        return [*found, Provider("transformers-compiled", self._compiled, package="transformers", gpu=True)]

    def _ours(self, options: dict, case: Case) -> Runnable:
        with tempfile.TemporaryDirectory() as folder:
            transformers_model(case, "eager").save_pretrained(folder)
            model = getattr(fastbert, class_name(case)).from_pretrained(folder, device=case.device)
        return Runnable(self.prepared(model, case), case, options)

    def _theirs(self, form: str, case: Case) -> Runnable:
        return Runnable(self.prepared(transformers_model(case, form), case).to(case.device), case)

    def _compiled(self, case: Case) -> Runnable:
        model = self._theirs("sdpa" if has_sdpa(case) else "eager", case).model
        return Runnable(model, case, call=compiled(model))

    def prepared(self, model: nn.Module, case: Case) -> nn.Module:
        return model

    def rest(self, op: Runnable) -> None:
        op.model.zero_grad(set_to_none=True)

    def check(self, provider: Provider, op: Runnable, case: Case) -> str:
        """On a model of two layers."""
        small = case.but(B=2, L=min(case["L"], 128), layers=min(case["layers"], 2), dropout=0.0)
        inputs = self.inputs(small, seed=1)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        truth = _found(Runnable(transformers_model(small, "eager").double().to(case.device), small), wide)
        yardstick = _found(self.yardstick(small), inputs)
        result = self.found(provider.make(small), provider.arrange(inputs))
        dtype = DTYPES[case.dtype]
        rows = []
        for name in result:
            want = truth[name].double()
            error, slack = ((t[name].double() - want).abs().max().item() for t in (result, yardstick))
            room = FLOOR[dtype] * torch.finfo(dtype).eps * max(1.0, want.abs().max().item())
            rows.append(Comparison(name, error, slack, 2 * slack + room))
        if not all(row.ok for row in rows):
            raise Mismatch("; ".join(map(str, rows)))
        largest = max(row.error / row.bound for row in rows)
        return f"{', '.join(row.name for row in rows)}: at most {largest:.2f} of the bound at {small}"

    def yardstick(self, case: Case) -> Runnable:
        """Whose error in the dtype of the case is the measure."""
        return self._theirs("eager", case)

    def found(self, op: Runnable, inputs: dict) -> dict[str, Tensor]:
        """What is compared of a provider."""
        return _found(op, inputs)

    def step(self, op: Runnable, inputs: dict, mode: str) -> Step:
        if mode == "fwd":
            batch = op.batch(inputs)
            return torch.no_grad()(lambda: op.output(batch))

        def forward_and_backward() -> None:
            op.model.zero_grad(set_to_none=True)
            op.loss(inputs).backward()

        def training_step() -> None:
            forward_and_backward()
            op.optimizer.step()

        return forward_and_backward if mode == "fwd+bwd" else training_step

    def work(self, case: Case, mode: str) -> Work:
        """Products of the layers and of the head on labelled rows; backward twice that; every weight is read once."""
        config = fastbert_config(case)
        tokens, width = sum(lengths(case)), case["hidden"]
        inner = config.intermediate_size
        per_layer = 2 * tokens * width * (4 * width + 2 * inner) + 4 * sum(n * n for n in lengths(case)) * width
        flops = case["layers"] * per_layer
        if case["part"] == "masked_lm":
            flops += 2 * LABELLED * tokens * (config.embedding_size or width) * (width + case["vocab"])
        weights = parameters(case) * DTYPES[case.dtype].itemsize
        return Work(flops, weights) if mode == "fwd" else Work(3 * flops, 2 * weights)

    def figures(self, case: Case, mode: str, p50_us: float) -> dict[str, float]:
        """Real tokens per second."""
        return {"tokens_per_s": 1e6 * sum(lengths(case)) / p50_us}


def _found(runnable: Runnable, inputs: dict) -> dict[str, Tensor]:
    """Outputs of the real rows, the gradient of the word table, which all others have gone through, the norm of all
    gradients together (a tied tensor counts once), and the loss; but not the encoder's, a sum whose terms cancel, so
    that its error says nothing about its size."""
    loss, found = runnable.loss(inputs), {}
    if loss.requires_grad:
        loss.backward()
        gradients = [p.grad for p in runnable.model.parameters() if p.grad is not None]
        words = next(g for g in gradients if g.dim() == 2 and len(g) == runnable.case["vocab"])
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        found = {"grad words": words, "norm of gradients": norm}
    if runnable.case["part"] == "masked_lm":
        found["loss"] = loss.detach()
    if runnable.options.get("return_logits", True):
        batch = {name: t for name, t in inputs.items() if name not in ("labels", "probe")}
        with torch.no_grad():
            output = runnable.output(batch)[0]
        found["output"] = output[batch["attention_mask"].bool()] if "attention_mask" in batch else output
    return found


def class_name(case: Case) -> str:
    return NAMES[case["family"]] + ("ForMaskedLM" if case["part"] == "masked_lm" else "Model")


def transformers_config(case: Case) -> dict:
    """The transformers config of a case; what the sizes do not say has the family's usual value."""
    family = case["family"]
    config = {
        "vocab_size": case["vocab"],
        "hidden_size": case["hidden"],
        "num_hidden_layers": case["layers"],
        "num_attention_heads": case["heads"],
        "intermediate_size": 4 * case["hidden"],
        "max_position_embeddings": max(512, case["L"]) + 2,  # RoBERTa's positions begin at 2
        "hidden_dropout_prob": case["dropout"],
        "attention_probs_dropout_prob": case["dropout"],
        "hidden_act": "gelu_new" if family == "albert" else "gelu",
    }
    if family == "roberta":
        config |= {"type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5}
    if family in ("albert", "electra"):
        config["embedding_size"] = 128
    if family == "nezha":
        config["max_relative_position"] = 64
    return config


def transformers_class(case: Case):
    try:
        import transformers
    except ModuleNotFoundError:
        raise Missing("transformers is not installed") from None
    transformers.utils.logging.disable_progress_bar()
    if not hasattr(transformers, class_name(case)):
        raise Missing(f"transformers {transformers.__version__} has no {class_name(case)}")
    return getattr(transformers, class_name(case))


def transformers_model(case: Case, attention: str) -> nn.Module:
    """A transformers model with random weights, the same for every form of attention."""
    model_class = transformers_class(case)
    if attention == "sdpa" and not has_sdpa(case):
        raise Missing(f"transformers has no SDPA for {class_name(case)}")
    config = model_class.config_class(**transformers_config(case))
    torch.manual_seed(0)
    return model_class._from_config(config, attn_implementation=attention)


def has_sdpa(case: Case) -> bool:
    return getattr(transformers_class(case), "_supports_sdpa", False)


def fastbert_config(case: Case) -> "fastbert.EncoderConfig":
    return fastbert.EncoderConfig(case["family"], **transformers_config(case))


def parameters(case: Case) -> int:
    task = "masked_lm" if case["part"] == "masked_lm" else "model"
    with torch.device("meta"):
        return fastbert.model_class(case["family"], task)(fastbert_config(case)).num_parameters()


BENCHMARK = ModelBenchmark()
