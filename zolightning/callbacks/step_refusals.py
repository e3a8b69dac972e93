"""Refuses steps that ZerothOrder cannot take: of parameters that its method does not hold, or with a backward pass.

A MisconfigurationException says what was found, and what to do instead.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from zolightning.messages import some

_NOTE = (
    "(Raised in `training_step` while ZerothOrder evaluated it: in evaluation mode, without gradients, several times a "
    "batch. If the network returns losses only in train mode, call its `.train()` in `training_step`.)"
)


def refuse_thawed(module: L.LightningModule, method: Optimizer, left_out: Iterable[nn.Parameter]) -> None:
    """Refuses a step if parameters train that the method does not hold, because they were frozen when it was made.

    Args:
        module: the module.
        method: the method, to which a callback may have added some of them (BackboneFinetuning).
        left_out: the parameters that were frozen.
    """
    thawed = [parameter for parameter in left_out if parameter.requires_grad]
    if thawed:
        added = {parameter for group in method.param_groups for parameter in group["params"]}
        names = {parameter: f"`{name}`" for name, parameter in module.named_parameters()}
        if missing := [names[parameter] for parameter in thawed if parameter not in added]:
            raise MisconfigurationException(
                f"{some(missing)}: `requires_grad` was False when the {type(method).__name__} of this run was made, "
                "and is True now. Freeze it in `on_train_start`, after that, or add it, as BackboneFinetuning "
                'does: `trainer.optimizers[0].add_param_group({"params": ...})`.'
            )


def refuse_own_gradients(module: L.LightningModule, error: RuntimeError) -> None:
    """Explains the error that a loss does not depend on the parameters with respect to which it is differentiated."""
    if "used in the graph" in str(error):
        raise MisconfigurationException(
            f"`training_step` of {type(module).__name__} differentiates with respect to the module's parameters, but "
            "ZerothOrder evaluates it at perturbed copies of them. Differentiate with respect to inputs, or to copies "
            "made in the step (`torch.func.functional_call`), or leave that term out."
        ) from error


@contextmanager
def evaluating(module: L.LightningModule, differentiates: bool) -> Iterator[None]:
    """A context for an evaluation of ``training_step``, with gradients enabled only if it `differentiates` itself.

    Its errors get a note that says how it is evaluated, and a call of ``backward`` is refused.
    """
    before = _gradients_of(module) if differentiates else None
    try:
        with torch.set_grad_enabled(differentiates):
            yield
    except Exception as error:
        error.add_note(_NOTE)
        raise
    if before is not None and _gradients_of(module) != before:
        raise MisconfigurationException(
            f"`training_step` of {type(module).__name__} calls `backward()`, but ZerothOrder trains on the loss that "
            "it returns: nothing would read these gradients. Remove the call. An optimizer of your own can step in "
            "`on_train_batch_end`, under `torch.enable_grad()`."
        )


def _gradients_of(module: L.LightningModule) -> list[tuple[int, int] | None]:
    """For each parameter, numbers that change whenever its gradient does, so that no values have to be compared."""
    gradients = (parameter.grad for parameter in module.parameters())
    return [None if gradient is None else (id(gradient), gradient._version) for gradient in gradients]
