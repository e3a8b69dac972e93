"""The base class of LightningModules around networks with a classification head."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from zolightning.messages import counted
from zolightning.models.head_features import inputs_of
from zolightning.models.pretrained_module import Evaluation, PretrainedModule
from zolightning.models.scoring import classification_loss
from zolightning.network.adapter_folders import load_adapter, save_adapter
from zolightning.network.adapters import adapter_settings
from zolightning.network.head import belongs_to_head
from zolightning.rank_zero import rank_zero_warn


class Classifier(PretrainedModule):
    """A pretrained network whose head has a logit for each class, trained by the cross-entropy.

    With an `adapter` to start from, the head trains too.

    Args:
        model_name: an id on the Hugging Face hub or a folder in Hugging Face's format.
        num_classes: number of classes (Hugging Face's `num_labels`). If the model has another number, its head is
            replaced by a new one, whose weights depend on `seed_everything`. Default: the model's number.
        **settings: how the network is loaded and trained, see
            :class:`~zolightning.models.pretrained_module.PretrainedModule`.
    """

    def __init__(self, model_name: str, *, num_classes: int | None = None, **settings: Any) -> None:
        self._num_classes = num_classes  # before the constructor that loads the network by it
        super().__init__(model_name, **settings)
        config = self.model.config
        config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
        if adapter_settings(self.model) is not None:  # which froze the head, though it may be a new one
            for parameter in self.head_parameters.values():
                parameter.requires_grad_(True)

    def _own_settings(self) -> dict[str, Any]:
        return {"num_classes": self._num_classes}

    @property
    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters beyond the base model, and of a pooler in it, by their names in the model."""
        return {name: weight for name, weight in self.model.named_parameters() if belongs_to_head(self.model, name)}

    @property
    def head(self) -> nn.Linear:
        """The last layer of the head. Raises a ValueError if it is not an ``nn.Linear``."""
        modules = {name.rpartition(".")[0]: None for name in self.head_parameters}
        found = [self.model.get_submodule(name) for name in modules]
        last = found[-1] if found else None
        if not isinstance(last, nn.Linear) or last.out_features != self.model.config.num_labels:
            raise ValueError(f"`model_name` is a {type(self.model).__name__}, whose head does not end in an nn.Linear.")
        return last

    @torch.no_grad()
    def head_features(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The inputs of the head's last layer for each example, (B, H), and the examples' classes, (B,)."""
        with inputs_of(self.head) as read:
            self.logits(batch)
        features = read[0]
        if features.dim() == 3:  # it reads every token, and the last one that is not padding counts
            ids, pad = batch["input_ids"][:, 0], self.model.config.get_text_config().pad_token_id
            counts = batch["attention_mask"][:, 0] if pad is None else ids != pad
            place = (torch.arange(ids.shape[1], device=ids.device) * counts).argmax(dim=1)
            features = features[torch.arange(len(ids), device=ids.device), place]
        return features, batch["label"]

    @abstractmethod
    def logits(self, batch: Any) -> Tensor:
        """Returns the logits of a batch, (B, classes)."""

    def score(self, batch: Any) -> Tensor:
        return self.logits(batch).float()

    def evaluate(self, batch: Any) -> Evaluation:
        scores, label = self.score(batch), self.label(batch)
        # made there: no copy to wait for
        examples = torch.full((), len(label), dtype=torch.float32, device=label.device)
        return Evaluation(self.loss(scores, label), examples, scores)

    def loss(self, scores: Tensor, label: Tensor) -> Tensor:
        """Returns the mean loss of the scores of a batch, (B, classes), by its labels, (B,)."""
        return classification_loss(scores, label)

    def load_adapter(self, adapter: str) -> None:
        load_adapter(self.model, adapter, self.head_parameters)

    def save_adapter(self, folder: str | Path) -> None:
        save_adapter(self.model, folder, self.head_parameters)  # which trains with it

    def setup(self, stage: str) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        wanted, found = getattr(datamodule, "num_classes", None), self.model.config.num_labels
        if hasattr(datamodule, "num_classes") and wanted != found:
            classes = counted(found or 0, "class", "classes")
            raise MisconfigurationException(
                f"The head of `model_name` has {classes}, but the task {wanted or 'different ones in each row'}: set "
                "`model.num_classes` to the number of the task's `labels`, or to 1 for a `target`."
            )
        super().setup(stage)
        self._name_classes(getattr(datamodule, "task", None))

    def structure_dict(self) -> dict[str, Any]:
        return super().structure_dict() | {"labels": self._class_names()}

    def load_structure_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_structure_dict(saved)
        self._set_class_names(saved.get("labels", ()))

    def _class_names(self) -> list[str]:
        names: Any = self.model.config.id2label
        return [names[number] for number in sorted(names)]

    def _name_classes(self, task: Any) -> None:
        """Gives the classes names, for whoever loads the model that is exported.

        They are the task's labels, where these are words, else those that the model has, or else the task's answers.
        """
        present, labels = self._class_names(), getattr(task, "labels", ())
        is_named = present != [f"LABEL_{number}" for number in range(len(present))]
        if any(isinstance(label, str) and not label.isdecimal() for label in labels):
            names = list(map(str, labels))
            if names != present and sorted(map(str.lower, names)) == sorted(map(str.lower, present)):
                rank_zero_warn(
                    f"The head of `model_name` has the classes {present}, but the task's `labels` have another order, "
                    f"{labels}, which is used. Put the `labels` in the head's order to keep what it has learned."
                )
            self._set_class_names(names)
        elif labels and not is_named:
            answers = [answer.strip() for answer in getattr(task, "answers", ())]
            self._set_class_names(labels if any("{" in answer for answer in answers) else answers or labels)

    def _set_class_names(self, names: Sequence[Any]) -> None:
        if names:
            self.model.config.id2label = dict(enumerate(map(str, names)))
            self.model.config.label2id = {str(name): number for number, name in enumerate(names)}
