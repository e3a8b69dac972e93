"""Trains the head only."""

from typing import Any

import lightning as L

from zolightning.network.adapters import adapter_settings
from zolightning.network.head import is_tied, untie_head
from zolightning.network.structure import pretrained_model
from zolightning.scopes.scope import Scope, Selection


class TrainHead(Scope):
    """Trains the output layer of a language model of transformers, or the head of a classifier with its pooler.

    All layers below run only once per step. A head that is tied to the embeddings becomes a copy of them first, so
    that checkpoints and exports hold both.

    Args:
        untie: whether to untie a tied head; if False, its matrix trains as head and embeddings at once.
    """

    def __init__(self, untie: bool = True) -> None:
        super().__init__()
        self.untie = untie

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        require_pretrained_model(self, pl_module)

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        model = require_pretrained_model(self, pl_module)
        if (adapter := adapter_settings(model)) is not None:
            raise ValueError(
                f"`scope` is TrainHead, but the model has an adapter ({adapter}): an export would hold the adapter "
                "only. Merge it into the model first, or leave the scope out."
            )
        tied = is_tied(model)
        if tied and self.untie:
            untie_head(model)
        inside = set(getattr(pl_module, "head_parameters", {}).values())  # the pooler of a classifier of ours
        if model.base_model is model and (head := model.get_output_embeddings()) is not None:
            inside.update(head.parameters())  # of a T5, which keeps no base model apart
        below = set(model.base_model.parameters()) - inside
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        chosen = [names[parameter] for parameter in model.parameters() if parameter not in below]
        if tied and not self.untie:
            chosen.append(names[model.get_output_embeddings().weight])
        if not chosen:
            raise ValueError(
                f"`scope` is TrainHead, but {type(model).__name__} has no parameters beyond its base model. Name some "
                "by TrainParameters."
            )
        reason = "the head" if not tied else "the head, untied" if self.untie else "the head, which embeds tokens too"
        return Selection(dict.fromkeys(chosen), reason)


def require_pretrained_model(scope: Scope, module: L.LightningModule) -> Any:
    """The outermost model of transformers in a module.

    Raises:
        ValueError: if there is none, naming the scope that needs one.
    """
    model = pretrained_model(module)
    if model is None:
        raise ValueError(
            f"`scope` is {type(scope).__name__}, which needs a PreTrainedModel of transformers, but "
            f"{type(module).__name__} has none."
        )
    return model
