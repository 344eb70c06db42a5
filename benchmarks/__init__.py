"""Benchmarks: `fastbert bench` (or, in a checkout, `python -m benchmarks`), one file per op, static.py, report.py.

The folder is also the package fastbert.benchmarks, through a link, so that an installed fastbert has it: imports
between its files are relative.
"""
