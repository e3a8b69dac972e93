"""The output layer of a model of transformers: whether it is tied to the embeddings, untying it, setting its rows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zolightning.directions.shards import is_sharded
from zolightning.network.plain_tensors import as_plain, from_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNTIED = "has_untied_head"  # attribute of a model whose head was tied when it was loaded


def belongs_to_head(model: "PreTrainedModel", name: str) -> bool:
    """Whether the weight of this name is of a classifier's head: beyond the base model, or of a pooler in it.

    The pooler of a BERT is inside its base model, and of use to classifiers alone.
    """
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the output layer and the embeddings share a weight."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is embeddings.weight


def has_untied_head(model: "PreTrainedModel") -> bool:
    """Whether the model's head was untied by :func:`untie_head`."""
    return bool(getattr(model, _UNTIED, False))


def untie_head(model: "PreTrainedModel") -> None:
    """Replaces the weight of a tied head by a copy of the embeddings, and updates the model's config.

    Raises:
        ValueError: if weights are sharded over ranks already, or the model scales its outputs because they are tied.
    """
    refuse_sharded(model, "The head is to be untied from the embeddings of")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"The head of {type(model).__name__} cannot be untied from its embeddings: such a model scales what a tied "
            "head reads, and would compute something else. Train it as it is (TrainHead: `untie` False)."
        )
    head = model.get_output_embeddings()
    tied = head.weight
    head.weight = nn.Parameter(tied.detach().clone(), tied.requires_grad)
    _set_config(model, tied=False)
    setattr(model, _UNTIED, True)


def refuse_sharded(model: "PreTrainedModel", what: str) -> None:
    """Raises a ValueError if a model's weights are sharded over ranks, when none can be added any more."""
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"{what} a model whose weights are sharded over ranks already, as they are from a validation on: set "
            "`validate_first` to False, or use a strategy under which every rank holds all of them ('zo_ddp')."
        )


def restore_head(model: "PreTrainedModel", untied: bool) -> None:
    """Ties or unties the head, so that saved weights of the other kind can be loaded."""
    if untied == has_untied_head(model):
        return
    if untied:
        untie_head(model)
        return
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    _set_config(model, tied=True)
    delattr(model, _UNTIED)


@torch.no_grad()
def set_rows(head: nn.Linear, rows: Tensor, weights: Tensor) -> None:
    """Replaces some rows of an output layer, (K,) of them by (K, H); a bias becomes 0 there."""
    places = rows.to(head.weight.device)
    head.weight[places] = weights.to(head.weight)
    if head.bias is not None:
        head.bias[places] = 0


def rows_dict(head: nn.Linear, rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of an output layer as plain values, without loss."""
    return {"rows": list(rows), **as_plain(head.weight.detach()[list(rows)])}


def load_rows_dict(head: nn.Linear, saved: Mapping[str, Any]) -> None:
    """Puts back what :func:`rows_dict` described."""
    set_rows(head, torch.tensor(saved["rows"]), from_plain(saved).reshape(len(saved["rows"]), -1))


def _set_config(model: "PreTrainedModel", tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
