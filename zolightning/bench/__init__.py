"""Benchmarks, ``python -m zolightning.bench``: each prints its tables and writes ``logs/bench/NAME.csv``."""
