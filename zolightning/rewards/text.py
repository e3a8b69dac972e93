"""Rewards that compare a text with its references, as SQuAD does."""

from collections.abc import Sequence
from typing import Any

from torchmetrics.functional.text import squad


def token_f1(text: str, references: Sequence[str]) -> float:
    """F1 of the words, SQuAD's: without case, punctuation and articles, against the best reference; 0 to 1."""
    return _squad(text, references)["f1"]


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 if the text is one of the references, but for case, punctuation and articles, as for SQuAD; else 0."""
    return _squad(text, references)["exact_match"]


def _squad(text: str, references: Sequence[str]) -> dict[str, float]:
    target: Any = {"id": "0", "answers": {"text": list(references), "answer_start": [0] * len(references)}}
    scores = squad([{"id": "0", "prediction_text": text}], [target])
    return {name: score.item() / 100 for name, score in scores.items()}
