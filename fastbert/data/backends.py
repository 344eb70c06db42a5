"""What each level of a tokenizer is made of: its special tokens, and its parts from Hugging Face `tokenizers`."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from fastbert.errors import DataError, shown

LEVELS = ("char", "wordpiece", "bpe", "unigram", "word")
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_BERT = dict(zip(ROLES, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), strict=True))
_ROBERTA = dict(zip(ROLES, ("<pad>", "<unk>", "<s>", "</s>", "<mask>"), strict=True))
_ALBERT = dict(zip(ROLES, ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), strict=True))
SPECIAL_TOKENS = {"char": _BERT, "wordpiece": _BERT, "bpe": _ROBERTA, "unigram": _ALBERT, "word": _BERT}
SPACE = "▁"  # what SentencePiece writes for a space


def bert_backend(
    vocab: dict[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
    unk_token: str = _BERT["unk_token"],
) -> tokenizers.Tokenizer:
    """WordPiece behind BERT's normaliser and pre-tokenizer: levels "char" (handle_chinese_chars), "wordpiece" and
    "word" (not)."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk_token))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=handle_chinese_chars, strip_accents=strip_accents, lowercase=lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def bpe_backend(
    vocab: dict[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    add_prefix_space: bool = False,
    unk_token: str = _ROBERTA["unk_token"],
) -> tokenizers.Tokenizer:
    """GPT-2's byte-pair encoding of bytes, without a normaliser, as RoBERTa has it (arXiv 1907.11692, section 4.4)."""
    model = models.BPE(
        vocab, list(merges), unk_token=unk_token, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
    )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return backend


def unigram_backend(
    pieces: Sequence[tuple[str, float]],
    *,
    lowercase: bool = True,
    keep_accents: bool = False,
    charsmap: bytes | None = None,
    unk_id: int = 1,
) -> tokenizers.Tokenizer:
    """SentencePiece's unigram model (arXiv 1808.06226) over pieces with log probabilities, behind ALBERT's
    normalisation: quotes of LaTeX become plain ones, accents go unless kept, letters are lowercased, and then comes
    what the model itself replaces (charsmap, SentencePiece's own format)."""
    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    steps += [] if keep_accents else [normalizers.NFKD(), normalizers.StripAccents()]
    steps += [normalizers.Lowercase()] if lowercase else []
    steps += [normalizers.Precompiled(charsmap)] if charsmap else []
    backend = tokenizers.Tokenizer(models.Unigram(list(pieces), unk_id, False))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")]
    )
    return backend


def restore(serialized: str) -> tokenizers.Tokenizer:
    """The backend of a JSON text; an Exception says what is wrong with it. The parser of tokenizers is off by a last
    bit in some scores of a unigram model, by which two files of one tokenizer would differ; Python's is exact."""
    backend = tokenizers.Tokenizer.from_str(serialized)
    model = json.loads(serialized)["model"]
    if isinstance(backend.model, models.Unigram):
        pieces = [(piece, score) for piece, score in model["vocab"]]
        backend.model = models.Unigram(pieces, model["unk_id"], model["byte_fallback"])
    return backend


def level_of(config: dict) -> str:
    """The level of a serialised backend; one of "word" looks like one of "wordpiece"."""
    model = config["model"]["type"]
    if model == "WordPiece":
        return "char" if config["normalizer"]["handle_chinese_chars"] else "wordpiece"
    return {"BPE": "bpe", "Unigram": "unigram"}[model]


def complete(backend: tokenizers.Tokenizer, level: str, special_tokens: dict[str, str]) -> None:
    """Give a backend the special tokens of a text, its frame of them, and a decoder, and nothing that shortens or pads.
    DataError: a special token is not in the vocabulary."""
    vocab = backend.get_vocab(with_added_tokens=True)
    for role, token in special_tokens.items():
        if token not in vocab:
            raise DataError(f"the vocabulary of {len(vocab)} tokens has no {role} {shown(token)}")
    backend.no_truncation()
    backend.no_padding()
    known = {added.content for added in backend.get_added_tokens_decoder().values() if added.special}
    spaced = level in ("bpe", "unigram")  # there the mask takes the space before it in, as a word would
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False, lstrip=spaced and role == "mask_token")
            for role, token in special_tokens.items()
            if token not in known
        ]
    )
    cls, sep = ((special_tokens[role], vocab[special_tokens[role]]) for role in ("cls_token", "sep_token"))
    if level == "bpe":
        prefixed = json.loads(backend.to_str())["pre_tokenizer"]["add_prefix_space"]
        backend.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=prefixed)
        backend.decoder = decoders.ByteLevel()
        return
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls[0]} $A {sep[0]}", pair=f"{cls[0]} $A {sep[0]} $B:1 {sep[0]}:1", special_tokens=[cls, sep]
    )
    if level == "unigram":
        backend.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    else:
        backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
