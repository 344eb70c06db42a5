"""From raw text to masked batches: tokenizer, token shards, packing, masking, objectives."""

from fastbert.data.masking import COUNTS, Masking
from fastbert.data.masking import STRATEGIES as MASKINGS
from fastbert.data.objectives import OBJECTIVES, Batch, MaskedLM
from fastbert.data.pairs import pack_pairs
from fastbert.data.people_daily import demo_corpus, reviews, tagged_rows
from fastbert.data.preparation import PrepareReport, prepare
from fastbert.data.samples import PACKINGS, SEPARATORS, Samples, pack
from fastbert.data.segmenters import WORDS
from fastbert.data.shards import Corpus, Shard, unigram_entropy
from fastbert.data.similar_pieces import SimilarPieces
from fastbert.data.similar_words import SimilarWords, SimilarWordsReport, build_similar_words
from fastbert.data.tokenizer import LEVELS, Tokenizer
from fastbert.data.tokenizer_training import frequent_words

__all__ = [
    "COUNTS",
    "LEVELS",
    "MASKINGS",
    "PACKINGS",
    "WORDS",
    "OBJECTIVES",
    "SEPARATORS",
    "Batch",
    "Corpus",
    "MaskedLM",
    "Masking",
    "PrepareReport",
    "Samples",
    "Shard",
    "SimilarPieces",
    "SimilarWords",
    "SimilarWordsReport",
    "Tokenizer",
    "build_similar_words",
    "demo_corpus",
    "frequent_words",
    "pack",
    "pack_pairs",
    "prepare",
    "reviews",
    "tagged_rows",
    "unigram_entropy",
]
