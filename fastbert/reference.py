"""The mathematics: every op in eager PyTorch, in any dtype up to float64, written to be read.

Legend. q k v o: queries, keys, values, output; lse: log-sum-exp; do dq dk dv: gradients. B batch, L length, T packed
tokens, H heads, D head dim, C hidden size, V vocabulary, R max relative position; i query index, j key index.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastbert.philox import attention_keep, keep_scale, row_keep

# ---------------------------------------------------------------- attention
#
# Dense q, k, v are [B, L, H, D]. Packed ones are [T, H, D] with the ends of the sequences in cu_seqlens, and every
# sequence is computed on its own (max_seqlen is not needed here). The position of a token is its index in its sequence.
# Masks hide keys only: a query at a masked position is answered like any other.


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """S_ij = scale q_i.k_j, P = softmax_j(S), O_i = sum_j dropout(P)_ij v_j; scale is 1/sqrt(D) unless given.

    Vaswani et al., Attention Is All You Need (2017), arXiv 1706.03762, equation 1; without a causal mask, and with
    dropout on the probabilities, as in BERT.
    """

    def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: int) -> Tensor:
        q, k, v = _hide_padding(q, k, v, mask)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * _scale(scale, q)
        p = _dropped_probabilities(scores, mask, dropout_p, seed, first)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    return _each_sequence(one, q, k, v, key_padding_mask, cu_seqlens)


def rotary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    theta: float = 10000.0,
    rotate_value: bool = False,
    interleaved: bool = True,
) -> Tensor:
    """Attention over q and k (and v, with rotate_value) turned by their positions, so that scores depend on i - j only.

    Su et al., RoFormer (2021), arXiv 2104.09864, equation 16; the rotation is equation 34, see `rotate`.
    """

    def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: int) -> Tensor:
        q, k, v = _hide_padding(q, k, v, mask)
        q, k = rotate(q, theta, interleaved), rotate(k, theta, interleaved)
        v = rotate(v, theta, interleaved) if rotate_value else v
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * _scale(scale, q)
        p = _dropped_probabilities(scores, mask, dropout_p, seed, first)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    return _each_sequence(one, q, k, v, key_padding_mask, cu_seqlens)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    max_relative_position: int = 64,
) -> Tensor:
    """S_ij = scale q_i.(k_j + a_ij), P = softmax_j(S), O_i = sum_j dropout(P)_ij (v_j + a_ij), with the constants
    a_ij = T[clip(j - i, -R, R) + R] of the table T of `sinusoids`, the same for all heads.

    Wei et al., NEZHA (2019), arXiv 1909.00204, section 2.2: equation 4 (output), 5 (scores), 6 and 7 (a_ij, functional
    in place of the learned vectors of Shaw et al., 2018, arXiv 1803.02155, equations 3 and 4). Equations 6 and 7 take
    the sine and the cosine of (j - i) theta_k. The released code, which the released weights need and which we follow,
    looks up row clip(j - i, -R, R) + R of a table whose row r holds the angles r theta_k: each angle is R theta_k more.

    Kernels need no table of pairs (i, j). Write s_n for the vector of the pairs (sin n theta_k, cos n theta_k), so that
    T[r] = s_r, and call x turned by a what `rotate` makes of x at position a: the pair (y, z) number k becomes
    (y cos a theta_k - z sin a theta_k, z cos a theta_k + y sin a theta_k). The theorems of addition say, for all a, b:

        x.s_(a+b) = (x turned by a).s_b          and          s_(a+b) = s_b turned by -a.

    1. Inside the band |j - i| < R, a_ij = s_((R - (i - m)) + (j - m)) for any origin m. Scores: with q~_i, which is q_i
       turned by R - (i - m), q_i.a_ij = q~_i.s_(j - m). Output: sum_j P_ij a_ij is sum_j P_ij s_(j - m) turned by
       -(R - (i - m)). Both sums are products of matrices, over j as they stand. m near i and j keeps angles small.
    2. Outside, a_ij is T[0] to the left (j < i) and T[2R] to the right: one number per row for the scores, q_i.T[0] or
       q_i.T[2R], and one for the output, the sum of P_ij over that side.
    3. dP_ij = do_i.(v_j + a_ij) has the form of the scores, with do for q and v for k, and dq_i = scale sum_j dS_ij
       (k_j + a_ij) that of the output, with dS for P and k for v: 1 and 2 serve both. dk and dv are those of plain
       attention, and so is delta_i = do_i.O_i. T is constant.
    """

    def one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, first: int) -> Tensor:
        q, k, v = _hide_padding(q, k, v, mask)
        i = torch.arange(q.shape[1], device=q.device)
        offset = (i[None, :] - i[:, None]).clamp(-max_relative_position, max_relative_position)
        a = sinusoids(max_relative_position, q.shape[-1], _tables_on(q)).to(q)[offset + max_relative_position]
        scores = (torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,ijd->bhij", q, a)) * _scale(scale, q)
        p = _dropped_probabilities(scores, mask, dropout_p, seed, first)
        return torch.einsum("bhij,bjhd->bihd", p, v) + torch.einsum("bhij,ijd->bihd", p, a)

    return _each_sequence(one, q, k, v, key_padding_mask, cu_seqlens)


def rotate(x: Tensor, theta: float, interleaved: bool = True) -> Tensor:
    """x [B, L, H, D] with its pairs of elements, number k = 0, 1, ..., turned by m theta^(-2k/D) at position m.

    RoFormer, equation 34. Pairs are (2k, 2k + 1) when interleaved, as in the paper and in RoFormer's weights, else
    (k, k + D/2). Angles come from float64, the arithmetic is float32 at least, the result has x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    position = torch.arange(x.shape[1], dtype=torch.float64, device=_tables_on(x))
    angle = torch.outer(position, _frequencies(x.shape[-1], theta, position.device))[:, None]
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x.dtype)


def sinusoids(max_relative_position: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """NEZHA's table T, float64 [2R + 1, D]: T[r, 2k] = sin(r theta_k) and T[r, 2k + 1] = cos(r theta_k), with
    theta_k = 10000^(-2k/D)."""
    row = torch.arange(2 * max_relative_position + 1, dtype=torch.float64, device=device)
    angle = torch.outer(row, _frequencies(head_dim, 10000.0, device))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def _frequencies(head_dim: int, theta: float, device: torch.device | str) -> Tensor:
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)


def _tables_on(x: Tensor) -> torch.device | str:
    """Where tables in float64 are made: on a GPU, which then need not wait for the CPU; else on the CPU."""
    return x.device if x.is_cuda else "cpu"


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _hide_padding(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Zero for masked keys and values, and for what is not finite in the queries there: a weight of zero does not hide
    a NaN."""
    if mask is None:
        return q, k, v
    real = mask[:, :, None, None]
    return q.where(real | q.isfinite(), 0), k.where(real, 0), v.where(real, 0)


def _dropped_probabilities(scores: Tensor, mask: Tensor | None, p: float, seed: int | None, first: int) -> Tensor:
    """dropout(softmax(scores [B, H, L, L])) over the real keys, zeros where there are none. `first` is the number of
    the first sequence."""
    if mask is None:
        probabilities = scores.softmax(dim=-1)
    else:
        real = mask[:, None, None, :]
        probabilities = scores.where(real, torch.finfo(scores.dtype).min).softmax(dim=-1).where(real, 0)
    if p == 0.0:
        return probabilities
    if seed is None:
        return torch.nn.functional.dropout(probabilities, p)
    batch, heads, length, _ = scores.shape
    keep = attention_keep(seed, p, batch, heads, length, first=first, device=scores.device)
    return probabilities * keep * keep_scale(p)


def _each_sequence(
    one: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """one(q, k, v, mask, first) of the dense batch, or of each packed sequence as a batch of one."""
    if cu_seqlens is None:
        return one(q, k, v, mask, 0)
    outputs = [q[:0]]
    for number, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        outputs.append(one(*(t[None, start:end] for t in (q, k, v)), None, number)[0])
    return torch.cat(outputs)


# ---------------------------------------------------------------- around the layer


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """LN(residual + dropout(x + x_bias)), the end of both halves of a post-LN layer, in residual's dtype.

    Vaswani et al. (2017), arXiv 1706.03762, section 5.4: dropout on the output of each sub-layer, before it is added
    and normalised. LN: see `layer_norm`. x_bias is the bias of the linear layer before, if that left it out; the sum
    with it is float32 at least.
    """
    if x_bias is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide) + x_bias.to(wide)
    return layer_norm(residual + dropout(x, dropout_p, seed), weight, bias, eps).to(residual.dtype)


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """GELU(z) = z Phi(z) at z = x + bias, where Phi is the normal distribution function.

    Hendrycks and Gimpel, Gaussian Error Linear Units (2016), arXiv 1606.08415, section 2: the exact form with erf
    ("none") and the approximation with tanh ("tanh"). They differ by up to 4.7e-4, and checkpoints need the one that
    they were trained with. The arithmetic is float32 at least; the result has x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) + bias.to(wide)
    if approximate == "tanh":
        y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    else:
        y = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    return y.to(x.dtype)


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
) -> Tensor:
    """dropout(LN(word[ids] + type[tt] + position[p])), each table only if it is given.

    Devlin et al., BERT (2018), arXiv 1810.04805, figure 2; the order sum, LN, dropout is that of its code. Without ids
    of its own, the type is 0, and the position is the index in the last dimension.
    """
    x = word_embeddings[input_ids]
    if token_type_embeddings is not None:
        x = x + token_type_embeddings[torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids]
    if position_embeddings is not None:
        places = torch.arange(input_ids.shape[-1], device=input_ids.device)
        x = x + position_embeddings[places if position_ids is None else position_ids]
    return dropout(layer_norm(x, weight, bias, eps), dropout_p, seed)


def encoder_layers(
    x: Tensor,
    layers: Sequence,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    heads: int,
    act: str,
    eps: float,
    every: bool = False,
) -> list[Tensor]:
    """The results of post-LN layers one after another, without dropout, of every one or of the last:

        y = LN(x + Wo attention(Wq x, Wk x, Wv x)),  z = LN(y + Wdown act(Wup y)),  and z is the next layer's x.

    x [..., C]; layers: an ops.encoder_layers.LayerWeights for each application, so a shared layer's time and again.
    act: "none" or "tanh", the forms of gelu (see `bias_gelu`), "relu" or "silu".

    Devlin et al., BERT (2018), arXiv 1810.04805, section 3; Lan et al., ALBERT (2019), arXiv 1909.11942, section 3.1:
    one layer's weights in all applications.
    """
    results = []
    for w in layers:
        qkv = (x @ w.qkv.T + w.qkv_bias.to(x.dtype)).unflatten(-1, (3, heads, -1))
        o = attend(*qkv.unbind(-3)).flatten(-2) @ w.output.T + w.output_bias.to(x.dtype)
        y = layer_norm(x + o, w.attention_norm, w.attention_norm_bias, eps)
        h, bias = y @ w.up.T, w.up_bias.to(x.dtype)
        if act in ("none", "tanh"):
            h = bias_gelu(h, bias, approximate=act)
        else:
            h = {"relu": torch.relu, "silu": torch.nn.functional.silu}[act](h + bias)
        x = layer_norm(y + (h @ w.down.T + w.down_bias.to(x.dtype)), w.output_norm, w.output_norm_bias, eps)
        results.append(x)
    return results if every else results[-1:]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The masked language model's loss: mean or sum of -log softmax(W h + b)[label] over the rows that have a label.

    Devlin et al., BERT (2018), arXiv 1810.04805, section 3.1, task 1. The arithmetic and the result are float32 at
    least. Rows whose label is ignore_index do not exist; if there are no others, the loss is 0.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    labelled = labels != ignore_index
    logits = hidden[labelled].to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    loss = (logits.logsumexp(-1) - logits.gather(-1, labels[labelled][:, None]).squeeze(-1)).sum()
    return loss / labelled.sum().clamp(min=1) if reduction == "mean" else loss


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """w (x - mean x) / sqrt(var x + eps) + b over the last dimension, with the biased variance and eps inside the root.

    Ba, Kiros and Hinton, Layer Normalization (2016), arXiv 1607.06450, equation 3. The arithmetic is float32 at least,
    because in 16 bits an eps of 1e-12 is zero; the result has x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (weight * normal + bias).to(x.dtype)


def dropout(x: Tensor, p: float, seed: int | None) -> Tensor:
    """Each element is zero with probability p, else divided by the probability of being kept.

    Srivastava et al., Dropout (2014), JMLR 15, section 4. With a seed, philox.py says which
    elements of x, as rows of its last dimension, are kept; without one, PyTorch's generator does.
    """
    if p == 0.0:
        return x
    if seed is None:
        return torch.nn.functional.dropout(x, p)
    kept = row_keep(seed, p, math.prod(x.shape[:-1]), x.shape[-1], device=x.device).view(x.shape)
    return x * kept * keep_scale(p)


# ---------------------------------------------------------------- optimizer


def lamb_scale(grads: Sequence[Tensor], grad_scale: float, max_grad_norm: float | None) -> tuple[float, Tensor]:
    """What every gradient of a LAMB step is divided by, and G = |all gradients of all groups| / grad_scale, in float64.

    The divisor is grad_scale max(1, G / max_grad_norm): gradients are never scaled up. Where G is not finite, the step
    is not made: parameters, moments and the count of steps stay as they are.
    """
    norm = torch.stack([g.double().norm() for g in grads]).norm() / grad_scale
    clip = 1.0 if max_grad_norm is None else max(1.0, norm.item() / max_grad_norm)
    return grad_scale * clip, norm


def lamb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    grad_averaging: bool = True,
    always_adapt: bool = False,
    grad_scale: float = 1.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One LAMB step of one parameter group: the new params, exp_avgs (m) and exp_avg_sqs (v). `step` counts from 1.

    You et al., Large Batch Optimization for Deep Learning (2019), arXiv 1904.00962, algorithm 2, with phi the identity,
    in the form of apex's FusedLAMB. For every tensor, at step t and with g = grad / grad_scale, where grad_scale is the
    divisor of lamb_scale:

        m = b1 m + (1 - b1) g        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p
        v = b2 v + (1 - b2) g^2      p = p - lr ratio u

    ratio = |p| / |u| where both are non-zero and (weight_decay != 0 or always_adapt), else 1. Without grad_averaging g
    enters m with weight 1; without bias_correction both (1 - b^t) are 1. Of 16-bit parameters, p is the float32 master.
    What others do is in lamb_of.
    """
    b1, b2 = betas
    b3 = 1 - b1 if grad_averaging else 1.0
    correction1, correction2 = (1 - b1**step, 1 - b2**step) if bias_correction else (1.0, 1.0)
    results = []
    for p, grad, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = grad.to(m.dtype) / grad_scale
        m = b1 * m + b3 * g
        v = b2 * v + (1 - b2) * g**2
        u = (m / correction1) / ((v / correction2).sqrt() + eps) + weight_decay * p
        p_norm, u_norm = p.to(m.dtype).norm(), u.norm()
        ratio = torch.where((p_norm == 0) | (u_norm == 0), 1.0, p_norm / u_norm)
        if weight_decay == 0 and not always_adapt:
            ratio = 1.0
        results.append((p - lr * ratio * u, m, v))
    params, exp_avgs, exp_avg_sqs = ([result[i] for result in results] for i in range(3))
    return params, exp_avgs, exp_avg_sqs


LAMBS = ("apex", "nvlamb", "timm-trust-clip", "albert", "nezha", "deepspeed", "torch-optimizer")


def lamb_of(
    implementation: str, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *, step, lr, betas, eps, weight_decay, exempt=False
) -> tuple[Tensor, Tensor, Tensor]:
    """The step of one tensor as other implementations make it (LAMBS), to say in what they differ; g is unscaled.

        implementation       clipping       bias correction       eps                ratio
        apex                 global, to 1   yes                   outside the root   |p| / |u|; exempt tensors 1
        nvlamb               global, to 1   yes                   outside            |p| / |u| for all
        timm-trust-clip      global, to 1   yes                   outside            as apex, at most 1
        albert (TensorFlow)  global, to 1   no                    outside            as apex
        nezha (TensorFlow)   global, to 1   yes                   inside for |u|     for all, in [0, 10]
        deepspeed            by the caller  in lr only, not in u  outside            for all, in [0.01, 10]
        torch-optimizer      none           no                    outside            for all, with |p| at most 10

    exempt: a tensor without decay. Its u has no weight_decay p, but nezha's |u| has, and asks |g| for zero, not |u|.
    apex, timm, albert and TensorFlow Addons (no clipping, else as apex) agree with `lamb`. Clipping is the caller's.
    """
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    folded = implementation in ("albert", "deepspeed", "torch-optimizer")  # no correction in u
    m_hat, v_hat = (m, v) if folded else (m / (1 - b1**step), v / (1 - b2**step))
    u = m_hat / (v_hat.sqrt() + eps) + (0.0 if exempt else weight_decay) * p
    p_norm, u_norm, zero_norm = p.norm(), u.norm(), u.norm()
    if implementation == "nezha":
        u_norm, zero_norm = (m_hat / (v_hat + eps).sqrt() + weight_decay * p).norm(), g.norm()
    if implementation == "torch-optimizer":
        p_norm = p_norm.clamp(max=10)
    ratio = torch.where((p_norm == 0) | (zero_norm == 0), 1.0, p_norm / u_norm)
    if implementation in ("apex", "timm-trust-clip", "albert") and exempt:
        ratio = torch.ones_like(ratio)
    if implementation == "timm-trust-clip":
        ratio = ratio.clamp(max=1)
    if implementation in ("nezha", "deepspeed"):
        ratio = ratio.clamp(min=0.01 if implementation == "deepspeed" else 0, max=10)
    if implementation == "deepspeed":
        lr = lr * (1 - b2**step) ** 0.5 / (1 - b1**step)
    return p - lr * ratio * u, m, v
