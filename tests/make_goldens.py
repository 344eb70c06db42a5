"""Make tests/goldens/*.safetensors: tiny random models of transformers 4.40.2, their outputs and gradients in float64.

    python tests/make_goldens.py [--only NAME ...]        # needs transformers==4.40.2, the last release with NEZHA

test_parity.py compares fastbert with these files, so that the check needs no transformers. One file holds one case:

* ``input/*``: input_ids, attention_mask, token_type_ids, position_ids, and the labels that the head takes, by
  transformers' names; ``probe_hidden`` and ``probe_pooler`` for a model without a loss.
* ``weight/*``: transformers' names, each tensor once; random, rounded to float16 (stored so, exact in float64); no bias
  is 0, no LayerNorm weight 1.
* ``output/*``: ``hidden_states`` [layers + 1, T, C], and of the outputs that have a row for each token (``logits`` [T,
  ...] and so on) those at the T positions where the mask is 1; others whole (``pooler_output``, ``loss``, ``logits`` of
  a head for sequences).
* ``grad/*``: d loss / d weight, float64. The loss of a base model is sum(last_hidden_state * probe_hidden)
  + sum(pooler_output * probe_pooler).
* ``fp32_table/{output,grad}/*``: the same from the sinusoids as transformers builds them, in float32 (stored in
  float32). For everything else the float64 table was written into NEZHA's ``positions_encoding`` and RoFormer's
  ``embed_positions``.

The metadata hold one JSON object: case, architecture, config.json, versions, seed. Made twice on one machine, a file
is the same to the byte.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / "goldens"
TRANSFORMERS_VERSION = "4.40.2"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One golden file. ``config`` overrides TINY; ``fp32_table`` adds the run with transformers' own sinusoids."""

    architecture: str
    about: str
    config: dict = field(default_factory=dict)
    lengths: tuple[int, ...] = (11, 6, 1)
    mask: str = "right"  # where the padding is: right | left | hole (two masked positions inside the first sequence)
    token_types: bool = True
    position_ids: bool = False
    pads_inside: bool = False  # pad ids at real positions, other ids at padded ones
    integer_groups: bool = False  # ALBERT: group i * G // L instead of transformers' int(i / (L / G))
    fp32_table: bool = False
    choices: int = 0  # a multiple choice: so many of the sequences belong together


TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}

# The heads, on encoders that are small, for those have cases of their own.
SMALL = {"vocab_size": 20, "hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 14, "num_hidden_layers": 1}

CASES = {
    "bert_mlm": Case("BertForMaskedLM", "exact gelu, eps 1e-12, ragged lengths down to 1"),
    "bert_left": Case(
        "BertForMaskedLM",
        "gelu_new, eps 1e-5, padding on the left: position ids are columns; no token types",
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
        mask="left",
        token_types=False,
    ),
    "bert_model": Case(
        "BertModel",
        "base model with pooler, relu, given position ids, masked positions inside a sequence",
        {"hidden_act": "relu"},
        mask="hole",
        position_ids=True,
    ),
    "roberta_mlm": Case(
        "RobertaForMaskedLM",
        "eps 1e-5, one token type, positions from pad + 1; gelu_new in the layers, the head keeps the exact gelu",
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1},
        token_types=False,
    ),
    "roberta_pads": Case(
        "RobertaModel",
        "base model with pooler; pad ids at real positions, others at padded ones: positions count ids, not the mask",
        {"pad_token_id": 1},
        lengths=(11, 9, 4),
        pads_inside=True,
    ),
    "roberta_left": Case(
        "RobertaForMaskedLM",
        "padding on the left, relu in the layers",
        {"pad_token_id": 1, "hidden_act": "relu", "type_vocab_size": 1, "num_hidden_layers": 1},
        mask="left",
        token_types=False,
    ),
    "albert_mlm": Case(
        "AlbertForMaskedLM",
        "one shared block, embedding_size != hidden_size, head dim 26, gelu_new",
        {
            "hidden_size": 52,
            "num_attention_heads": 2,
            "embedding_size": 16,
            "hidden_act": "gelu_new",
            "num_hidden_layers": 3,
        },
    ),
    "albert_groups": Case(
        "AlbertForMaskedLM",
        "7 layers in 3 groups of 2 inner blocks: groups 0 0 0 1 1 2 2",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "embedding_size": 12,
            "num_hidden_layers": 7,
            "num_hidden_groups": 3,
            "inner_group_num": 2,
        },
    ),
    "albert_rounding": Case(
        "AlbertForMaskedLM",
        "18 layers in 14 groups; transformers' rounding takes a wrong group for layer 9: i * G // L replaces it",
        {
            "hidden_size": 8,
            "num_attention_heads": 2,
            "intermediate_size": 10,
            "embedding_size": 6,
            "num_hidden_layers": 18,
            "num_hidden_groups": 14,
        },
        integer_groups=True,
    ),
    "albert_square": Case(
        "AlbertModel",
        "base model with pooler, embedding_size == hidden_size (still with a projection), one head of 32, relu",
        {"hidden_size": 32, "num_attention_heads": 1, "embedding_size": 32, "hidden_act": "relu"},
    ),
    "nezha_mlm": Case(
        "NezhaForMaskedLM",
        "R = 5 below the length: clipping, the shift by R and the sign of j - i all matter",
        {"max_relative_position": 5},
        lengths=(17, 9, 1),
        fp32_table=True,
    ),
    "nezha_wide": Case(
        "NezhaForMaskedLM",
        "R = 31 above the length, gelu_new, padding on the left, no token types",
        {"max_relative_position": 31, "hidden_act": "gelu_new", "num_hidden_layers": 1},
        mask="left",
        token_types=False,
    ),
    "nezha_model": Case(
        "NezhaModel",
        "base model with pooler, R = 4, masked positions inside a sequence: distances are between columns",
        {"max_relative_position": 4},
        mask="hole",
    ),
    "electra_generator": Case(
        "ElectraForMaskedLM",
        "embedding_size != hidden_size; gelu_new in the layers, the head keeps the exact gelu",
        {"embedding_size": 16, "hidden_act": "gelu_new"},
    ),
    "electra_discriminator": Case(
        "ElectraForPreTraining",
        "embedding_size != hidden_size; relu also in the head; the loss counts real positions",
        {"embedding_size": 16, "hidden_act": "relu", "layer_norm_eps": 1e-5},
    ),
    "electra_model": Case(
        "ElectraModel", "base model, embedding_size == hidden_size: no projection", {"embedding_size": 24}
    ),
    "roformer_mlm": Case(
        "RoFormerForMaskedLM",
        "embedding_size != hidden_size, values not rotated",
        {"embedding_size": 16, "rotary_value": False},
        lengths=(17, 9, 1),
        fp32_table=True,
    ),
    "roformer_value": Case(
        "RoFormerForMaskedLM",
        "values rotated too, embedding_size == hidden_size, gelu_new, padding on the left",
        {"embedding_size": None, "rotary_value": True, "hidden_act": "gelu_new", "num_hidden_layers": 1},
        mask="left",
    ),
    "roformer_model": Case(
        "RoFormerModel",
        "base model (no pooler), values rotated too, masked positions inside a sequence: angles are those of columns",
        {"embedding_size": None, "rotary_value": True, "layer_norm_eps": 1e-5},
        mask="hole",
    ),
}
HEAD_FAMILIES = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "Albert": {"embedding_size": 8, "hidden_act": "gelu_new"},
    "Nezha": {"max_relative_position": 3},
    "Electra": {"embedding_size": 8, "hidden_act": "gelu_new"},
    "RoFormer": {"embedding_size": 8, "hidden_act": "gelu_new", "rotary_value": False},
}
SEQUENCE_LABELS = {
    "Bert": ("three labels, one of them -100", {"num_labels": 3}),
    "Roberta": ("several of three labels at once", {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "Albert": ("two labels", {}),
    "Nezha": ("a number", {"num_labels": 1}),
    "Electra": ("two numbers", {"num_labels": 2, "problem_type": "regression"}),
    "RoFormer": ("three labels; the layers' activation in the head too", {"num_labels": 3}),
}
for family, own in HEAD_FAMILIES.items():
    types = {"token_types": family != "Roberta"}
    about, labels = SEQUENCE_LABELS[family]
    heads = {
        "sequence": Case("SequenceClassification", about, labels, (7, 4, 1), **types),
        "token": Case("TokenClassification", "five labels", {"num_labels": 5}, (7, 4, 1), **types),
        "answer": Case(
            "QuestionAnswering", "without padding, of which transformers makes answers", {}, (7, 4, 2), **types
        ),
        "choice": Case("MultipleChoice", "two of three texts", {}, (7, 4, 1, 5, 7, 3), choices=3, **types),
    }
    if family in ("Bert", "RoFormer"):
        heads["answer"] = Case("QuestionAnswering", "equal lengths: transformers' own loss", {}, (6, 6, 6))
    if family == "RoFormer":  # transformers takes the last token, padding or not
        heads["choice"] = Case("MultipleChoice", "the last token stands for a text", {}, (5,) * 6, choices=3)
    if family in ("Bert", "Albert", "Nezha"):
        heads["pretraining"] = Case("PreTraining", "both heads", {}, (7, 4, 2))
    for name, case in heads.items():
        config = SMALL | own | case.config
        CASES[f"{family.lower()}_{name}"] = replace(case, architecture=f"{family}For{case.architecture}", config=config)


def build(architecture: str, config: dict, generator: torch.Generator) -> nn.Module:
    """A transformers model in float64, in evaluation mode; every parameter is random and exact in float16."""
    import transformers

    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**config)).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # RoFormer's table of sinusoids is a frozen parameter
            with torch.no_grad():
                parameter.copy_(_random_weight(name, parameter, generator).half())
    return model


def _random_weight(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if name.endswith("bias"):
        return 0.3 * value
    if "norm" in name.lower():
        return 1 + 0.3 * value
    if "embeddings." in name:
        return 0.7 * value
    into_residual = name.endswith(("output.dense.weight", "attention.dense.weight", "ffn_output.weight"))
    return (
        (0.6 if into_residual else 1.3) * value / parameter.shape[-1] ** 0.5
    )  # with 1.3 a deep stack makes all tokens alike


def write_float64_tables(model: nn.Module) -> None:
    """Replace the float32-rounded sinusoids of a NEZHA or RoFormer model by the same numbers in float64."""
    for name, module in model.named_modules():
        if hasattr(
            module, "positions_encoding"
        ):  # NEZHA, in every layer: [P, P, D], the row clip(j - i, -R, R) + R of the table
            positions, head_dim = module.positions_encoding.shape[1:]
            r = model.config.max_relative_position
            columns = torch.arange(positions)
            module.positions_encoding = _sinusoids(2 * r + 1, head_dim).flatten(1)[
                (columns[None, :] - columns[:, None]).clamp(-r, r) + r
            ]
        elif name.endswith("embed_positions"):  # RoFormer: [P, D], sines in the first half, cosines in the second
            table = _sinusoids(*module.weight.shape)
            module.weight.data = torch.cat([table[..., 0], table[..., 1]], dim=1)


def _sinusoids(rows: int, head_dim: int) -> Tensor:
    """[rows, D / 2, 2]: sin and cos of row / 10000^(2k / D), in float64."""
    k = torch.arange(head_dim // 2, dtype=torch.float64)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (2 * k / head_dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1)


def use_integer_groups(encoder: nn.Module) -> None:
    """Make transformers' AlbertTransformer apply group i * G // L at layer i; its int(i / (L / G)) fails for 18, 14."""
    from transformers.modeling_outputs import BaseModelOutput

    layers, groups = encoder.config.num_hidden_layers, encoder.config.num_hidden_groups

    def forward(hidden_states: Tensor, attention_mask: Tensor, head_mask: object, **_: object) -> BaseModelOutput:
        states = [encoder.embedding_hidden_mapping_in(hidden_states)]
        for i in range(layers):
            group = encoder.albert_layer_groups[i * groups // layers]
            states.append(group(states[-1], attention_mask, [None] * encoder.config.inner_group_num)[0])
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))

    encoder.forward = forward


def make_batch(case: Case, config: dict, generator: torch.Generator) -> Tensors:
    """Inputs of a case: ids, mask and what else it asks for; labels for a head, probes for a base model."""

    def randint(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def probe(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, length = len(case.lengths), max(case.lengths)
    columns, lengths = torch.arange(length).expand(batch, -1), torch.tensor(case.lengths)[:, None]
    mask = columns >= length - lengths if case.mask == "left" else columns < lengths
    if case.mask == "hole":
        mask[0, 3:5] = False
    pad, ids = config["pad_token_id"], randint(5, config["vocab_size"], (batch, length))
    if case.pads_inside:
        ids[0, 2] = ids[1, :2] = pad
    else:
        ids[~mask] = pad
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    if case.token_types:
        inputs["token_type_ids"] = randint(0, config["type_vocab_size"], (batch, length))
    if case.position_ids:
        inputs["position_ids"] = randint(0, config["max_position_embeddings"], (batch, length))
    kind = case.architecture.rpartition("For")[2]
    classes = config.get("num_labels", 2)
    if kind == "PreTraining" and "Electra" in case.architecture:
        inputs["labels"] = randint(0, 2, (batch, length))
    elif kind in ("MaskedLM", "PreTraining", "TokenClassification"):
        chosen = mask & (randint(0, 2, (batch, length)) == 1)
        limit = classes if kind == "TokenClassification" else config["vocab_size"]
        inputs["labels"] = randint(0, limit, (batch, length)).where(chosen, -100)
        if kind == "PreTraining":
            sentence = "sentence_order_label" if "Albert" in case.architecture else "next_sentence_label"
            inputs[sentence] = randint(0, 2, (batch,))
    elif kind == "SequenceClassification":
        shapes = {"regression": (batch, classes), "multi_label_classification": (batch, classes)}
        shape = shapes.get(config.get("problem_type"), (batch,))
        inputs["labels"] = randint(0, 2 if len(shape) == 2 else classes, shape)
        if len(shape) == 2 or classes == 1:
            inputs["labels"] = inputs["labels"].double() + (probe(*shape) if classes < 3 else 0)
        elif classes > 2:
            inputs["labels"][1] = -100
    elif kind == "QuestionAnswering":
        inputs["start_positions"], inputs["end_positions"] = (
            torch.tensor([randint(0, n, (1,)).item() for n in case.lengths]) for _ in range(2)
        )
    elif kind == "MultipleChoice":
        inputs = {name: value.unflatten(0, (-1, case.choices)) for name, value in inputs.items()}
        inputs["labels"] = randint(0, case.choices, (batch // case.choices,))
    else:
        inputs["probe_hidden"] = probe(int(mask.sum()), config["hidden_size"])
        inputs["probe_pooler"] = probe(batch, config["hidden_size"])
    return inputs


def run(model: nn.Module, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """(outputs at the real positions, gradient of every parameter by name) of a transformers model."""
    real = inputs["attention_mask"].bool()
    result = model(**{k: v for k, v in inputs.items() if not k.startswith("probe")}, output_hidden_states=True)
    flat = real.flatten(0, -2)
    outputs = {"hidden_states": torch.stack([state[flat] for state in result.hidden_states])}
    if "probe_hidden" in inputs:
        outputs["loss"] = (result.last_hidden_state[real] * inputs["probe_hidden"]).sum()
        if result.get("pooler_output") is not None:
            outputs["pooler_output"] = result.pooler_output
            outputs["loss"] = outputs["loss"] + (result.pooler_output * inputs["probe_pooler"]).sum()
    else:
        outputs |= {name: value for name, value in result.items() if name == "loss" or name.endswith("logits")}
        patch_loss(outputs, inputs, real)
        for name, value in outputs.items():
            if value.shape[: real.dim()] == real.shape:
                outputs[name] = value[real]
    model.zero_grad()
    outputs["loss"].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in outputs.items()}, grads


def patch_loss(outputs: Tensors, inputs: Tensors, real: Tensor) -> None:
    """The loss as it is meant, where transformers' is not."""
    theirs = outputs["loss"]
    if "start_logits" in outputs:  # transformers has padding among what an answer is chosen from
        ours = 0
        for edge in ("start", "end"):
            logits = outputs[f"{edge}_logits"].masked_fill(~real, -torch.inf)
            ours = ours + nn.functional.cross_entropy(logits, inputs[f"{edge}_positions"]) / 2
        outputs["loss"] = ours
        if real.all():
            torch.testing.assert_close(theirs, ours, rtol=1e-14, atol=0)
    elif outputs.get("logits") is not None and outputs["logits"].shape == real.shape:
        # ELECTRA's discriminator: transformers rounds labels, and with them part of the loss, to float32
        labels = inputs["labels"][real].double()
        outputs["loss"] = nn.functional.binary_cross_entropy_with_logits(outputs["logits"][real], labels)
        torch.testing.assert_close(theirs.double(), outputs["loss"], rtol=0, atol=1e-6)


def make_golden(name: str, case: Case, seed: int) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of one golden file."""
    import transformers

    generator = torch.Generator().manual_seed(seed)
    config = TINY | case.config
    model = build(case.architecture, config, generator)
    inputs = make_batch(case, config, generator)
    if case.integer_groups:
        before, _ = run(model, inputs)
        use_integer_groups(model.albert.encoder)
        if torch.allclose(before["loss"], run(model, inputs)[0]["loss"]):
            raise SystemExit(f"{name}: transformers groups its layers as i * G // L does; the case shows nothing")
    tensors = {f"input/{key}": value for key, value in inputs.items()}
    tensors |= {f"weight/{key}": p.detach().half() for key, p in model.named_parameters() if p.requires_grad}

    def add(prefix: str, store: Callable[[Tensor], Tensor]) -> None:
        outputs, grads = run(model, inputs)
        tensors.update({f"{prefix}output/{key}": store(value) for key, value in outputs.items()})
        tensors.update({f"{prefix}grad/{key}": store(value) for key, value in grads.items()})

    if case.fp32_table:
        add("fp32_table/", Tensor.float)
    write_float64_tables(model)
    add("", Tensor.double)
    model.config.architectures = [case.architecture]
    facts = {
        "case": name,
        "about": case.about,
        "architecture": case.architecture,
        "config": model.config.to_diff_dict(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": seed,
    }
    return {key: value.contiguous() for key, value in tensors.items()}, {"golden": json.dumps(facts, sort_keys=True)}


def main() -> None:
    """Write the golden files."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=" ".join(CASES))
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS_VERSION:
        raise SystemExit(f"needs transformers=={TRANSFORMERS_VERSION}, this Python has {transformers.__version__}")
    torch.set_num_threads(1)  # one order of summation
    GOLDENS.mkdir(exist_ok=True)
    for seed, (name, case) in enumerate(CASES.items(), start=1):
        if name in arguments.only:
            path = GOLDENS / f"{name}.safetensors"
            tensors, metadata = make_golden(name, case, seed)
            save_file(tensors, path, metadata)
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {case.architecture}: {case.about}")


if __name__ == "__main__":
    main()
