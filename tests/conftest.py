"""What must hold before any test is imported: where Triton runs, how hard hypothesis looks, how many threads run."""

import gc
import os
import re
import sys

import pytest

# Workers of pytest-xdist have a core each, and so have the processes that their tests start: threads beyond would wait
# for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import offline
import torch
from hypothesis import settings
from processes import Processes

if not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the tests could ask for its interpreter (TRITON_INTERPRET=1)")
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
offline.forbid()
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# ci draws the same examples on every run, so a failure belongs to the change that shows it; HYPOTHESIS_PROFILE=long
# goes looking for new ones; sanitize is for tools that make every launch a hundred times slower.
settings.register_profile("ci", max_examples=25, deadline=None, print_blob=True, derandomize=True, database=None)
settings.register_profile("long", max_examples=500, deadline=None, print_blob=True)
settings.register_profile("sanitize", max_examples=2, deadline=None, print_blob=True, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(min(2, torch.get_num_threads()))

# The files that take longest begin first, so that no worker of pytest-xdist is left alone with one at the end.
LONGEST = ("test_finetune_demo.py", "test_static.py", "test_slices.py", "test_bench.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_terminal_summary(terminalreporter):
    """How many examples hypothesis has tried, in all processes: what it adds to reports for its own statistics."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    told = [report.__dict__["_hypothesis_stats"] for report in reports if "_hypothesis_stats" in vars(report)]
    counts = [re.findall(r"(\d+) passing, (\d+) failing", text) for text in told]
    passed, failed = (sum(int(pair[i]) for pairs in counts for pair in pairs) for i in (0, 1))
    if told:
        terminalreporter.write_line(f"hypothesis: {passed:,} examples in {len(told)} tests passed, {failed:,} failed")


@pytest.fixture(scope="module", autouse=True)
def _imported_modules_are_no_garbage():
    """A full collection looks at all that torch and transformers have made, a fifth of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """As many threads as one: sums in one order, and processes side by side that do not wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def daily(tmp_path_factory):
    """daily(level): the splits of the hand-segmented People's Daily, and its tokenizer of that level; made once, in
    daily.folder, where `fastbert pretrain --recipe ... --demo` finds them too."""
    from fastbert.data import Corpus
    from fastbert.train.recipe_demo import prepare_level

    def get(level):
        path = prepare_level(get.folder, level)
        splits = [Corpus.open(path, split, verify=False) for split in ("train", "validation")]
        return splits, splits[0].load_tokenizer()

    get.folder = tmp_path_factory.mktemp("daily")
    return get


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """processes(size): that many, the same ones for all tests unless something went wrong in them."""
    made = {}

    def get(size):
        if size not in made or not made[size].pipes:
            made[size] = Processes(size, tmp_path_factory.mktemp("processes"))
        return made[size]

    yield get
    for each in made.values():
        each.stop()
