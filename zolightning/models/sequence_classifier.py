"""The LightningModule that fine-tunes a network with a head of classes over a text, or over two."""

from typing import Any

from torch import Tensor

from zolightning.adapters import adapter_settings
from zolightning.data.classification import Classification
from zolightning.data.encoding import Batch, Example
from zolightning.data.marked import encode_texts
from zolightning.data.rows import Row
from zolightning.data.source import NO_LABEL
from zolightning.data.task import Task
from zolightning.models.bidirectional import run_on_prompts
from zolightning.models.classifier import Classifier
from zolightning.models.suitability import refuse_reading_padding
from zolightning.models.text_module import TextModule


class SequenceClassifier(TextModule, Classifier):
    """A pretrained network that says which class a text is of, by a head over all of it, trained by the cross-entropy.

    It reads the prompt of a task, two texts where there is a ``{{ sep }}`` between them; the task's answers stand for
    its classes and are not read. With an `adapter` to start from, the head trains too.

    Example::

        model = SequenceClassifier("FacebookAI/roberta-base", num_classes=2)
        data = PromptDataModule("sst2", prompt="{{ sentence }}")
        Trainer(max_steps=1000).fit(model, datamodule=data)
    """

    network_class = "AutoModelForSequenceClassification"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # networks that read from left to right look for the last token that is no padding
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        if adapter_settings(self.model) is not None:  # which froze the head, though it may be a new one
            for parameter in self.head_parameters.values():
                parameter.requires_grad_(True)

    def encode(self, task: Task, row: Row, max_length: int, chat: bool) -> Example:
        """A row in tokens.

        Raises:
            ValueError: The task has no classes, or another objective; or the prompt is of more than two texts.
        """
        if not isinstance(task, Classification) or task.objective != "classification" or chat or row.shown:
            raise ValueError(
                "a classifier with a head needs a task with `answers` and the objective classification, without "
                "`data.chat` and `data.num_demonstrations`"
            )
        label = row.right[0] if row.right else NO_LABEL
        return encode_texts(self.tokenizer, row.prompt, task.num_classes, label=label, id=row.id, max_length=max_length)

    def logits(self, batch: Batch) -> Tensor:
        return self._logits(batch["input_ids"][:, 0], batch["attention_mask"][:, 0])

    def refuse_unsuitable(self) -> None:
        refuse_reading_padding(self.model, self.tokenizer, self._logits)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return run_on_prompts(self.model, self.tokenizer, input_ids, attention_mask).logits
