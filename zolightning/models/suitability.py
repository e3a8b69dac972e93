"""What scoring takes for granted of a model, tried out: no token sees a later one, and padding changes nothing."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zolightning.evaluation.mode import evaluation_mode
from zolightning.models.scoring import last_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH, _PADDING = 8, 3  # tokens


@torch.no_grad()
def refuse_unsuitable(model: "PreTrainedModel") -> None:
    """Runs a model of transformers twice, over some of its tokens, in the dtype and on the device that it has.

    Raises:
        MisconfigurationException: The values exceed float16; attention is bidirectional, so the model would read the
            answer that it scores; or the scores of a text depend on the padding beside it, so on the other texts of a
            batch.
    """
    weight = model.get_input_embeddings().get_parameter("weight")
    ids = torch.linspace(1, len(weight) - 1, _LENGTH).long()
    changed = ids.clone()
    changed[-1] = ids[-2]
    rows = torch.stack([ids, changed]).to(weight.device)
    pad = rows.new_zeros(1, _PADDING)
    padded, mask = torch.cat([pad, rows[:1]], dim=1), torch.cat([pad, torch.ones_like(rows[:1])], dim=1)
    with evaluation_mode(model):
        logits, logits_before_changed = last_logits(model, rows, torch.ones_like(rows), _LENGTH).float()
        (padded_logits,) = last_logits(model, padded, mask, _LENGTH).float()

    # Rounding makes 1e-6 (float32) or 1e-3 (bfloat16, SmolLM2-135M). Random weights of a BERT make 9e-4 and 6e-3,
    # trained ones, and padding of an RWKV, about 1.
    tolerance = 0.1 if weight.dtype.itemsize < 4 else 1e-4
    name = type(model).__name__
    if weight.dtype is torch.float16 and not torch.isfinite(logits).all():
        raise MisconfigurationException(
            f"`model_name` is a {name} whose values float16 cannot hold: use bfloat16 or float32 (`trainer.precision`)."
        )
    if _difference(logits[:-1], logits_before_changed[:-1]) > tolerance:
        raise MisconfigurationException(
            f"`model_name` is a {name} whose tokens see those after them: it would read the answers that it scores. "
            "Use a causal language model (here: `is_decoder` true in config.json, if it was trained so)."
        )
    if _difference(logits, padded_logits) > tolerance:
        raise MisconfigurationException(
            f"`model_name` is a {name}, which does not mask padding: its scores would depend on the other examples "
            "of a batch. Use a model that honours `attention_mask`."
        )


def _difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference of logits, in standard deviations of the logits."""
    return ((one - other).square().mean().sqrt() / one.std()).item()
