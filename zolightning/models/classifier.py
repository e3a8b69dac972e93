"""What LightningModules around networks with a head of classes have in common."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zolightning.adapters import save_adapter
from zolightning.head import belongs_to_head
from zolightning.models.pretrained_module import Evaluation, PretrainedModule
from zolightning.models.scoring import classification_loss


class Classifier(PretrainedModule):
    """A pretrained network whose head has a logit for each class, trained by the cross-entropy."""

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters beyond the base model, and of a pooler in it, by their names in the model."""
        return {name: weight for name, weight in self.model.named_parameters() if belongs_to_head(self.model, name)}

    @abstractmethod
    def logits(self, batch: Any) -> Tensor:
        """Returns the logits of a batch, (B, classes)."""

    def score(self, batch: Any) -> Tensor:
        return self.logits(batch).float()

    def evaluate(self, batch: Any) -> Evaluation:
        scores, label = self.score(batch), batch["label"]
        examples = torch.full((), float(len(label)), device=label.device)  # made there: no copy to wait for
        return Evaluation(classification_loss(scores, label), examples, scores)

    def save_adapter(self, folder: str | Path) -> None:
        save_adapter(self.model, folder, self.head_parameters)  # which trains with it

    def setup(self, stage: str) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        wanted, found = getattr(datamodule, "num_classes", None), self.model.config.num_labels
        if hasattr(datamodule, "num_classes") and wanted != found:
            raise MisconfigurationException(
                f"The head of `model_name` has {found} classes, and the task {wanted or 'other ones in each row'}: set "
                "`model.num_classes` to the number of the task's `labels`."
            )
        super().setup(stage)
        self._name_classes(getattr(getattr(datamodule, "task", None), "labels", ()))

    def structure_dict(self) -> dict[str, Any]:
        names: Any = self.model.config.id2label
        return super().structure_dict() | {"labels": [names[number] for number in sorted(names)]}

    def load_structure_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_structure_dict(saved)
        self._name_classes(saved.get("labels", ()))

    def _name_classes(self, labels: Sequence[Any]) -> None:
        """Writes down the labels of the task, if there are any, for whoever loads the model that is exported."""
        if labels:
            self.model.config.id2label = dict(enumerate(map(str, labels)))
            self.model.config.label2id = {str(label): number for number, label in enumerate(labels)}
