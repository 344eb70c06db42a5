"""A live encoder of transformers seen as fastbert's: modules of ours that hold its linear layers, embeddings and norms,
the same objects, so that parameters, adapters and hooks are what they are there.
"""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert.config import BASE, EncoderConfig
from fastbert.errors import ConfigError
from fastbert.hf.families import Family
from fastbert.models.base import EncoderModel
from fastbert.nn import EncoderLayer, SelfAttention, hooked_everywhere, is_plain
from fastbert.packing import Layout, padded_layout

_ATTENTIONS = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
# The four dicts of hooks of a module: read of hundreds in every forward pass, so without a loop in Python.
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURE = "transformers.utils.output_capturing"
# Values of a transformers config under which an encoder computes what fastbert computes.
_ONLY = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_causal": (False, None),
    "position_embedding_type": ("absolute", None),
    "chunk_size_feed_forward": (0, None),
}


class Site(NamedTuple):
    """A layer of ours and its attention; and of theirs what is no weight: dropouts after the probabilities, after
    attention and, except in ALBERT, after the feed-forward block."""

    ours: EncoderLayer
    our_attention: SelfAttention
    theirs: nn.Module
    their_attention: nn.Module
    activation: nn.Module
    dropouts: list[nn.Module]


class View:
    """`ours`: a fastbert encoder without a pooler, in which every module that has weights is the live one. Raises
    ConfigError if the encoder is built in a way that fastbert does not compute.
    """

    def __init__(self, model: nn.Module, family: Family):
        self.theirs, self.config = model, _config(model, family)
        with torch.device("meta"):
            self.ours = family.view(self.config, add_pooling_layer=False)
        names = self.ours.names
        stems = {name.rpartition(".")[0] for name, _ in self.ours.named_parameters()}
        paths = {stem: names.of(f"{stem}.weight", self.config).rpartition(".")[0] for stem in stems}
        for stem, module in {stem: _submodule(model, path) for stem, path in paths.items()}.items():
            self.ours.set_submodule(stem, module)
        if self.config.model_type == "albert":
            self.ours.encoder.applications = _albert_order(self.config)
        self._list_modules(family)
        if self._rotates:
            _check_sinusoids(model.encoder.embed_positions.weight, self.ours)

    def _list_modules(self, family: Family) -> None:
        """Sort the live modules: those that are called or read, those of which a rate is read, and what is around."""
        embeddings, layers = self.ours.embeddings, self.ours.encoder.layers
        self._rotates = self.config.attention == "rotary"
        self._scaling = (self.config.hidden_size // self.config.num_attention_heads) ** -0.5
        # transformers 5 hands the rate to an attention function; RoFormer and transformers 4 call the dropout
        self._calls_dropout = self._rotates or is_version_4()
        self._tables = [t for t in (embeddings.word, embeddings.token_type, embeddings.position) if t is not None]
        self._norms = [norm for layer in layers for norm in (layer.attention_norm, layer.output_norm)]
        self._linears = [] if embeddings.projection is None else [embeddings.projection]
        for layer in layers:
            self._linears += [layer.attention.query, layer.attention.key, layer.attention.value]
            self._linears += [layer.attention.output, layer.intermediate, layer.output]
        self._sites = [
            Site(mine, mine.attention, *found) for mine, found in zip(layers, self._find(family), strict=True)
        ]
        small = [m for site in self._sites for m in (site.activation, *site.dropouts)]
        around = list(_around(self.theirs, {id(m) for m in (*self._linears, *self._norms, *small)}))
        self._children = [(m, list(m._modules.values())) for m in (*around, self.theirs, self.theirs.embeddings)]
        self._silent = list(dict.fromkeys((*around, *self._norms, *small)))
        self._kinds = list(map(type, self._silent))
        for norm in self._norms:
            if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
                raise ConfigError(f"a {_name(norm)} is in the place of a LayerNorm with weight and bias")
        for dropout in (m for site in self._sites for m in site.dropouts):
            if type(dropout) not in (nn.Dropout, nn.Identity):
                raise ConfigError(f"a {_name(dropout)} is in the place of a dropout")

    def _find(self, family: Family) -> Iterator[tuple[nn.Module, ...]]:
        """For each layer of ours: theirs, its attention, activation and dropouts."""
        inner, template, places = self.config.inner_group_num or 1, self.ours.names.layer, family.places
        for index in range(len(self.ours.encoder.layers)):
            path = template.format(index=index, group=index // inner, inner=index % inner)
            layer = _submodule(self.theirs, path)
            activation = _submodule(layer, places.activation)
            if type(activation) is not _activation(self.config.hidden_act):
                raise ConfigError(f"{path}.{places.activation} is {_name(activation)}: not {self.config.hidden_act}")
            yield (
                layer,
                _submodule(layer, places.attention),
                activation,
                [_submodule(layer, p) for p in places.dropouts],
            )

    # ------------------------------------------------------------ as it is now

    @property
    def is_current(self) -> bool:
        """Whether the live encoder still holds the modules that are seen here."""
        return all(list(module._modules.values()) == children for module, children in self._children)

    def obstacle(self) -> str | None:
        """Why the encoder as it is now must run as transformers runs it, or None."""
        if hooked_everywhere():
            return "hooks for all modules are set"
        attention = getattr(self.theirs.config, "_attn_implementation", None)
        if attention not in _ATTENTIONS:
            return f"its attention is {attention!r}, which is none of transformers' own"
        if len({getattr(site.theirs, "gradient_checkpointing", False) for site in self._sites}) > 1:
            return "some of its layers are checkpointed and others are not"
        for site in self._sites:
            scaling = getattr(site.their_attention, "scaling", None)
            if scaling is not None and scaling != self._scaling:
                return f"its attention has scaling = {scaling!r}, not {self._scaling!r}"
        changed = list(map(type, self._silent)) != self._kinds
        if changed or is_touched(self._silent):
            # which is rare, or the hooks by which transformers collects hidden states
            for module, kind in zip(self._silent, self._kinds, strict=True):
                if type(module) is not kind or is_touched([module]):
                    return f"a {kind.__name__} in it is hooked, patched or wrapped"
        return None

    def refresh(self) -> None:
        """Take over what may have changed in the live modules besides weights."""
        checkpointed = getattr(self.theirs.encoder, "gradient_checkpointing", False)
        for site in self._sites:
            probs, hidden, *output = site.dropouts
            training = probs.training if self._calls_dropout else site.their_attention.training
            values = {"heads": site.their_attention.num_attention_heads, "dropout_p": _rate(probs, training)}
            if self._rotates:
                values["rotate_value"] = bool(site.their_attention.rotary_value)
            _write(site.our_attention, values)
            rate = _rate(output[0], output[0].training) if output else 0.0
            _write(site.ours, {"dropout_p": _rate(hidden, hidden.training), "output_dropout_p": rate})
            checkpointed = checkpointed or getattr(site.theirs, "gradient_checkpointing", False)
        self.ours.encoder.gradient_checkpointing = checkpointed and self.theirs.training

    def layout(self, shape: tuple[int, int], mask: Tensor | None, device, unpad: bool) -> Layout | str:
        """How the rows of a batch `[B, L]` are laid out, or why they cannot be. Without padding if `unpad`, unless a
        sequence begins with some: what reads the first column is to get what transformers has there."""
        hooked = is_touched(self._linears)
        if mask is None or bool(mask.all()):
            if hooked:
                return Layout(shape, key_padding_mask=torch.ones(shape, dtype=torch.bool, device=device))
            return padded_layout(shape, None, device, keep_distances=False)
        first, every = torch.stack([mask[:, 0].all(), mask.any(1).all()]).tolist()
        if unpad and first and not hooked:
            return padded_layout(shape, mask, device, keep_distances=self.config.attention != "absolute")
        return Layout(shape, key_padding_mask=mask) if every else "a sequence has no token"

    def embed(self, ids: dict[str, Tensor | None], layout: Layout) -> Tensor:
        """The rows that go into the first layer. ids: input_ids or inputs_embeds, and others, as the caller has
        them."""
        embeddings, theirs = self.ours.embeddings, self.theirs.embeddings
        input_ids, types, positions = (ids.get(n) for n in ("input_ids", "token_type_ids", "position_ids"))
        if input_ids is None or not self._has_plain_embeddings():
            x = layout.pack(theirs(**{name: t for name, t in ids.items() if t is not None}))
            return x if embeddings.projection is None else embeddings.projection(x)
        embeddings.dropout_p = _rate(theirs.dropout, theirs.dropout.training)
        if positions is not None:
            positions = layout.pack(positions.expand_as(input_ids))
        elif embeddings.position is not None:
            positions = self.ours.default_positions(input_ids, layout)
        types = None if types is None else layout.pack(types.expand_as(input_ids))
        return embeddings(layout.pack(input_ids), types, positions)

    def _has_plain_embeddings(self) -> bool:
        theirs = self.theirs.embeddings
        return (
            type(theirs).__module__ == type(self.theirs).__module__
            and is_plain(theirs, type(theirs))
            and is_plain(theirs.LayerNorm, nn.LayerNorm)
            and is_plain(theirs.dropout, nn.Dropout)
            and all(
                is_plain(t, nn.Embedding) and t.max_norm is None and not t.scale_grad_by_freq and not t.sparse
                for t in self._tables
            )
        )


def _config(model: nn.Module, family: Family) -> EncoderConfig:
    """What the config of the model says, and the model itself where the two may differ."""
    theirs, model_type = model.config, family.view.model_type
    for name, allowed in _ONLY.items():
        value = getattr(theirs, name, None)
        if value not in allowed:
            raise ConfigError(f"its config has {name} = {value!r}")
    values = {name: getattr(theirs, name) for name in BASE[model_type] if hasattr(theirs, name)}
    values["pad_token_id"] = model.embeddings.padding_idx if model_type == "roberta" else 0
    if hasattr(model.encoder, "layer"):
        values["num_hidden_layers"] = len(model.encoder.layer)
    return EncoderConfig(model_type, **values)


def _albert_order(config: EncoderConfig) -> list[list[int]]:
    """The layers by transformers' formula, in floating point; each is a hidden state of its own in transformers 5."""
    count, groups, inner = config.num_hidden_layers, config.num_hidden_groups, config.inner_group_num
    chosen = [int(i / (count / groups)) for i in range(count)]
    order = [[group * inner + i for i in range(inner)] for group in chosen]
    return order if is_version_4() else [[index] for indices in order for index in indices]


def _check_sinusoids(table: Tensor, ours: EncoderModel) -> None:
    """RoFormer's angles are computed here; transformers reads them from a table that is stored with the weights."""
    (expected,) = ours.names.constants(ours.config).values()
    if table.is_meta:
        return
    rounded = 0.01  # to 16 bits, where the model is or was in 16 bits
    if table.shape != expected.shape or (table.cpu().float() - expected).abs().max() > rounded:
        raise ConfigError("encoder.embed_positions does not hold the sinusoids of RoFormer")


def _around(model: nn.Module, known: set[int]) -> Iterator[nn.Module]:
    """The modules of the encoder around those that are known: not called here, so each of a class that comes with the
    model."""
    above = [("encoder", model.encoder)]
    for path, module in above:
        if type(module) is nn.Dropout:  # ALBERT's layers have one that nobody calls
            continue
        if type(module) is not nn.ModuleList and type(module).__module__ != type(model).__module__:
            raise ConfigError(f"{path} is {_name(module)}, which is not of {type(model).__module__}")
        yield module
        below = ((name, m) for name, m in module._modules.items() if m is not None and id(m) not in known)
        above += [(f"{path}.{name}", m) for name, m in below]


def _submodule(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(f"{_name(module)} has no {path}") from error


def _activation(name: str) -> type[nn.Module]:
    from transformers.activations import ACT2FN

    return type(ACT2FN[name])


def is_version_4() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _rate(dropout: nn.Module, training: bool) -> float:
    return dropout.p if training and type(dropout) is nn.Dropout else 0.0


def _write(module: nn.Module, values: dict) -> None:
    for name, value in values.items():
        if getattr(module, name) != value:
            setattr(module, name, value)


def is_touched(modules: list[nn.Module]) -> bool:
    """Whether a call of one does more than its class says, but for the hooks by which transformers collects hidden
    states."""
    if any("forward" in attributes or "feed_forward_chunk" in attributes for attributes in map(vars, modules)):
        return True
    if not any(chain.from_iterable(map(_hooks, modules))):
        return False
    ours = (hooks.values() for module in modules for hooks in _hooks(module))
    return any(getattr(hook, "__module__", None) != _CAPTURE for hook in chain.from_iterable(ours))
