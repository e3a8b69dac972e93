"""The base class of LightningModules that choose among the candidate answers to a prompt by likelihood."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from zolightning.data.batch import Batch
from zolightning.models.pretrained_module import Evaluation
from zolightning.models.scoring import (
    calibrated_scores,
    candidate_scores,
    classification_loss,
    language_modeling_loss,
    of_label,
)
from zolightning.models.text_module import TextModule


class LanguageModel(TextModule):
    """Abstract base of pretrained networks that give a probability to each token of an answer."""

    @abstractmethod
    def answer_log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each answer token, (B, C, A), in float32, and the mask of those that exist."""

    def score(self, batch: Batch) -> Tensor:
        log_probs, mask = self.answer_log_probs(batch)
        if "content_free" in batch:
            return self._calibrated(batch, log_probs, mask)
        return candidate_scores(log_probs, mask)

    def evaluate(self, batch: Batch) -> Evaluation:
        label = batch["label"]
        log_probs, mask = self.answer_log_probs(batch)
        scores = candidate_scores(log_probs, mask)
        choice = self._calibrated(batch, log_probs, mask) if "content_free" in batch else scores
        if batch["objective"] == "language_modeling":
            gold_tokens = of_label(mask, label).sum().float()
            return Evaluation(language_modeling_loss(log_probs, mask, label), gold_tokens, choice)
        # made there: no copy to wait for
        examples = torch.full((), len(label), dtype=torch.float32, device=label.device)
        return Evaluation(classification_loss(scores, label), examples, choice)

    def _calibrated(self, batch: Batch, log_probs: Tensor, mask: Tensor) -> Tensor:
        free, _ = self.answer_log_probs(batch["content_free"])
        return calibrated_scores(log_probs, mask, free[batch["content_free_place"]])

    def means(self, batch: Batch, scores: Tensor) -> dict[str, float | Tensor]:
        """The share of right choices, where there are no classes: each row brings its own candidates."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule.num_classes is not None:
            return {}
        return {"accuracy": self.right(batch, scores).mean()}

    def right(self, batch: Batch, scores: Tensor) -> Tensor:
        if "right" not in batch:
            return super().right(batch, scores)
        return batch["right"].gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0].float()
