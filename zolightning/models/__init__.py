"""Pretrained causal language models and how they score the answers of a batch."""

from zolightning.models.causal_lm import CausalLM
from zolightning.models.pretrained import load_pretrained
from zolightning.models.scoring import (
    answer_log_probs,
    candidate_scores,
    classification_loss,
    language_modeling_loss,
)

__all__ = [
    "CausalLM",
    "answer_log_probs",
    "candidate_scores",
    "classification_loss",
    "language_modeling_loss",
    "load_pretrained",
]
