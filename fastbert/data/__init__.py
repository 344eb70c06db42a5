"""From raw text to masked batches: tokenizer, token shards, packing, masking, objectives."""

from fastbert.data.masking import SELECT as MASKINGS
from fastbert.data.objectives import Batch, MaskedLM
from fastbert.data.people_daily import demo_corpus
from fastbert.data.preparation import PrepareReport, prepare
from fastbert.data.samples import PACKINGS, Samples, pack
from fastbert.data.shards import Corpus, Shard, unigram_entropy
from fastbert.data.text import WORDS
from fastbert.data.tokenizer import LEVELS, Tokenizer

__all__ = [
    "LEVELS",
    "MASKINGS",
    "PACKINGS",
    "WORDS",
    "Batch",
    "Corpus",
    "MaskedLM",
    "PrepareReport",
    "Samples",
    "Shard",
    "Tokenizer",
    "demo_corpus",
    "pack",
    "prepare",
    "unigram_entropy",
]
