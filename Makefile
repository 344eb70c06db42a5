# make demo, make test, make bench, make lint: each sets up .venv with what it needs and runs. A second call skips what
# is done.
#   make demo ARGS="--variant nezha"    make test ARGS="-k attention"    make test PYTHON=python3.12
#   make bench ARGS="rotary_attention --cases :1"
#   make gpu SLICE=correctness    make gpu SLICE=attention PYTHON=/path/to/python    (see benchmarks/gpu.sh)
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PIP = $(VENV)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES = pyproject.toml setup.py fastbert/extension.py constraints.txt $(wildcard csrc/*)

.PHONY: demo test bench gpu lint locked clean

# OpenMP threads that wait spin for milliseconds by default: where another process has one of the cores, a step of this
# small model then takes 30 times as long.
demo: $(VENV)/.extra-demo
	GOMP_SPINCOUNT=1000 $(VENV)/bin/fastbert pretrain $(ARGS)

# A process for each core, eight at most. A file stays in one process, which makes its fixtures once; ARGS="-n0", or plain
# pytest, is one process for all, as a debugger needs it.
test: $(VENV)/.extra-test
	$(VENV)/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

bench: $(VENV)/.extra-bench
	$(VENV)/bin/fastbert bench $(ARGS)

# Uses PYTHON's own environment instead: what a GPU needs cannot always be fetched. benchmarks/gpu.sh says what it reads.
gpu:
	PYTHON="$(PYTHON)" SLICE="$(SLICE)" DEVICE="$(DEVICE)" OUT="$(OUT)" MINUTES="$(MINUTES)" ARGS="$(ARGS)" \
	    bash benchmarks/gpu.sh

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .

# Everything that constraints.txt pins, by hash, for CPython 3.11 on Linux x86-64: what the targets above install is then
# there already. .ci/lock.py writes the hashes.
locked:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r .ci/tools.lock
	$(VENV)/bin/pip --disable-pip-version-check install --quiet --require-hashes --no-deps --no-build-isolation -r .ci/all.lock

# First what the compiled part is built with: the build below is not isolated, it compiles against this torch.
$(VENV)/.build-tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel ninja
	touch $@

$(VENV)/.installed: $(VENV)/.build-tools $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

# The package is there already, so this installs what the extra asks for and nothing else.
$(VENV)/.extra-%: $(VENV)/.installed
	$(PIP) "fastbert-kernels[$*]"
	touch $@

$(VENV)/.lint: constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) ruff
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastbert/_C*.so
