"""Benchmarks, ``python -m zolightning.bench``; ``logs/README.md`` says what they measure and what they found."""
