"""What the published recipes ask for besides: separators by row, other counts, special tokens, other shares."""

import numpy as np
import pytest
from chances import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.data import Corpus, MaskedLM, Masking, Tokenizer, pack, prepare
from fastbert.data.draws import sample_keys
from fastbert.data.masking import Vocabulary
from fastbert.errors import ConfigError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sixty documents of rows of all lengths, in several shards, and their tokenizer."""
    folder, rng = tmp_path_factory.mktemp("objectives"), np.random.default_rng(2)
    documents = [
        "\n".join(
            " ".join("天地玄黄宇宙洪荒日月盈昃"[i % 9 : i % 9 + rng.integers(1, 4)] for i in range(rng.integers(1, 30)))
            for _ in range(rng.integers(1, 7))
        )
        for _ in range(60)
    ]
    (folder / "text.txt").write_text("\n\n".join(documents), encoding="utf-8")
    tokenizer = Tokenizer.train(folder / "text.txt", 100, min_frequency=1, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.data.text._BLOCK", 200)  # a shard is closed between blocks of text
        prepare(folder / "text.txt", tokenizer, folder / "out", words="segmented", shard_tokens=2500, progress=False)
    split = Corpus.open(folder / "out")
    assert len(split.shards) >= 3
    return split, tokenizer


# RoBERTa's blocks


def blocks_by_the_rule(split, max_length, by_document, cls, sep):
    """Lines end in [SEP]; so does a document, unless it begins a new block; whole lines go into a block while it has
    at most max_length - 1 tokens; [CLS] goes before it."""
    blocks, after = [], [*(shard.documents[0] for shard in split.shards[1:]), None]
    for shard, head in zip(split.shards, after, strict=True):
        block, offsets = [], shard.row_offsets
        for row, document in enumerate(shard.documents):
            ids = shard.input_ids[offsets[row] : offsets[row + 1]].tolist()
            last = (shard.documents[row + 1] if row + 1 < len(shard.documents) else head) != document
            line = [*ids, sep] + [sep] * int(last and not by_document)
            new = by_document and row and shard.documents[row - 1] != document
            if block and (new or len(block) + len(line) > max_length - 1):
                blocks.append([cls, *block])
                block = []
            block += line
        blocks.append([cls, *block])
    return blocks


@pytest.mark.parametrize("packing", ["full_sentences", "doc_sentences"])
@pytest.mark.parametrize("max_length", [100, 128, 512])
def test_separators_by_row_are_robertas_blocks(corpus, packing, max_length):
    split, tokenizer = corpus
    made = MaskedLM(split, tokenizer, max_length=max_length, packing=packing, separators="row")
    batch = made.batch(range(len(made)), 0)
    ids = np.where(batch.labels >= 0, batch.labels, batch.input_ids)
    found = [part.tolist() for part in np.split(ids, batch.cu_seqlens[1:-1].numpy())]
    expected = blocks_by_the_rule(split, max_length, packing == "doc_sentences", tokenizer.cls_id, tokenizer.sep_id)
    assert found == expected
    assert sum(map(len, found)) / len(made) / max_length == pytest.approx(made.samples.fill)


def test_a_long_row_is_cut_where_separators_stand_by_row(corpus):
    split, tokenizer = corpus
    made = MaskedLM(split, tokenizer, max_length=12, separators="row")
    batch = made.batch(range(len(made)), 0)
    ids = np.where(batch.labels >= 0, batch.labels, batch.input_ids)
    text = ids[(ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)]
    assert np.array_equal(text, np.concatenate([shard.input_ids for shard in split.shards])) and batch.max_seqlen <= 12
    samples = pack(split, 12, separators="row")
    assert (np.diff(samples.rows.first) >= 1).all() and samples.rows.first[-1] == len(samples.rows.lengths)


# what is counted, chosen and shown


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20), seed=st.integers(0, 99), most=st.integers(1, 30))
def test_the_count_of_each_rule(lengths, seed, most):
    lengths, keys = np.array(lengths), sample_keys(seed, 0, np.arange(len(lengths)))
    sample, starts = np.repeat(np.arange(len(lengths)), lengths), np.ones(lengths.sum(), np.uint8)
    counts = {
        count: np.bincount(
            sample[Masking("token", count=count).choose(keys, lengths, starts).pieces], minlength=len(keys)
        )
        for count in ("rounded", "stochastic")
    }
    assert np.array_equal(counts["rounded"], np.maximum(1, np.rint(0.15 * lengths)))
    assert ((counts["stochastic"] - 0.15 * lengths > -1) & (counts["stochastic"] - 0.15 * lengths <= 1)).all()
    pieces = Masking("ngram", 0.5, most=most).choose(keys, lengths, starts).pieces
    assert np.array_equal(
        np.bincount(sample[pieces], minlength=len(keys)), np.minimum(most, np.maximum(1, np.rint(lengths / 2)))
    )


def test_stochastic_and_bernoulli_meet_the_rate_exactly():
    lengths, keys = np.full(20_000, 13), sample_keys(1, 0, np.arange(20_000))
    starts = np.tile(np.uint8([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1]), 20_000)
    counts = np.bincount(Masking("token", count="stochastic").choose(keys, lengths, starts).pieces // 13)
    assert chi_square(np.bincount(counts, minlength=3)[1:], [0.05, 0.95]) > 0.01  # 0.15 x 13 = 1.95
    chosen = Masking("whole_word", count="bernoulli").choose(keys, lengths, starts)
    words = int(starts.sum())
    assert chi_square([len(chosen.first), words - len(chosen.first)], [0.15, 0.85]) > 0.01
    assert starts[chosen.first].all() and set(chosen.size.tolist()) == {1, 2, 3}
    tokens = Masking("token", count="bernoulli").choose(keys, lengths, starts).pieces
    assert chi_square([len(tokens), len(starts) - len(tokens)], [0.15, 0.85]) > 0.01


def test_special_tokens_are_chosen_where_asked(corpus):
    split, tokenizer = corpus
    made = MaskedLM(split, tokenizer, max_length=32, masking=Masking("token", 0.3, special=True), separators="row")
    batch = made.batch(range(len(made)), 0)
    truth = np.where(batch.labels >= 0, batch.labels, batch.input_ids)
    chosen = batch.labels.numpy() >= 0
    for special in (tokenizer.cls_id, tokenizer.sep_id):
        here = truth == special
        assert chi_square([chosen[here].sum(), (~chosen[here]).sum()], [0.3, 0.7]) > 0.01
    lengths = np.diff(batch.cu_seqlens.numpy())
    counts = np.add.reduceat(chosen, batch.cu_seqlens[:-1].numpy(), dtype=np.int64)
    assert np.array_equal(counts, np.maximum(1, np.rint(0.3 * lengths)))


@pytest.mark.parametrize(("strategy", "unit"), [("token", "piece"), ("ngram", "piece"), ("span", "span")])
@pytest.mark.parametrize("actions", [(0.8, 0.1, 0.1), (0.85, 0.0, 0.15), (0.0, 1.0, 0.0)])
def test_shares_of_what_is_shown(strategy, unit, actions):
    lengths, keys = np.full(3000, 100), sample_keys(4, 0, np.arange(3000))
    starts = np.tile(np.uint8([1, 0] * 50), 3000)
    masking = Masking(strategy, actions=actions)
    chosen = masking.choose(keys, lengths, starts)
    sample, ids = chosen.first // 100, np.full(chosen.size.sum(), 1000)
    shown = masking.show(keys[sample], chosen.first % 100, chosen, ids, Vocabulary(4, np.arange(5, 55)))
    kinds = np.where(shown == 4, 0, np.where(shown == 1000, 2, 1))
    if unit == "span":
        span = np.repeat(chosen.span, chosen.size)
        heads = np.flatnonzero(np.diff(span, prepend=-1))
        assert np.array_equal(np.maximum.reduceat(kinds, heads), np.minimum.reduceat(kinds, heads))
        kinds = kinds[heads]
    counts, shares = np.bincount(kinds, minlength=3), np.array(actions)
    assert not counts[shares == 0].any()
    if (shares > 0).sum() > 1:
        assert chi_square(counts[shares > 0], shares[shares > 0]) > 0.01
    assert len(set(shown[kinds == 1].tolist() if unit == "piece" else [])) in (0, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "words"}, "masking is 'words', expected one of 'token', 'whole_word'"),
        ({"count": "some"}, "mask_count is 'some', expected one of 'rounded'"),
        ({"actions": (0.8, 0.1)}, "mask_actions is .*expected 3 shares that sum to 1"),
        ({"actions": (0.8, 0.1, 0.2)}, "mask_actions is .*expected 3 shares that sum to 1"),
        ({"actions": (1.2, -0.1, -0.1)}, "mask_actions is .*each at least 0"),
        ({"actions": "abc"}, "mask_actions is 'abc'"),
        ({"strategy": "ngram", "weights": ()}, "span_weights is"),
        ({"strategy": "ngram", "weights": (0, 0)}, "span_weights is"),
        ({"strategy": "ngram", "weights": (float("nan"),)}, "span_weights is"),
        ({"strategy": "token", "weights": (1, 1)}, "span_weights is .* with masking 'token', expected None"),
        ({"most": 0}, "max_predictions is 0, expected an integer of at least 1"),
        ({"count": "bernoulli", "strategy": "ngram"}, "mask_count is 'bernoulli' with masking 'ngram'"),
        ({"count": "bernoulli", "most": 20}, "mask_count is 'bernoulli'.*max_predictions 20"),
    ],
)
def test_a_masking_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Masking(**options)


def test_electras_batches_show_masks_or_the_truth(corpus):
    split, tokenizer = corpus
    batch = MaskedLM(split, tokenizer, max_length=64, objective="rtd", packing="two_segments").batch(range(100), 0)
    chosen = batch.labels >= 0
    shown, truth = batch.input_ids[chosen], batch.labels[chosen]
    assert ((shown == tokenizer.mask_id) | (shown == truth)).all()
    masked = int((shown == tokenizer.mask_id).sum())
    assert chi_square([masked, len(shown) - masked], [0.85, 0.15]) > 0.01
    assert batch.token_type_ids.max() == 1 and batch.sentence_labels is None
