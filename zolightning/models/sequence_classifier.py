"""The LightningModule that fine-tunes a network with a classification or regression head over one or two texts."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import ModuleDict
from torch.nn import functional as F

from zolightning.data.batch import Batch
from zolightning.data.bidirectional import encode_for_classifier
from zolightning.data.classification import Classification
from zolightning.data.encoding import Example
from zolightning.data.regression import Regression
from zolightning.data.row import Row
from zolightning.data.source import NO_LABEL
from zolightning.data.task import Task
from zolightning.models.classifier import Classifier
from zolightning.models.correlation import Pearson, Spearman
from zolightning.models.suitability import refuse_reading_padding
from zolightning.models.text_module import TextModule


class SequenceClassifier(TextModule, Classifier):
    """A pretrained network with a head that classifies a text, trained by the cross-entropy.

    It reads the prompt of a task, or two texts with a ``{{ sep }}`` between them. The task's answers stand for the
    classes; their text is not read. With `num_classes` 1 the head predicts a number instead, the `target` of a task,
    trained by the mean squared error. With an `adapter` to start from, the head trains too.

    Example::

        model = SequenceClassifier("FacebookAI/roberta-base", num_classes=2)
        data = PromptDataModule("sst2", prompt="{{ sentence }}")
        Trainer(max_steps=1000).fit(model, datamodule=data)
    """

    network_class = "AutoModelForSequenceClassification"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # networks that read from left to right look for the last token that is not padding
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    @property
    def says_number(self) -> bool:
        """Whether the head has a single output, a predicted number."""
        return self.model.config.num_labels == 1

    def encode(self, task: Task, row: Row, max_length: int, chat: bool) -> Example:
        """A row in tokens, in place of :func:`~zolightning.data.examples.example_of`."""
        is_known = isinstance(task, Regression) or (
            isinstance(task, Classification) and task.objective != "language_modeling"
        )
        if not is_known or chat or row.shown:
            raise ValueError(
                "a classifier with a head needs a task with `answers` and the objective classification or accuracy, or "
                "with a `target`, without `data.chat` and `data.num_demonstrations`"
            )
        label = row.right[0] if row.right else NO_LABEL
        example = encode_for_classifier(
            self.tokenizer, row.prompt, task.num_classes or 1, label=label, id=row.id, max_length=max_length
        )
        if isinstance(task, Regression) and row.right:
            number = task.number(row.fields)
            example = replace(example, target=number, text=f"{example.text.removesuffix('[[0]]')}[[{number:g}]]")
        return example

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.says_number and stage != "predict":
            self.metrics = ModuleDict({"pearson": Pearson(), "spearman": Spearman()})

    def logits(self, batch: Batch) -> Tensor:
        return self.logits_both_ways(batch["input_ids"][:, 0], batch["attention_mask"][:, 0])

    def loss(self, scores: Tensor, label: Tensor) -> Tensor:
        return F.mse_loss(scores[:, 0], label) if self.says_number else super().loss(scores, label)

    def label(self, batch: Batch) -> Tensor:
        label = super().label(batch)
        return label.view(torch.float32) if self.says_number else label

    def prediction(self, scores: Tensor) -> Tensor:
        return scores[:, 0] if self.says_number else super().prediction(scores)

    def refuse_unsuitable(self) -> None:
        refuse_reading_padding(self.model, self.tokenizer, self.logits_both_ways)
