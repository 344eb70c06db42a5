"""Distillation: a model learns what another one, its teacher, says of the same words (Hinton et al. 2015, arXiv
1503.02531), and how it represents them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.errors import ConfigError
from fastbert.models.base import LossTerm, MaskedLMModel
from fastbert.models.labels import IGNORE_INDEX


class Distillation:
    """Terms that a teacher adds to the loss of a masked language model, each a mean over the rows with a label.

    distill_logits_loss: T^2 KL(teacher || student) of the distributions over the vocabulary at temperature T, which
    takes a few tensors `[N, V]` in float32 for N labels. distill_hidden_loss: the mean squared difference of the last
    hidden states. A term of weight 0 is not computed.

    teacher: with the student's vocabulary, on its device, in its working dtype; it is frozen and put in evaluation mode
    here. It is no part of the student, so it is in no optimizer and no checkpoint.
    Raises ConfigError if the vocabularies differ in size, or, where they are compared, the hidden states.
    """

    def __init__(
        self,
        teacher: MaskedLMModel,
        student: MaskedLMModel,
        *,
        logits: float = 1.0,
        hidden: float = 0.0,
        temperature: float = 1.0,
    ):
        needed = ["vocab_size", *(["hidden_size"] if hidden else [])]
        for name in needed:
            its, own = getattr(teacher.config, name), getattr(student.config, name)
            if its != own:
                raise ConfigError(f"{name} of the teacher is {its}, expected {own}, that of the model")
        self.teacher, self.temperature = teacher.eval().requires_grad_(False), temperature
        terms = (LossTerm("distill_logits_loss", logits), LossTerm("distill_hidden_loss", hidden))
        self.terms = tuple(term for term in terms if term.weight)

    def losses(self, student: MaskedLMModel, states: Tensor, inputs: dict[str, Tensor], max_seqlen: int) -> Tensor:
        """The means of `terms`, float32 `[k]`. states: the student's last hidden state `[N, C]` of the rows that have a
        label; inputs: the packed batch, with `labels` and `label_positions`.
        """
        names = ("input_ids", "token_type_ids", "cu_seqlens", "labels", "label_positions")
        given = {name: inputs[name] for name in names if name in inputs}
        with torch.no_grad():
            expected = self.teacher.model(**given, max_seqlen=max_seqlen, return_rows=True).rows
        counted = inputs["labels"] != IGNORE_INDEX
        found = {
            "distill_logits_loss": lambda: self._divergence(self._logits(student, states), expected),
            "distill_hidden_loss": lambda: (_wide(states) - _wide(expected)).square().mean(-1),
        }
        rows = torch.stack([found[term.name]() for term in self.terms])
        return rows.masked_fill(~counted, 0).sum(-1) / counted.sum().clamp(min=1)

    def _divergence(self, logits: Tensor, states: Tensor) -> Tensor:
        """T^2 KL(teacher || student) of each row, `[N]`."""
        with torch.no_grad():
            expected = F.log_softmax(self._logits(self.teacher, states), dim=-1)
        found = F.log_softmax(logits, dim=-1)
        return self.temperature**2 * F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)

    def _logits(self, model: MaskedLMModel, states: Tensor) -> Tensor:
        return _wide(model.head(states, model.model.embeddings.word.weight)) / self.temperature


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
