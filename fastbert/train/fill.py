"""Filling in blanks with a masked language model."""

import torch
from torch import nn

from fastbert.data import Tokenizer
from fastbert.errors import ConfigError, DataError
from fastbert.models.base import MaskedLMModel


def fill(model: nn.Module, tokenizer: Tokenizer, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
    """For every [MASK] in `text`, the `top` most probable pieces with their probabilities, most probable first.

    model: one with a masked-language-model head, a ...ForMaskedLM or ...ForPreTraining; of ELECTRA the generator. Each
    blank is filled for itself, given what is not blank. DataError if there is no blank, ConfigError for a model without
    that head.
    """
    ids = tokenizer.encode(text)
    if tokenizer.mask_id not in ids:
        raise DataError(f"text {text!r} has no blank; expected {tokenizer.special_tokens['mask_token']} in it")
    return fill_ids(model, tokenizer, ids, top)


@torch.no_grad()
def fill_ids(model: nn.Module, tokenizer: Tokenizer, ids: list[int], top: int) -> list[list[tuple[str, float]]]:
    """`fill` of a text that is given as ids, [CLS] and [SEP] included."""
    if not isinstance(model, MaskedLMModel):
        raise ConfigError(
            f"a {type(model).__name__} has no masked-language-model head, expected a model that has; ELECTRA's "
            "generator is in the folder generator of its model folder"
        )
    training = model.training
    model.eval()
    tensor = torch.tensor([ids], device=next(model.parameters()).device)
    output = model(tensor)
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    logits = logits[tensor == tokenizer.mask_id].float()
    model.train(training)
    best = logits[:, : tokenizer.vocab_size].softmax(-1).topk(min(top, tokenizer.vocab_size))
    return [
        [(tokenizer.id_to_token(index), share) for index, share in zip(indices, shares, strict=True)]
        for indices, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
