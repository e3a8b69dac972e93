"""Benchmarks, ``python -m zolightning.bench``: what they measure, and what they found, is in ``logs/README.md``."""
