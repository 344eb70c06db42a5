"""What labels must be, and which rows have one."""

import torch
from torch import Tensor

from fastbert.errors import DataError, DtypeError, ShapeError
from fastbert.ops import checks
from fastbert.packing import Layout

IGNORE_INDEX = -100


def check_labels(labels: Tensor, places: Tensor, limit: int, of: str, like: str = "input_ids") -> None:
    """Labels are integers, one for each of `places`, from 0 to limit - 1 or IGNORE_INDEX."""
    checks.tensors(labels=labels)
    checks.integer(labels=labels)
    if labels.shape != places.shape:
        raise ShapeError(f"labels has shape {list(labels.shape)}; expected {list(places.shape)}, the shape of {like}")
    checks.indices("labels", labels, limit, of, besides=IGNORE_INDEX)


def check_class_labels(labels: Tensor, logits: tuple[int, ...], of: str) -> None:
    """Labels are integers, one for each row of logits `[B, N]`, from 0 to N - 1 or IGNORE_INDEX."""
    checks.tensors(labels=labels)
    checks.integer(labels=labels)
    if labels.shape != logits[:1]:
        raise ShapeError(f"labels has shape {list(labels.shape)}; expected {list(logits[:1])}, one for each sequence")
    checks.indices("labels", labels, logits[1], of, besides=IGNORE_INDEX)


def check_values(labels: Tensor, shape: tuple[int, ...], between: tuple[float, float] | None = None) -> None:
    """Labels are finite numbers of that shape, between two others. Their values are looked at on the CPU only: on a GPU
    that would have to be waited for."""
    if labels.is_complex():
        raise DtypeError(f"labels is {labels.dtype}; expected bool, integers or floating numbers")
    if labels.shape != shape:
        raise ShapeError(f"labels has shape {list(labels.shape)}; expected {list(shape)}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return
    least, most = between or (-torch.inf, torch.inf)
    wrong = ~torch.isfinite(labels) | (labels < least) | (labels > most)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        limits = "a finite number" if between is None else f"{least} to {most}"
        raise DataError(f"labels{place}: got {labels[tuple(place)].item()}, expected {limits}")


def check_word_labels(
    labels: Tensor | None,
    label_positions: Tensor | None,
    input_ids: Tensor,
    cu_seqlens: Tensor | None,
    limit: int,
) -> None:
    """Labels are ids of the vocabulary, one for each of input_ids or of label_positions."""
    if label_positions is not None:
        check_label_positions(label_positions, labels, input_ids, cu_seqlens, limit)
    else:
        check_labels(labels, input_ids, limit, "ids of the vocabulary")


def check_label_positions(
    positions: Tensor, labels: Tensor | None, input_ids: Tensor, cu_seqlens: Tensor | None, limit: int
) -> None:
    """label_positions are places of packed input_ids, with a label for each."""
    checks.tensors(label_positions=positions, labels=labels)
    checks.integer(label_positions=positions, labels=labels)
    if cu_seqlens is None:
        raise ShapeError("label_positions were given without cu_seqlens; expected None for padded input")
    if positions.dim() != 1:
        raise ShapeError(f"label_positions has shape {list(positions.shape)}; expected one dimension")
    checks.indices("label_positions", positions, len(input_ids), "packed tokens")
    check_labels(labels, positions, limit, "ids of the vocabulary", like="label_positions")


def labelled_rows(labels: Tensor, label_positions: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor | None]:
    """Labels `[N]` and the places of their rows `[N]`; all rows, and None, where a compiler asks, for which N would
    depend on data."""
    if label_positions is not None:
        return labels, label_positions
    labels = labels_of_rows(labels, layout).flatten()
    if torch.compiler.is_compiling():
        return labels, None
    positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return labels[positions], positions


def labels_of_rows(labels: Tensor, layout: Layout) -> Tensor:
    """Labels as rows; a padded position has none."""
    labels = layout.pack(labels)
    return labels if layout.key_padding_mask is None else labels.masked_fill(~layout.key_padding_mask, IGNORE_INDEX)
