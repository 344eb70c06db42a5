#!/usr/bin/env bash
# make gpu: installs this checkout into PYTHON's environment without a network (PyTorch, nvcc and the other dependencies
# are there already), builds the extension, and runs the slice SLICE: see `python -m benchmarks.slices --help`.
#
#   PYTHON   python3     the interpreter that has PyTorch
#   SLICE    all         names of slices, or all
#   DEVICE   cuda        cpu: a rehearsal with tiny shapes and Triton's interpreter
#   OUT      benchmarks/results (with DEVICE=cpu: build/rehearsal), where rows are added to <device>.jsonl
#   MINUTES  8           for each slice, the installation counted to the first
#   ARGS                 words for every step: of pytest in correctness and sanitize, else of `fastbert bench`
#   FASTBERT_COMMIT      the commit, where the checkout is a copy without its history
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SLICE=${SLICE:-all}
DEVICE=${DEVICE:-cuda}
MINUTES=${MINUTES:-8}
ARGS=${ARGS:-}
if [ "$DEVICE" = cpu ]; then OUT=${OUT:-build/rehearsal}; else OUT=${OUT:-benchmarks/results}; fi
if [ "$SLICE" = all ]; then SLICE=; fi
export PYTHONUNBUFFERED=1

# Again only if something that it compiles has changed since, or another PyTorch is to run it.
stamp=build/gpu-installed log=build/gpu-install.log
torch=$("$PYTHON" -c 'import sys, torch; print(sys.executable, torch.__version__, torch.__file__)') || {
    echo "$PYTHON cannot import torch: set PYTHON to the interpreter that has it, as in make gpu PYTHON=/path/to/python" >&2
    exit 2
}
if [ "$(cat "$stamp" 2>/dev/null)" != "$torch" ] || [ -n "$(find csrc fastbert/extension.py setup.py pyproject.toml -newer "$stamp")" ] ||
    ! ls fastbert/_C*.so >/dev/null 2>&1; then
    echo "installing into $("$PYTHON" -c 'import sys; print(sys.prefix)') and compiling: some minutes with nvcc"
    mkdir -p build
    rm -f "$stamp" "$log"
    "$PYTHON" -m pip --disable-pip-version-check install --log "$log" --no-index --no-build-isolation \
        --check-build-dependencies --no-deps --editable . || echo "pip could not install it: see above"
    if "$PYTHON" -m benchmarks.slices --check-extension --device "$DEVICE"; then
        echo "$torch" >"$stamp"
    else
        tail -n 60 "$log" || true
        echo "the extension is not as it should be: above is the end of $log; going on without it"
    fi
fi
# shellcheck disable=SC2086
exec "$PYTHON" -m benchmarks.slices $SLICE --device "$DEVICE" --minutes "$MINUTES" --spent "$SECONDS" --out "$OUT" -- $ARGS
