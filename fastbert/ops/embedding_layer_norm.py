"""dropout(LN(word + token type + position)), the input of the encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbert import portable, reference
from fastbert.backend import pick, serves, triton_cannot_run
from fastbert.errors import ConfigError, ShapeError
from fastbert.ops import checks
from fastbert.philox import seed_tensor, threshold

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_COLUMNS = 4096


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
    Returns [..., C] in word_embeddings' dtype. Differentiable in the tables, weight and bias. Backend "triton": C up to
    4096, float16, bfloat16 and float32 on CUDA; on the CPU in Triton's interpreter only, if asked for.

    Raises ShapeError (also when a sequence is longer than the table of positions), DtypeError, ConfigError (eps,
    dropout_p, seed, ids without their table), BackendError, and DataError for an id outside its table: on the CPU only,
    for on a GPU the check would have to wait for the device. There the row of such a token is NaN with "triton".
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
    backends = _ON_CUDA if input_ids.is_cuda else _ELSEWHERE
    name = pick("embedding_layer_norm", backends, backend, word_embeddings, weight, bias)
    return _TWINS[name](
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


def _triton_serves(word_embeddings: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    for name, t in {"word_embeddings": word_embeddings, "weight": weight, "bias": bias}.items():
        if t.dtype not in _DTYPES:
            return f"{name}: got {t.dtype}, not float16, bfloat16 or float32"
    if len(weight) > _MAX_COLUMNS:
        return f"the width is {len(weight)}, more than {_MAX_COLUMNS}"
    return triton_cannot_run(weight.device)


def _triton(
    input_ids: Tensor,
    word_embeddings: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    token_type_ids: Tensor | None,
    token_type_embeddings: Tensor | None,
    position_ids: Tensor | None,
    position_embeddings: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int | None,
) -> Tensor:
    seeds, drop = (seed_tensor(seed, input_ids.device), threshold(dropout_p)) if dropout_p > 0 else (None, 0)
    run = _forward_op if torch.compiler.is_compiling() else _EmbeddingLayerNorm.apply
    return run(
        *(input_ids, word_embeddings, token_type_ids, token_type_embeddings, position_ids, position_embeddings),
        *(weight, bias, seeds, float(eps), drop),
    )[0]


def _forward(
    input_ids: Tensor,
    word_embeddings: Tensor,
    token_type_ids: Tensor | None,
    token_type_embeddings: Tensor | None,
    position_ids: Tensor | None,
    position_embeddings: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seeds: Tensor | None,
    eps: float,
    drop: int,
) -> tuple[Tensor, Tensor]:
    """(y, stats of embedding_layer_norm_fwd)."""
    from fastbert.kernels.embedding import embedding_layer_norm_fwd

    tables = word_embeddings, token_type_embeddings, position_embeddings
    lookups, dropout = _parts(input_ids.shape, tables, (input_ids, token_type_ids, position_ids), seeds, drop)
    return embedding_layer_norm_fwd(*lookups, weight, bias, dropout, eps, input_ids.shape)


def _backward(
    dy: Tensor,
    input_ids: Tensor,
    word_embeddings: Tensor,
    token_type_ids: Tensor | None,
    token_type_embeddings: Tensor | None,
    position_ids: Tensor | None,
    position_embeddings: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seeds: Tensor | None,
    stats: Tensor,
    drop: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the tables, those of none empty, and of weight and bias."""
    from fastbert.kernels.embedding import embedding_layer_norm_bwd

    tables = word_embeddings, token_type_embeddings, position_embeddings
    lookups, dropout = _parts(input_ids.shape, tables, (input_ids, token_type_ids, position_ids), seeds, drop)
    gradients = embedding_layer_norm_bwd(dy, *lookups, weight, bias, stats, dropout)
    return tuple(dy.new_empty(0) if t is None else t for t in gradients)


def _parts(
    shape: torch.Size, tables: Sequence[Tensor | None], ids: Sequence[Tensor | None], seeds: Tensor | None, drop: int
):
    """The kernels' three lookups (None where there is no table), and dropout."""
    from fastbert.kernels.embedding import lookup
    from fastbert.kernels.launch import Dropout

    three = zip(tables, ids, (False, False, True), strict=True)
    lookups = [None if table is None else lookup(table, each, shape, in_order) for table, each, in_order in three]
    return lookups, None if seeds is None else Dropout(seeds, drop)


def _save(ctx, inputs, output):
    *tensors, _, ctx.drop = inputs
    ctx.set_materialize_grads(False)  # there is none of the statistics
    ctx.save_for_backward(*tensors, output[1])


def _gradients(backward, ctx, dy):
    if dy is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: checkpointing makes them anew
    dword, dkind, dplace, dweight, dbias = backward(dy, *saved, ctx.drop)
    _, _, _, kind, _, place, *_ = saved
    dkind, dplace = (None if table is None else t for t, table in ((dkind, kind), (dplace, place)))
    return None, dword, None, dkind, None, dplace, dweight, dbias, None, None, None


class _EmbeddingLayerNorm(torch.autograd.Function):
    """Eager: the registered operators below would add microseconds to every call."""

    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs, output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _):
        return _gradients(_backward, ctx, dy)


_forward_op = torch.library.custom_op("fastbert::embedding_layer_norm", _forward, mutates_args=())
_backward_op = torch.library.custom_op("fastbert::embedding_layer_norm_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(input_ids, word_embeddings, token_type_ids, types, position_ids, positions, weight, *_):
    stats = torch.empty(2, input_ids.numel(), dtype=torch.float32, device=weight.device)
    return word_embeddings.new_empty(*input_ids.shape, len(weight)), stats


@_backward_op.register_fake
def _(dy, input_ids, word_embeddings, token_type_ids, types, position_ids, positions, weight, bias, *_):
    like = word_embeddings, types, positions, weight, bias
    return tuple(dy.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like)


_forward_op.register_autograd(lambda ctx, dy, _: _gradients(_backward_op, ctx, dy), setup_context=_save)

_ON_CUDA = {"triton": _triton_serves, "torch": serves, "reference": serves}
_ELSEWHERE = {"torch": serves, "reference": serves, "triton": _triton_serves}
_TWINS = {"triton": _triton, "torch": portable.embedding_layer_norm, "reference": reference.embedding_layer_norm}
