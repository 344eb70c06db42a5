"""What stands in the place of an accelerated encoder's `forward`."""

import inspect
import warnings

import torch
from torch import Tensor, nn

from fastbert.errors import ConfigError
from fastbert.hf.families import family_of
from fastbert.hf.view import View, is_version_4

_IDS = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
# Elements from which on a CPU gains by copying the weights of a shared layer: with 8 rows of 128 it takes 1.7 times as
# long, with 64 of them 1.3 times, with 32 of 384 as long.
_SHARED = 1 << 14
# Arguments that are served, and those that an encoder of transformers has no use for.
_SERVED = {*_IDS, "attention_mask", "output_hidden_states", "return_dict", "use_cache", "num_items_in_batch"}


class Forward:
    """Runs an encoder of transformers on fastbert's operations; what these do not serve, as transformers runs it, and
    warns of it once per reason.

    An attribute of the encoder, not a module in it: it adds nothing to state_dict. A copy or a pickle of the encoder
    holds one that serves the copy.

    encoder: of a class in `families`. unpad: leave padding out; results are zero there. Raises ConfigError if the
    encoder is built in a way that fastbert does not compute.
    """

    def __init__(self, encoder: nn.Module, unpad: bool):
        self.encoder, self.unpad = encoder, unpad
        self.view: View | None = View(encoder, family_of(encoder))
        self._names, self._output = _positional(type(encoder)), _output_class(family_of(encoder).output)
        self._tuples_hold_none = is_version_4()
        self._warned: set[str] = set()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "view": None}

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    @property
    def __code__(self):
        return self._original.__code__  # torch.export asks for it

    @property
    def _original(self):
        return type(self.encoder).forward.__get__(self.encoder)

    def __call__(self, *args, **kwargs):
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            if not torch.compiler.is_compiling():
                self._warn("it is being traced, and how rows are laid out depends on the mask")
            return self._original(*args, **kwargs)
        given = dict(zip(self._names, args, strict=False)) | kwargs
        reason = self.obstacle() or self._not_served(given)
        if reason is None:
            mask, (shape, device) = given.get("attention_mask"), _batch(given)
            mask = None if mask is None else mask.bool()
            layout = self.view.layout(shape, mask, device, self.unpad)
            if not isinstance(layout, str):
                return self._run(given, layout)
            reason = layout
        self._warn(reason)
        return self._original(*args, **kwargs)

    def obstacle(self) -> str | None:
        """Why the encoder as it is now must run as transformers runs it, or None."""
        if self.view is None or not self.view.is_current:
            try:
                self.view = View(self.encoder, family_of(self.encoder))
            except ConfigError as error:
                return str(error)
        return self.view.obstacle()

    def _not_served(self, given: dict) -> str | None:
        config, mask = self.encoder.config, given.get("attention_mask")
        for name, value in given.items():
            if name not in _SERVED and value is not None and value is not False:
                return f"{name} was given"
        for name in ("is_decoder", "is_causal", "output_attentions"):
            if getattr(config, name, False):
                return f"its config has {name} = {getattr(config, name)!r}"
        states = given.get("output_hidden_states")
        if states is not None and not isinstance(states, bool):
            return "output_hidden_states chooses among the layers"
        batch = _batch(given)
        if batch is None:
            return "neither input_ids [B, L] nor inputs_embeds [B, L, E] were given, or both"
        positions = self.view.ours.embeddings.position
        if given.get("position_ids") is not None and positions is None:
            return "position_ids were given"
        if positions is not None and batch[0][1] > self.view.config.max_length:
            return f"a sequence is longer than {self.view.config.max_length} tokens"
        if mask is not None and tuple(mask.shape) != batch[0]:
            return f"attention_mask has the shape {list(mask.shape)}, not that of the ids"
        if self._tuples_hold_none and self._return_dict(given) is False:
            return "return_dict is False, whose tuples of transformers 4 hold None"
        return None

    def _run(self, given: dict, layout):
        view, encoder, given_states = self.view, self.encoder, given.get("output_hidden_states")
        view.refresh()
        wants_states = encoder.config.output_hidden_states if given_states is None else given_states
        x = view.embed({name: given.get(name) for name in _IDS}, layout)
        view.ours.encoder.share_weights = x.is_cuda or x.numel() >= _SHARED
        rows, states = view.ours.encoder(x, output_hidden_states=wants_states, **layout.attention)
        # with padding in it: what stands there is what transformers has there
        unpack = layout.unpack if layout.key_padding_mask is None else _as_it_is
        fields = {"last_hidden_state": unpack(rows)}
        if getattr(encoder, "pooler", None) is not None:
            fields["pooler_output"] = _pooled(encoder, fields["last_hidden_state"])
        if states is not None:
            fields["hidden_states"] = (*map(unpack, states[:-1]), fields["last_hidden_state"])
        output = self._output(**fields)
        return output.to_tuple() if self._return_dict(given) is False else output

    def _return_dict(self, given: dict) -> bool | None:
        asked = given.get("return_dict")
        return getattr(self.encoder.config, "return_dict", True) if asked is None else asked

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            kind = type(self.encoder).__name__
            warnings.warn(f"{kind} runs as transformers runs it, not accelerated: {reason}", stacklevel=3)


def _positional(kind: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of a class's forward that may be given by position."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is positional)


def _output_class(name: str) -> type:
    from transformers import modeling_outputs

    return getattr(modeling_outputs, name)


def _batch(given: dict) -> tuple[tuple[int, int], torch.device] | None:
    """[B, L] and the device of a batch, or None where it is none."""
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embedded is None):
        return None
    rank, found = (2, ids) if embedded is None else (3, embedded)
    return (tuple(found.shape[:2]), found.device) if found.dim() == rank else None


def _pooled(encoder: nn.Module, states: Tensor) -> Tensor:
    if hasattr(encoder, "pooler_activation"):  # ALBERT: a linear layer and its activation
        return encoder.pooler_activation(encoder.pooler(states[:, 0]))
    return encoder.pooler(states)


def _as_it_is(rows: Tensor) -> Tensor:
    return rows
