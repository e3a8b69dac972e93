"""Starts training from a linear probe: the head is fitted to the network's features before the first step."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from zolightning.checks import require_integer
from zolightning.network.head import is_tied, untie_head
from zolightning.network.logistic_regression import check_probe, fit_probe, joined_features, strongest_penalty
from zolightning.network.structure import pretrained_model
from zolightning.partners import add_text, methods_of
from zolightning.rank_zero import rank_zero_info
from zolightning.scopes.calibration import read_examples

CS = tuple(10 ** (i / 3 - 4) for i in range(25))  # from 1e-4 to 1e4
TOLERANCE = 1e-4
_MOST_ROWS = 256  # that fit into the header of a ledger


class LinearProbing(Callback):
    """Fits the rows of the head that stand for answers before the first step, by logistic regression.

    Linear probing, then fine-tuning (LP-FT: Kumar et al. 2022, arXiv:2202.10054). A zeroth-order method needs hundreds
    of forwards to learn how a network's features tell the answers apart, though that is a convex problem. Here each
    training example is read once to solve it, and the method only has to improve the features.

    Each token of an answer, or each class of a classifier, is a class of the regression, and the class's weights become
    its row of the head, without a bias. The penalty is the strongest one whose loss in five-fold cross-validation is
    within a standard error of the least: a head that is very sure of the training examples leaves the method little to
    learn from them, and amplifies its noise. A head that is tied to the embeddings is replaced by a copy of them first.
    The scope decides whether the head is trained afterwards.

    A run that is resumed from a checkpoint is not probed again; a replay takes the rows from the ledger. The probe
    costs a forward pass for each batch of examples, which is counted with the first step.

    The module must have two methods, as causal and masked models and classifiers of this package do:
    ``head_features(batch)``, which returns the inputs of the head, (N, H), and the right row of the head for each,
    (N,); and ``set_head_rows(rows, weights)``. If its ``structure_dict`` does not describe these rows, a replay starts
    from the probed weights, not from the pretrained ones.

    Args:
        num_examples: how many training examples to use, from the first stored one on; None takes all.
        cs: values to choose from for the weight of the data against the penalty, scikit-learn's ``C``; a single value
            is used without cross-validation.
        tolerance: the largest entry of the gradient at which a fit ends.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        MisconfigurationException: when training starts, if the module cannot be probed, its weights are sharded or its
            head is offloaded, it has an adapter, with which no head is saved, or answers are numbers or free text.

    Example::

        callbacks = [LinearProbing(), TrainLayers([28, 29]), ZerothOrder(partial(MeZO, lr=1e-6))]
    """

    unties_head = True  # before a scope chooses, so that the head has a name of its own

    def __init__(self, num_examples: int | None = None, cs: Sequence[float] = CS, tolerance: float = TOLERANCE) -> None:
        if num_examples is not None:
            require_integer("num_examples", num_examples)
        check_probe(cs, tolerance)
        self.num_examples = num_examples
        self.cs = tuple(cs)
        self.tolerance = tolerance
        self._goes_on = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        self._goes_on = False
        self.check(trainer, pl_module)
        model = pretrained_model(pl_module)
        if model is not None and is_tied(model):  # before there is an optimizer, or a scope chooses
            untie_head(model)

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises what ``setup`` raises. The command line calls it before the validation that precedes a fit."""
        require_probed(pl_module, "`linear_probing`")
        if getattr(pl_module, "says_number", False):
            raise MisconfigurationException(
                "`linear_probing` is given, which fits a row of the head for each class, but the head of `model` "
                "predicts a number (`num_classes` 1). Leave `linear_probing` out."
            )
        weight = getattr(getattr(pl_module, "head", None), "weight", None)
        if weight is not None and weight.is_meta:
            raise MisconfigurationException(
                "`linear_probing` is given, but `model.device_map` leaves the head, or the embeddings it is tied to, "
                "in the host's memory or on the disk, where it cannot be changed. Keep it on a device."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                f"`linear_probing` is given, but `trainer.strategy` is {type(trainer.strategy).__name__}, under which "
                "no rank holds the whole head. Use 'zo_ddp', or leave `linear_probing` out."
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._goes_on = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._goes_on:
            return
        model = pretrained_model(pl_module)
        if hasattr(model, "peft_config"):
            raise MisconfigurationException(
                f"`linear_probing` is given, but {type(model).__name__} has an adapter, with which no head is saved. "
                "Leave one out, or probe first (configs/scopes/logistic_regression.yaml), export it and start from "
                "that."
            )
        module: Any = pl_module
        batches = read_examples(trainer, pl_module, module.head_features, self.num_examples)
        features, rows = joined_features(batches)
        require_few_classes(rows)
        found = fit_probe(features, rows, self.cs, self.tolerance, strongest_penalty)
        found = trainer.strategy.broadcast(found)  # the last bits differ between processors
        module.set_head_rows(found.rows, found.weights)
        for method in methods_of(trainer):
            method.count(len(batches))
        rank_zero_info(f"LinearProbing: {found}")
        add_text(trainer, "linear_probing", str(found))


def require_probed(module: L.LightningModule, field: str) -> None:
    """Raises MisconfigurationException, whose message names a field, unless a module can be probed."""
    for name in ("head_features", "set_head_rows"):
        if not hasattr(module, name):
            raise MisconfigurationException(
                f"{field} needs a module with `{name}`, as CausalLM and classifiers have it, got "
                f"{type(module).__name__}."
            )


def require_few_classes(rows: Tensor) -> None:
    """Raises MisconfigurationException if the right rows of the head, (N,), are numbers, or too many to be recorded."""
    num_rows = len(rows.unique())
    if rows.is_floating_point() or num_rows > _MOST_ROWS:
        found_ones = "numbers" if rows.is_floating_point() else f"{num_rows:,} different tokens"
        raise MisconfigurationException(
            f"A linear probe fits a row of the head for each class, but the answers of the training data are "
            f"{found_ones}: at most {_MOST_ROWS:,} classes are accepted. Leave `linear_probing` out."
        )
