"""Short batches answered as soon as possible: a model compiled into CUDA graphs, one per number of tokens."""

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastbert.errors import ConfigError, DtypeError, ShapeError
from fastbert.inference import InferenceEncoder
from fastbert.models.base import EncoderModel, PretrainedModel, Rows
from fastbert.models.outputs import ModelOutput
from fastbert.models.tasks import MultipleChoiceModel
from fastbert.nn import Encoder
from fastbert.ops import checks
from fastbert.packing import Layout

_SHAPES = 256  # of calls without a mask, whose layouts are kept
_CAPTURING = threading.Lock()  # a process can capture one graph at a time


def compile_for_latency(
    model: PretrainedModel, max_batch: int = 8, max_length: int | None = None, *, dtype: torch.dtype | None = None
) -> "LatencyModel":
    """A callable that answers what `model` would in evaluation mode, as soon as it can be done; without gradients.

    model: any fastbert model but a multiple choice, on the device on which it is to run.
    max_batch, max_length: the most sequences in a call, and the longest; max_length None: 512, or what the position
      table allows if that is less.
    dtype: of weights and results; None: the model's. On a GPU float16 or bfloat16 are meant: float32 has neither
      kernels nor graphs.

    On a GPU the whole model, from the ids to the outputs of its heads, is a CUDA graph for every number of tokens in
    use, rounded up to a quarter of a power of two; the first call of a size captures it, which takes seconds, or
    `warm_up()` all of them. Within the graph the encoder is ops.encoder_layers: a few launches a layer, and those of a
    shared layer find its weights in the cache. On a CPU the model runs directly, with the same packed weights.

    The choice of backends (use_backend, FASTBERT_BACKEND) at the first call of a size stays with its graph.

    Raises ConfigError (also where a module of the encoder carries an adapter or a hook, and where its layers differ in
    more than their weights), DtypeError.
    """
    return LatencyModel(model, max_batch, max_length, dtype)


class LatencyModel:
    """See compile_for_latency, which makes it.

    It has weights of its own. A call notices when those of `model` were written to, as by load_state_dict and most
    optimizers, and copies them again; what leaves no trace in a tensor's version (optimizers with fused=True, graphs of
    them, writes through .data, parameters put in the place of others) takes `refresh()`. Calls from several threads or
    streams wait for each other. `uncaptured` is the model that the graphs hold, for those who capture it in one of
    their own.
    """

    def __init__(self, model: PretrainedModel, max_batch: int, max_length: int | None, dtype: torch.dtype | None):
        _check(model, max_batch, max_length, dtype)
        self.model, self.max_batch = model, max_batch
        self.max_length = max_length or min(512, model.config.max_length or 512)
        with _no_tracking():
            self.uncaptured, self._copied = _copied(model, dtype)
        self._inner = next(m for m in self.uncaptured.modules() if isinstance(m, EncoderModel))
        self.device = next(self.uncaptured.parameters()).device
        # On a CPU there is nothing to capture. Attention in float32 keeps tables that may go while a graph needs them.
        kinds = {parameter.dtype for parameter in self.uncaptured.parameters()}
        self._in_buckets = self.device.type == "cuda" and kinds <= {torch.float16, torch.bfloat16}
        self._buckets: dict[int, _Bucket] = {}
        self._by_shape = type(self._inner).default_positions is EncoderModel.default_positions
        self._plain: dict[torch.Size, Rows] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._in_buckets else None
        self._lock = threading.RLock()
        self._done: torch.cuda.Event | None = None
        self._sources = self._sources_now()
        self._versions = self._versions_now()

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> ModelOutput:
        """The model's own output, without loss and hidden states, in tensors that stay the caller's. Arguments are the
        model's, and so are their errors; ShapeError for more sequences or longer ones than was said.

        Without a mask nothing waits for the GPU; a mask, or cu_seqlens without max_seqlen, has to be read first. Ids
        may be on the CPU. Masks with holes in a family that sees distances (RoFormer, NEZHA) are answered by the model,
        not by a graph. Autocast has no say: dtypes are those that were compiled for.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "cu_seqlens": cu_seqlens,
        }
        checks.tensors("cu_seqlens", "attention_mask", "token_type_ids", "position_ids", **given)
        with self._alone():
            given = {name: t.to(self.device) for name, t in given.items() if t is not None}
            if self._versions != self._versions_now():
                self.refresh()
            inputs = self._rows(given, max_seqlen)
            rows = inputs.input_ids.numel()
            if not self._in_buckets or inputs.layout.key_padding_mask is not None or rows == 0:
                return self.uncaptured(**given, max_seqlen=max_seqlen)
            return self._bucket(_size(rows, self.max_batch)).run(inputs)

    def refresh(self) -> None:
        """Copies the model's weights again, as they are now."""
        with self._alone():
            self._sources = self._sources_now()
            for (target, _, _), source in zip(self._copied, self._sources, strict=True):
                target.copy_(source)
            self._versions = self._versions_now()

    def warm_up(self, progress: bool = True) -> None:
        """Captures the graphs of all sizes now. Each keeps its outputs: of a masked-language model, all logits."""
        if not self._in_buckets:
            return
        sizes = sorted({_size(rows, self.max_batch) for rows in range(1, self.max_batch * self.max_length + 1)})
        with self._alone():
            for size in tqdm(sizes, desc="capturing graphs", unit="size", disable=not progress):
                self._bucket(size)

    def _rows(self, given: dict[str, Tensor], max_seqlen: int | None) -> Rows:
        """The rows of a call. Layout and positions of ids without a mask follow from their shape, and are kept."""
        ids = given["input_ids"]
        plain = self._by_shape and given.keys() == {"input_ids"} and max_seqlen is None
        if plain and ids.dtype == torch.int64 and ids.shape in self._plain:
            return self._plain[ids.shape]._replace(input_ids=ids.flatten())
        inputs = self._inner.rows(**given, max_seqlen=max_seqlen)
        batch, longest = inputs.layout.sizes
        if batch > self.max_batch or longest > self.max_length:
            raise ShapeError(
                f"got {batch} sequences of up to {longest} tokens; compiled for {self.max_batch} of up to "
                f"{self.max_length}: pass larger max_batch and max_length to compile_for_latency"
            )
        if plain and ids.dim() == 2:
            if len(self._plain) == _SHAPES:
                self._plain.clear()
            self._plain[ids.shape] = inputs._replace(input_ids=inputs.input_ids.new_empty(0))
        return inputs

    def _bucket(self, size: int) -> "_Bucket":
        if size not in self._buckets:
            self._buckets[size] = _Bucket(self.uncaptured, self._inner, size, self.max_batch, self._pool)
        return self._buckets[size]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What is done inside comes after what was done inside before, whatever threads and streams that was on."""
        with self._lock, _no_tracking(), torch.autocast(self.device.type, enabled=False):
            if self.device.type != "cuda":
                yield
                return
            with torch.cuda.device(self.device):
                if self._done is not None:
                    self._done.wait()
                try:
                    yield
                finally:
                    self._done = torch.cuda.Event()
                    self._done.record()

    def _sources_now(self) -> list[Tensor]:
        return [getattr(module, name).detach() for _, module, name in self._copied]

    def _versions_now(self) -> list[int]:
        return [source._version for source in self._sources]


@contextlib.contextmanager
def _no_tracking() -> Iterator[None]:
    """Without gradients, and also within inference_mode with tensors that can be written to outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _check(model: object, max_batch: object, max_length: object, dtype: object) -> None:
    if not isinstance(model, PretrainedModel):
        raise ConfigError(f"model: got a {type(model).__name__}, expected a model of fastbert")
    if isinstance(model, MultipleChoiceModel):
        raise ConfigError(
            f"model: got a {type(model).__name__}, whose calls have another shape; expected its encoder, .model"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError("model: got one made within torch.inference_mode, expected one made outside of it")
    limit = model.config.max_length
    for name, value in (("max_batch", max_batch), ("max_length", max_length)):
        if not (value is None and name == "max_length") and (type(value) is not int or value < 1):
            raise ConfigError(f"{name}: got {value!r}, expected an int, at least 1")
    if max_length is not None and limit is not None and max_length > limit:
        raise ConfigError(f"max_length: got {max_length}, expected at most {limit}, which the position table allows")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DtypeError(f"dtype: got {dtype!r}, expected a floating torch.dtype or None")


def _copied(
    model: PretrainedModel, dtype: torch.dtype | None
) -> tuple[PretrainedModel, list[tuple[Tensor, nn.Module, str]]]:
    """The model for inference; and (its tensor, a module of the model, the name of the parameter there) of all."""
    encoders = [module for module in model.modules() if isinstance(module, Encoder)]
    made = [InferenceEncoder(encoder, dtype) for encoder in encoders]
    same = copy.deepcopy(model, {id(old): new for old, new in zip(encoders, made, strict=True)}).eval()
    same.requires_grad_(False).to(dtype)
    copied = [place for encoder in made for place in encoder.copied]
    for path, parameter in same.named_parameters(remove_duplicate=False):
        path, _, name = path.rpartition(".")
        copied.append((parameter.detach(), model.get_submodule(path), name))
    return same, copied


def _size(rows: int, max_batch: int) -> int:
    """The rows of the graph that serves so many: a multiple of 16, of a quarter of the power of two below. It never is
    the number of sequences, so that outputs for tokens and for sequences can be told apart."""
    step = max(16, 1 << max(0, (rows - 1).bit_length() - 3))
    size = -(-rows // step) * step
    return size + 16 if size == max_batch + 1 else size


class _Bucket:
    """A graph for `size` rows: those of at most max_batch sequences, and a last one of what is left over."""

    def __init__(self, model: Callable, inner: EncoderModel, size: int, max_batch: int, pool):
        device = next(inner.parameters()).device
        self.size = size
        self.input_ids = torch.full((size,), inner.config.pad_token_id or 0, dtype=torch.int64, device=device)
        self.token_type_ids = torch.zeros_like(self.input_ids)
        absolute = inner.config.attention == "absolute"
        self.position_ids = torch.zeros_like(self.input_ids) if absolute else None
        self.cu_seqlens = torch.full((max_batch + 2,), size, dtype=torch.int32, device=device)
        self.cu_seqlens[0] = 0
        self._typed, self._layout = False, None  # what the last call left here
        self._run = partial(
            model,
            input_ids=self.input_ids,
            token_type_ids=self.token_type_ids,
            position_ids=self.position_ids,
            cu_seqlens=self.cu_seqlens,
            max_seqlen=size,
        )
        self._graph = None
        if device.type == "cuda":
            self._capture(pool)
        else:
            self._output = self._run()

    def _capture(self, pool) -> None:
        stream = torch.cuda.Stream()  # of this device, which the default one of torch.cuda.graph need not be
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()  # compiles the kernels and makes the tables
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
            self._output = self._run()

    def run(self, inputs: Rows) -> ModelOutput:
        rows, layout = len(inputs.input_ids), inputs.layout
        self.input_ids[:rows] = inputs.input_ids
        if inputs.token_type_ids is not None:
            self.token_type_ids[:rows] = inputs.token_type_ids
        elif self._typed:
            self.token_type_ids.zero_()
        self._typed = inputs.token_type_ids is not None
        if layout is not self._layout:
            if inputs.position_ids is not None:
                self.position_ids[:rows] = inputs.position_ids
            batch = layout.sizes[0]
            self.cu_seqlens[: batch + 1] = layout.cu_seqlens
            self.cu_seqlens[batch + 1 : -1] = rows
            self._layout = layout
        if self._graph is None:  # what a graph does: the same memory again
            for name, result in vars(self._run()).items():
                if result is not None:
                    self._output[name].copy_(result)
        else:
            self._graph.replay()
        answers = {name: self._answer(self._output[name], rows, layout) for name in self._output.keys()}
        return dataclasses.replace(self._output, **answers)

    def _answer(self, result: Tensor, rows: int, layout: Layout) -> Tensor:
        """What of a result is the caller's, in memory of its own."""
        if len(result) != self.size:
            return result[: layout.sizes[0]].clone()
        answer = layout.unpack(result[:rows], self._output.padding)
        return answer if layout.indices is not None else answer.clone()
