"""`python -m benchmarks` is `fastbert bench`, from a checkout."""

import os
import sys

from .cli import SPOILT, main

if __name__ == "__main__":
    code = main(sys.argv[1:], prog="python -m benchmarks")
    if code == SPOILT:  # what Python and CUDA would still tidy up may abort, and hide the exit code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
