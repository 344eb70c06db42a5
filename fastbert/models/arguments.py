"""Arguments of transformers' forward methods that every model here takes without having a use for them."""

import functools
from collections.abc import Callable

from fastbert.errors import ConfigError

_INSTEAD = {
    "head_mask": "no head is masked",
    "inputs_embeds": "give input_ids",
    "output_attentions": "the probabilities of attention never exist as a tensor",
    "past_key_values": "encoders keep none",
    "use_cache": "encoders keep none",
}


def as_in_transformers(forward: Callable) -> Callable:
    """forward, which also takes return_dict (False: a tuple of the fields that are not None) and what transformers'
    has besides, as None or False; ConfigError for any other value of it."""

    @functools.wraps(forward)
    def wrapped(self, *arguments, return_dict: bool | None = None, **named):
        for name in _INSTEAD.keys() & named.keys():
            if (value := named.pop(name)) is not None and value is not False:
                shown = value if isinstance(value, bool) else f"a {type(value).__name__}"
                raise ConfigError(
                    f"{name} is {shown}, which {type(self).__name__} does not support; expected None: {_INSTEAD[name]} "
                    "(fastbert.hf.accelerate keeps all arguments of a transformers model)"
                )
        result = forward(self, *arguments, **named)
        return result.to_tuple() if return_dict is False else result

    return wrapped
