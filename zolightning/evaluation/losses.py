"""Losses: what a user's loss function may return, and how the package reads it.

The loss that a step is given is a :data:`LossFunction`, which returns a :data:`LossOutput`. The evaluator
(:mod:`zolightning.evaluation.evaluator`) calls it once for each evaluation and reads the result with
:func:`loss_and_terms`. Whatever runs evaluations below it gets functions that return :class:`LossAndTerms`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from zolightning.rank_zero import rank_zero_warn

LossOutput = Tensor | tuple[Any, Any] | Mapping[str, Any]
"""What a loss function may return, see :func:`loss_and_terms`: a loss, and its number of terms if that is not 1."""

LossFunction = Callable[[], LossOutput]
"""Computes the loss of one batch anew at each call."""


class LossAndTerms(NamedTuple):
    """A loss and the number of terms of which it is the mean, both scalars, float64 (float32 on Apple's GPUs)."""

    loss: Tensor
    terms: Tensor


_SPACINGS = {torch.bfloat16: "0.4 to 0.8 %", torch.float16: "0.05 to 0.1 %"}


def loss_and_terms(output: LossOutput) -> LossAndTerms:
    """Reads the loss and its number of terms from what a loss function returned.

    Losses of micro-batches and of ranks are averaged with their numbers of terms as weights, which gives the loss of
    the whole batch if each is a mean over its own terms. Other entries of a user's dictionary, ``"weight"`` included,
    are ignored. The loss keeps its forward-mode derivative, if it has one.

    Warns of a loss in half precision, such as classifiers of transformers return under "bf16-true": a step's losses
    differ by less than its rounding.

    Args:
        output: a tensor with one element, a pair of that tensor and the number, or a mapping with the tensor as
            ``"loss"`` and the number as ``"num_terms"``. The number is at least 0, and 1 where it is left out.

    Raises:
        TypeError: if the loss is not such a tensor.
        ValueError: if the number of terms is not a single number.
    """
    loss: Any = output
    terms: Any = 1.0
    if isinstance(output, tuple):
        loss, terms = output
    elif isinstance(output, Mapping):
        loss, terms = output.get("loss"), output.get("num_terms", 1.0)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        plain = loss if loss is None or isinstance(loss, int | float) else f"a {type(loss).__name__}"
        keys = [f"`{key}`" for key in output if key != "num_terms"] if isinstance(output, Mapping) else []
        without = f": a dictionary with {', '.join(keys)}, and no `loss`" if keys and "`loss`" not in keys else ""
        raise TypeError(f"The loss must be a tensor with one element, got {getattr(loss, 'shape', plain)}{without}.")
    if not (isinstance(terms, int | float) or (isinstance(terms, Tensor) and terms.numel() == 1)):
        raise ValueError(
            "`num_terms`, by which a loss is averaged, must be a number or a tensor with one element, got "
            f"{getattr(terms, 'shape', repr(terms))}. If yours means something else, rename it."
        )
    if loss.dtype in _SPACINGS:
        rank_zero_warn(
            f"The loss is in {str(loss.dtype).removeprefix('torch.')}, where neighbouring numbers are "
            f"{_SPACINGS[loss.dtype]} apart. The losses of a step may differ by less, so rounding would decide where "
            "weights go. Compute the loss in float32, as in `F.cross_entropy(logits.float(), labels)`."
        )
    wide = torch.float32 if loss.device.type == "mps" else torch.float64
    loss, derivative = forward_ad.unpack_dual(loss)
    loss = loss.detach().view(()).to(wide)
    if derivative is not None:
        loss = forward_ad.make_dual(loss, derivative.detach().view(()).to(wide))
    if isinstance(terms, Tensor):
        return LossAndTerms(loss, terms.detach().view(()).to(loss.device, loss.dtype, non_blocking=True))
    # A kernel's argument: a copy from the host would wait for the device
    return LossAndTerms(loss, torch.full_like(loss, terms))


def require_terms(terms: Sequence[float]) -> None:
    """Raises a ValueError if a loss is said to average a negative number of terms."""
    if min(terms) < 0:
        raise ValueError(f"`num_terms`, by which a loss is averaged, must not be negative, got {min(terms):g}.")
