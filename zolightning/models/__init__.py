"""Pretrained models as LightningModules, and how they score the answers of a batch."""

from zolightning.models.causal_lm import CausalLM
from zolightning.models.image_classifier import ImageClassifier
from zolightning.models.logistic_regression_lm import LogisticRegressionLM
from zolightning.models.masked_lm import MaskedLM
from zolightning.models.pretrained import load_pretrained
from zolightning.models.scoring import (
    answer_log_probs,
    candidate_scores,
    classification_loss,
    language_modeling_loss,
)
from zolightning.models.seq2seq_lm import Seq2SeqLM
from zolightning.models.sequence_classifier import SequenceClassifier

__all__ = [
    "CausalLM",
    "ImageClassifier",
    "LogisticRegressionLM",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassifier",
    "answer_log_probs",
    "candidate_scores",
    "classification_loss",
    "language_modeling_loss",
    "load_pretrained",
]
