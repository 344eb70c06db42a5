"""Token shards on disk: Arrow IPC files behind a checksummed manifest, memory-mapped and zero-copy into numpy.

A corpus folder holds <split>-00000.arrow, ... for the splits "train" and "validation", manifest.json, tokenizer/ (a
copy of the tokenizer) and, if matplotlib is installed, lengths.png (how long rows and documents are). One row of a
shard is one row of text: document int64, input_ids list<uint16|int32>, word_start list<uint8>. pyarrow, datasets,
polars and DuckDB open them as they are.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from fastbert.data.tokenizer import Tokenizer
from fastbert.errors import DataError, MissingFileError, shown
from fastbert.files import is_plain_name, read_json

FORMAT, VERSION = "fastbert corpus", 1
MANIFEST, PICTURE = "manifest.json", "lengths.png"
_CHUNK = 1 << 18


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard file."""

    file: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """The arrays of one shard, views of the mapped file: row i is input_ids[row_offsets[i]:row_offsets[i + 1]],
    word_start alike."""

    input_ids: np.ndarray  # uint16 or int32 [tokens]
    word_start: np.ndarray  # uint8 [tokens]
    row_offsets: np.ndarray  # int32 [rows + 1]
    documents: np.ndarray  # int64 [rows]


class ShardWriter:
    """Collects the rows of one split and writes a shard each time `shard_tokens` are reached."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int):
        self._folder, self._split, self._limit = folder, split, shard_tokens
        self._ids_type = pa.uint16() if vocab_size <= 1 << 16 else pa.int32()
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._held = 0
        self._shards: list[ShardInfo] = []

    def add(self, documents: np.ndarray, lengths: np.ndarray, ids: np.ndarray, word_start: np.ndarray) -> None:
        self._parts.append((documents, lengths, ids, word_start))
        self._held += len(ids)
        if self._held >= self._limit:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        documents, lengths, ids, word_start = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        columns = [
            pa.array(documents, pa.int64()),
            pa.ListArray.from_arrays(offsets, pa.array(ids, self._ids_type)),
            pa.ListArray.from_arrays(offsets, pa.array(word_start, pa.uint8())),
        ]
        batch = pa.record_batch(columns, schema=_schema(self._ids_type))
        path = self._folder / shard_name(self._split, len(self._shards))
        with pa.ipc.new_file(path, batch.schema) as writer:
            writer.write_batch(batch)
        self._shards.append(ShardInfo(path.name, len(lengths), len(ids), path.stat().st_size, sha256_of(path)))
        self._parts, self._held = [], 0

    def table(self) -> list[dict]:
        """The shards written so far, as the manifest lists them."""
        return [asdict(shard) for shard in self._shards]


class Corpus:
    """One split of a prepared folder, memory-mapped. len(corpus) is the number of rows; `tokens` the number of pieces;
    `shards` the arrays.

    Picklable: a copy in another process maps the same files again.
    """

    def __init__(self, folder: Path, split: str, manifest: dict, infos: list[ShardInfo]):
        self.folder, self.split, self.manifest = folder, split, manifest
        self.fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.shards = [_map_shard(folder / info.file, info) for info in infos]
        self.tokens = sum(len(shard.input_ids) for shard in self.shards)

    @classmethod
    def open(
        cls,
        folder: str | PathLike,
        split: str = "train",
        *,
        tokenizer: Tokenizer | None = None,
        verify: bool = True,
        progress: bool = True,
    ) -> "Corpus":
        """Open a split of a folder that `prepare` wrote.

        Existence, size and footer of each shard are always checked, the sha256 unless verify=False. MissingFileError:
        no folder, manifest or shard. DataError: a damaged manifest or shard, no such split, or a `tokenizer` other
        than the one the corpus was made with.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            known = ", ".join(map(shown, manifest["splits"]))
            raise DataError(f"{folder / MANIFEST}: splits has no {split!r}, expected one of {known}")
        infos = _shard_infos(folder / MANIFEST, manifest, split)
        for info in infos:
            _check_size(folder / info.file, info)
        for info in tqdm(infos, desc=f"verifying {split}", unit="shard", delay=2, disable=not (verify and progress)):
            if verify and sha256_of(folder / info.file) != info.sha256:
                raise DataError(
                    f"{folder / info.file} is damaged: its sha256 is not {info.sha256}, which the manifest states"
                )
        corpus = cls(folder, split, manifest, infos)
        if tokenizer is not None:
            corpus.check_tokenizer(tokenizer)
        return corpus

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """DataError, naming both fingerprints, unless `tokenizer` gives the ids that this corpus holds."""
        if tokenizer.fingerprint != self.fingerprint:
            raise DataError(
                f"{self.folder} was made with the tokenizer {self.fingerprint}, got {tokenizer.fingerprint}"
            )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made this corpus, from the copy beside it."""
        tokenizer = Tokenizer.from_pretrained(self.folder / "tokenizer")
        self.check_tokenizer(tokenizer)
        return tokenizer

    def __len__(self) -> int:
        return sum(len(shard.documents) for shard in self.shards)

    def __repr__(self) -> str:
        size = f"{len(self)} rows, {self.tokens} tokens, {len(self.shards)} shards"
        return f"Corpus({str(self.folder)!r}, {self.split!r}: {size})"

    def __reduce__(self):
        return _reopen, (self.folder.absolute(), self.split)


def unigram_entropy(corpus: Corpus) -> float:
    """Entropy of the pieces of a split in nats per piece: the loss of a model that knows their frequencies and nothing
    else. [UNK] counts as a piece; [CLS], [SEP] and [PAD] are not stored and do not count."""
    counts = sum(np.bincount(shard.input_ids, minlength=corpus.vocab_size) for shard in corpus.shards)
    share = counts[counts > 0] / corpus.tokens
    return float(-(share * np.log(share)).sum())


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.arrow"


def read_manifest(folder: Path) -> dict:
    """The manifest of a corpus folder, with the fields that opening relies on checked."""
    path = folder / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist, expected a folder written by fastbert prepare")
    manifest = read_json(path, DataError)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a {FORMAT}: its format is {shown(manifest.get('format'))}")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path} has format version {shown(manifest.get('version'))}, expected {VERSION}")
    tokenizer = _field(path, manifest, "tokenizer", dict)
    _field(path, tokenizer, "fingerprint", str, "tokenizer.")
    _field(path, tokenizer, "vocab_size", int, "tokenizer.")
    for name in ("splits", "settings"):
        _field(path, manifest, name, dict)
    return manifest


def write_manifest(folder: Path, content: dict) -> None:
    """Write the manifest, synced to disk, whole or not at all."""
    content = {"format": FORMAT, "version": VERSION, **content}
    temporary = folder / f".{MANIFEST}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def _reopen(folder: Path, split: str) -> Corpus:
    return Corpus.open(folder, split, verify=False)


def _field(path: Path, content: dict, name: str, kind: type, above: str = ""):
    value = content.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f"{path}: the field {above + name!r} is {shown(value)}, expected a value of type {kind.__name__}"
        )
    return value


def _shard_infos(path: Path, manifest: dict, split: str) -> list[ShardInfo]:
    infos, above = [], f"splits.{split}."
    kinds = ShardInfo.__annotations__
    for entry in _field(path, _field(path, manifest["splits"], split, dict, "splits."), "shards", list, above):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: one of {above}shards is {shown(entry)}, expected an object")
        info = ShardInfo(**{name: _field(path, entry, name, kind, f"{above}shards.") for name, kind in kinds.items()})
        if not is_plain_name(info.file):
            raise DataError(f"{path}: the file of a shard is {shown(info.file)}, expected a name in its folder")
        infos.append(info)
    if not infos:
        raise DataError(f"{path}: the split {split!r} has no shards")
    return infos


def _check_size(path: Path, info: ShardInfo) -> None:
    if not path.is_file():
        raise MissingFileError(f"the shard {path} does not exist, expected {info.bytes} bytes")
    size = path.stat().st_size
    if size != info.bytes:
        verdict = "it is cut short" if size < info.bytes else "it was changed"
        raise DataError(f"the shard {path} has {size} bytes, expected {info.bytes}: {verdict}")


def _map_shard(path: Path, info: ShardInfo) -> Shard:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = reader.num_record_batches
        batch = reader.get_batch(0) if batches == 1 else None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Arrow file: {error}") from error
    if batch is None:
        raise DataError(f"{path} holds {batches} record batches, expected 1")
    shard = _arrays(path, batch)
    found = (len(shard.documents), len(shard.input_ids), len(shard.word_start), int(shard.row_offsets[-1]))
    if found != (info.rows, info.tokens, info.tokens, info.tokens):
        raise DataError(f"{path} holds {found[0]} rows and {found[1]} tokens, expected {info.rows} and {info.tokens}")
    return shard


def _arrays(path: Path, batch: pa.RecordBatch) -> Shard:
    try:
        if batch.schema not in (_schema(pa.uint16()), _schema(pa.int32())):
            columns = ", ".join(f"{column.name}: {column.type}" for column in batch.schema)
            raise DataError(f"{path} has the columns {columns}, expected document, input_ids and word_start")
        batch.validate()
        document, input_ids, word_start = batch.columns
        return Shard(
            input_ids=input_ids.values.to_numpy(zero_copy_only=True),
            word_start=word_start.values.to_numpy(zero_copy_only=True),
            row_offsets=input_ids.offsets.to_numpy(zero_copy_only=True),
            documents=document.to_numpy(zero_copy_only=True),
        )
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter for the name of a column
        raise DataError(f"{path} holds damaged columns: {error}") from error


def _schema(ids_type: pa.DataType) -> pa.Schema:
    return pa.schema({"document": pa.int64(), "input_ids": pa.list_(ids_type), "word_start": pa.list_(pa.uint8())})


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
