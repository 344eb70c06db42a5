"""Pairs of segments, for next-sentence prediction (BERT), sentence-order prediction (ALBERT, MacBERT) and ELECTRA.

Sentences are the rows of a corpus, and the parts of rows that end in a mark that ends a Chinese sentence. As many whole
sentences of one document as fit make a chunk; which chunks there are follows from the seed alone, so that an epoch
always has as many samples. How a chunk becomes a pair is drawn anew in every epoch:

- "nsp" (arXiv 1810.04805): it is cut between two random sentences. With probability 1/2, and always if it is one
  sentence, the second segment gives way to text of another document, from a random sentence on. BERT's code would use
  the part that gives way in the next sample; here that would make the number of samples random, and it waits for
  another epoch. Labels: 0, the second follows the first; 1, it is random.
- "sop" (1909.11942): it is cut likewise and with probability 1/2 the segments change places. ALBERT's code completes a
  chunk of one sentence with text of another document, labelled as swapped, which teaches topics; here it is cut at the
  word border nearest its middle. Labels: 0, in order; 1, swapped.
- None: ELECTRA's two segments (2003.10555), which no label goes with: the first is about half of the chunk; with
  probability 0.1, or if it is one sentence, there is one segment.
"""

from dataclasses import dataclass

import numpy as np

from fastbert.data.draws import LENGTH, PLACE, SECOND, SPLIT, below, draw, sample_keys, stream, unit
from fastbert.data.samples import Laid, Samples, chain, check_max_length, cut_long_rows, document_heads
from fastbert.data.shards import Corpus, Shard
from fastbert.data.tokenizer import Tokenizer
from fastbert.errors import ConfigError

TASKS = (None, "nsp", "sop")
_ENDS, _CLOSING = frozenset("。！？!?…"), frozenset("”’」』）)》】\"'")
_ONE_SEGMENT = 0.1


@dataclass(frozen=True, kw_only=True)
class Pairs(Samples):
    """Samples that are chunks of sentences, see above. Chunk i has the sentences first[i]:last[i] (int64), of document
    number document[i], and may have room[i] pieces as a pair. Sentences of all shards are numbered through; positions
    of pieces too, in the tables of sentences, with those of shard s beginning at offsets[s]."""

    task: str | None
    first: np.ndarray
    last: np.ndarray
    document: np.ndarray
    room: np.ndarray
    sentences: np.ndarray  # where each begins, and where the last one ends
    documents: np.ndarray  # the first sentence of each, and the number of sentences
    offsets: np.ndarray

    @property
    def fill(self) -> float:
        return float((self.end - self.start + 3).mean() / self.max_length)

    def lay(self, indices: np.ndarray, keys: np.ndarray, shards: list[Shard]) -> Laid:
        """The pairs that the chunks are in an epoch, whose keys are those of the random numbers."""
        start, end = self.sentences[self.first[indices]], self.sentences[self.last[indices]]
        lot, coin = (draw(stream(keys, purpose), np.zeros(len(keys), np.int64)) for purpose in (SPLIT, SECOND))
        if self.task is None:
            middle = self._near_half(indices, lot, unit(coin) < _ONE_SEGMENT)
            return self._lay(start, middle, middle, end, middle < end, None)
        middle, coin = self._between_sentences(indices, lot, shards), coin >= np.uint64(1 << 63)
        both = np.ones(len(coin), bool)
        if self.task == "sop":
            a, b = np.where(coin, middle, start), np.where(coin, start, middle)
            a_end, b_end = np.where(coin, end, middle), np.where(coin, middle, end)
            return self._lay(a, a_end, b, b_end, both, coin.astype(np.int64))
        alone, room = self.last[indices] - self.first[indices] == 1, self.room[indices]
        random = coin | alone
        # One sentence is the first segment as it is, unless too little room would be left for the second.
        middle = np.where(alone & (2 * (end - start) <= room), end, middle)
        b, b_end = self._random_segments(indices, keys, np.maximum(room - (middle - start), 1), shards)
        b, b_end = np.where(random, b, middle), np.where(random, b_end, end)
        return self._lay(start, middle, b, b_end, both, random.astype(np.int64))

    def _near_half(self, indices: np.ndarray, lot: np.ndarray, one_segment: np.ndarray) -> np.ndarray:
        """Where the second segment begins, or the chunk ends: after the last sentence within half of the room, or the
        next one."""
        first, last = self.first[indices], self.last[indices]
        half = self.sentences[first] + self.room[indices] // 2
        split = np.searchsorted(self.sentences, half, side="right") - 1 + (lot >> np.uint64(63)).astype(np.int64)
        split = np.clip(split, first + 1, np.maximum(first + 1, last - 1))
        return self.sentences[np.where(one_segment | (last - first == 1), last, split)]

    def _between_sentences(self, indices: np.ndarray, lot: np.ndarray, shards: list[Shard]) -> np.ndarray:
        """Where the second segment begins: between two random sentences, or near the middle of the only one."""
        first, last = self.first[indices], self.last[indices]
        count = last - first
        middle = self.sentences[first + 1 + below(lot, np.maximum(count - 1, 1))]
        for i in np.flatnonzero(count == 1):
            start, end = self.sentences[first[i]], self.sentences[last[i]]
            borders, halfway = self._word_borders(start, end, shards), (start + end) // 2
            middle[i] = borders[np.abs(borders - halfway).argmin()] if len(borders) else halfway
        return middle

    def _word_borders(self, start: int, end: int, shards: list[Shard]) -> np.ndarray:
        """Those inside a run of pieces."""
        shard = np.searchsorted(self.offsets, start, side="right") - 1
        first = start + 1 - self.offsets[shard]
        return np.flatnonzero(shards[shard].word_start[first : end - self.offsets[shard]]) + start + 1

    def _random_segments(self, indices, keys, room, shards) -> tuple[np.ndarray, np.ndarray]:
        """From a random sentence of another document on, as many whole ones as there is room for, or the words of the
        first one that fit."""
        document_lot, sentence_lot = (draw(stream(keys, PLACE), np.full(len(keys), i)) for i in range(2))
        other = below(document_lot, len(self.documents) - 2)
        other += other >= self.document[indices]
        head, tail = self.documents[other], self.documents[other + 1]
        sentence = head + below(sentence_lot, tail - head)
        start = self.sentences[sentence]
        shard_end = np.append(self.offsets, self.sentences[-1])[np.searchsorted(self.offsets, start, side="right")]
        most = np.minimum(start + room, shard_end)
        last = np.minimum(np.searchsorted(self.sentences, most, side="right") - 1, tail)
        end = self.sentences[last]
        for i in np.flatnonzero(last == sentence):
            borders = self._word_borders(start[i], start[i] + room[i] + 1, shards)
            end[i] = borders[-1] if len(borders) else start[i] + room[i]
        return start, end

    def _lay(self, a, a_end, b, b_end, two, labels) -> Laid:
        """Runs and parts of pairs [a:a_end], [b:b_end], or of the first segment alone where not `two`."""
        starts, ends = np.stack([a, b], 1), np.stack([a_end, b_end], 1)
        there = np.stack([np.ones(len(two), bool), two], 1)
        starts, ends = starts[there], ends[there]
        shard = np.searchsorted(self.offsets, starts, side="right") - 1
        offset = self.offsets[shard]
        runs = list(zip(shard.tolist(), (starts - offset).tolist(), (ends - offset).tolist(), strict=True))
        return Laid(runs, ends - starts, there.sum(1), labels)


def pack_pairs(
    corpus: Corpus, tokenizer: Tokenizer, max_length: int, task: str | None, *, short_prob: float = 0.0, seed: int = 0
) -> Pairs:
    """Lay a split into chunks that become pairs of segments. task: "nsp", "sop" or None, see the module. short_prob:
    probability that a chunk is made for a random smaller length (BERT: 0.1). Chunks of a single piece are left out.

    ConfigError: max_length below 5; "nsp" in a corpus of one document.
    """
    check_max_length(max_length, 5, "[CLS], a piece, [SEP], a piece, [SEP]")
    ends, closing = _marks(tokenizer)
    tables, offset, sentence, document, last = [], 0, 0, 0, None
    for number, shard in enumerate(corpus.shards):
        table = _Chunks(shard, max_length - 3, ends, closing, short_prob, seed, number)
        goes_on = shard.documents[0] == last  # the document that the shard before ends with
        tables.append(table.moved(offset, sentence, document, goes_on))
        offset += len(shard.input_ids)
        sentence += len(table.borders) - 1
        document += len(table.heads) - 1 - goes_on
        last = shard.documents[-1]
    if task == "nsp" and document < 2:
        raise ConfigError(
            f"the corpus {corpus.folder} has {document} document in the split {corpus.split!r}, expected at least 2 "
            "for next-sentence prediction: a blank line ends a document"
        )
    offsets = np.cumsum([0] + [len(shard.input_ids) for shard in corpus.shards])
    shards = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table["first"]) for table in tables])
    joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    sentences = np.append(joined.pop("borders"), offset)
    documents = np.append(joined.pop("heads"), sentence)
    start, end = sentences[joined["first"]], sentences[joined["last"]]
    if not len(start):
        raise ConfigError(
            f"the corpus {corpus.folder} gives no pair in the split {corpus.split!r}, expected 2 pieces in a document"
        )
    return Pairs(
        shard=shards,
        start=start - offsets[shards],
        end=end - offsets[shards],
        max_length=max_length,
        task=task,
        sentences=sentences,
        documents=documents,
        offsets=offsets[:-1],
        **joined,
    )


class _Chunks:
    """The chunks of one shard: borders of sentences, heads of documents among them, and first, last and room of each
    chunk."""

    def __init__(self, shard: Shard, most: int, ends, closing, short_prob: float, seed: int, number: int):
        rows = shard.row_offsets.astype(np.int64)
        self.borders = cut_long_rows(shard, np.union1d(rows, _sentence_borders(shard.input_ids, ends, closing)), most)
        self.heads = document_heads(shard, self.borders)
        room = np.full(len(self.borders) - 1, most)
        if short_prob:
            key = stream(sample_keys(seed, number, np.zeros(1, np.int64)), LENGTH)
            lots = draw(key, np.arange(2 * len(room)))
            short = unit(lots[: len(room)]) < short_prob
            room = np.where(short, 2 + below(lots[len(room) :], most - 1), room)
        following = np.searchsorted(self.borders, self.borders[:-1] + room, side="right") - 1
        following = np.maximum(following, np.arange(1, len(self.borders)))
        hops = chain(np.minimum(following, np.repeat(self.heads[1:], np.diff(self.heads))))
        first, last = hops[:-1], hops[1:]
        size = self.borders[last] - self.borders[first]
        kept = size > 1
        self.first, self.last = first[kept], last[kept]
        self.room = np.maximum(room[first], size)[kept]  # a sentence may be longer than a short chunk should be
        self.document = np.searchsorted(self.heads, self.first, side="right") - 1

    def moved(self, offset: int, sentence: int, document: int, goes_on: bool) -> dict[str, np.ndarray]:
        """The tables, numbered on after those of the shards before, whose last document `goes_on` here or not."""
        document -= goes_on
        return {
            "borders": self.borders[:-1] + offset,
            "heads": self.heads[int(goes_on) : -1] + sentence,
            "first": self.first + sentence,
            "last": self.last + sentence,
            "document": self.document + document,
            "room": self.room,
        }


def _marks(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces end a sentence, and which may follow its end (bool [vocab_size])."""
    texts = [tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)]  # nothing of special tokens
    closing = np.array([bool(text) and all(char in _CLOSING for char in text) for text in texts])
    bare = [text.rstrip("".join(_CLOSING)) for text in texts]
    return np.array([text[-1:] in _ENDS and text != "" for text in bare]), closing


def _sentence_borders(ids: np.ndarray, ends: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Places after pieces that end a sentence, closing marks that follow them included."""
    end, close = ends[ids], closing[ids]
    stop = end | close
    last = stop & ~np.append(stop[1:], False)
    near = end | (close & np.append(False, end[:-1])) | (close & np.append([False, False], end[:-2])[: len(end)])
    return np.flatnonzero(last & near) + 1
