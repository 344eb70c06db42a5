"""`python -m fastbert`: the same as the command `fastbert`."""

from fastbert.cli import main

raise SystemExit(main())
