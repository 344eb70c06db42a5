"""Which characters of a text its pieces are made of."""

import unicodedata
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from fastbert.data.backends import restore

_QUOTES = ("``", "''")


class WordOffsets:
    """Offsets at level "word", where words are cut from the normalised text, before `tokenizers` sees them."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._normalizer = backend.normalizer
        # Each character of the normalised text a token, so that its offsets lead back to the text.
        self._characters = tokenizers.Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        self._characters.normalizer = backend.normalizer
        self._characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        self._pieces = restore(backend.to_str())  # as words that are not in the vocabulary are encoded
        self._pieces.encode_special_tokens = True
        self._pieces.normalizer.handle_chinese_chars = True

    def of(self, text: str, words: list[str], counts: Iterable[int]) -> list[tuple[int, int]]:
        """The offsets of the pieces of a text's `words`, of which there are `counts`."""
        normal, places = self._normalizer.normalize_str(text), self._characters.encode(text).offsets
        found, end = [], 0
        for word, count in zip(words, counts, strict=True):
            begin = normal.index(word, end)
            end = begin + len(word)
            spans = [(0, len(word))] if count == 1 else self._pieces.encode(word, add_special_tokens=False).offsets
            found += [(places[begin + first][0], places[begin + last - 1][1]) for first, last in spans][:count]
        return found


def with_marks(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets in which the accents that a normaliser has removed behind a piece belong to it, and both of two quotes
    that it has made one (ALBERT's, of which `tokenizers` knows the second)."""
    found, last, before = [], -1, 0  # before: where the pieces of other characters end
    for (start, end), following in zip(offsets, [*(start for start, _ in offsets[1:]), len(text)], strict=False):
        if start != last:
            last, before = start, found[-1][1] if found else 0
        if start > before and text[start - 1 : start + 1] in _QUOTES:
            start -= 1
        while start < end < following and unicodedata.combining(text[end]):
            end += 1
        found.append((start, end))
    return found
