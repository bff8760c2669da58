"""Tokens per second of the five models, per backend, on this machine: ``make bench``.

The same as ``moefast bench``, for a checkout. See README.md for what is measured and how to read it.
"""

from __future__ import annotations

import sys

from moefast.lm.bench.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python benchmarks/tokens.py"))
