"""Pretrained models as LightningModules, and how they score the answers of a batch.

In the order of reading:

* What all have in common: ``pretrained_module``; loaded by ``pretrained``, ``loading`` and ``pypi``, saved by
  ``saving``; ``frozen_weights`` stay out of checkpoints, ``spread`` is for several devices.
* Networks that read text: ``text_module``, ``language_model``, ``scoring``, ``attention_masks``; ``causal_lm`` with
  ``generation``, ``masked_lm``, ``seq2seq_lm``, ``logistic_regression_lm``.
* Networks with a head for classes: ``classifier``, ``sequence_classifier`` with ``correlation``, ``image_classifier``.
* What a linear probe reads: ``head_features``. What scoring assumes of a network: ``suitability``.
"""

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
