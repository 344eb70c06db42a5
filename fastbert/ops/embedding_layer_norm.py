"""dropout(LN(word + token type + position)), the input of the encoder."""

from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves
from fastbert.errors import ConfigError, ShapeError
from fastbert.ops import checks

_BACKENDS = {"torch": serves, "reference": serves}


def embedding_layer_norm(
    input_ids: Tensor,
    word_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    token_type_ids: Tensor | None = None,
    token_type_embeddings: Tensor | None = None,
    position_ids: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(LN(word[ids] + type[token types] + position[positions])): see fastbert.reference.

    input_ids: int64 or int32, any shape [...]. word_embeddings: [V, C]; token_type_embeddings: [types, C] or None;
    position_embeddings: [P, C] or None; all of one floating dtype. weight, bias: [C], floating. token_type_ids and
    position_ids: the shape of input_ids, or one that broadcasts to it; None means type 0, and the index in the last
    dimension (so packed input has to give its positions). dropout_p, seed: as in dropout_add_layer_norm.
    Returns [..., C] in word_embeddings' dtype. Differentiable in the tables, weight and bias.

    Raises ShapeError (also when a sequence is longer than the table of positions), DtypeError, ConfigError (eps,
    dropout_p, seed, ids without their table), BackendError, and DataError for an id outside its table: on the CPU only,
    for on a GPU the check would have to wait for the device.
    Source: Devlin et al., BERT (2018), arXiv 1810.04805, figure 2.
    """
    norm = {"weight": weight, "bias": bias}
    ids = {"input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids}
    tables = {
        "word_embeddings": word_embeddings,
        "token_type_embeddings": token_type_embeddings,
        "position_embeddings": position_embeddings,
    }
    optional = "token_type_ids", "token_type_embeddings", "position_ids", "position_embeddings"
    checks.tensors(*optional, **ids, **tables, **norm)
    checks.same_device(**ids, **tables, **norm)
    checks.integer(**ids)
    checks.floating(**tables, **norm)
    checks.same_dtype(**tables)
    checks.matrices(**tables)
    width = word_embeddings.shape[-1]
    for (ids_name, indices), (table_name, table) in zip(ids.items(), tables.items(), strict=True):
        if table is not None:
            checks.shape(table_name, table, (len(table), width), "rows of the width of word_embeddings")
        if indices is not None:
            _check_ids(ids_name, indices, table_name, table, input_ids)
    checks.shape("weight", weight, (width,), "the width of word_embeddings")
    checks.shape("bias", bias, (width,), "the width of word_embeddings")
    checks.epsilon(eps)
    checks.dropout(dropout_p, seed)
    if position_embeddings is not None and position_ids is None and input_ids.shape[-1] > len(position_embeddings):
        limit = len(position_embeddings)
        raise ShapeError(f"input_ids: got {input_ids.shape[-1]} tokens in a row, position_embeddings has {limit} rows")
    name = pick("embedding_layer_norm", _BACKENDS, backend)
    twin = portable if name == "torch" else reference
    return twin.embedding_layer_norm(
        input_ids,
        word_embeddings,
        weight,
        bias,
        token_type_ids=token_type_ids,
        token_type_embeddings=token_type_embeddings,
        position_ids=position_ids,
        position_embeddings=position_embeddings,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
    )


def _check_ids(name: str, ids: Tensor, table_name: str, table: Tensor | None, input_ids: Tensor) -> None:
    if table is None:
        raise ConfigError(f"{name}: got a tensor, expected None where {table_name} is None")
    sizes = zip(ids.shape[::-1], input_ids.shape[::-1], strict=False)
    if not 0 < ids.dim() <= input_ids.dim() or any(got not in (1, size) for got, size in sizes):
        expected = "at least one dimension" if ids is input_ids else f"{tuple(input_ids.shape)} as input_ids, or less"
        raise ShapeError(f"{name}: got shape {tuple(ids.shape)}, expected {expected}")
    checks.indices(name, ids, len(table), f"rows of {table_name}")
