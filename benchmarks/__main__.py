"""`python -m benchmarks` is `fastbert bench`, from a checkout."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="python -m benchmarks"))
