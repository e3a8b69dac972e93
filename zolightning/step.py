"""One zeroth-order training step of any LightningModule."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau

import zolightning.strategies  # noqa: F401  # registers `zo_ddp` and `zo_fsdp`
from zolightning.evaluation.evaluator import Evaluator
from zolightning.evaluation.examples import MicroBatches
from zolightning.evaluation.losses import LossFunction, LossOutput
from zolightning.evaluation.nested import map_tensors
from zolightning.evaluation.replaced import replaced
from zolightning.optim import StepRecord, ZerothOrderOptimizer
from zolightning.optim.share import WHOLE, Share
from zolightning.partners import log_number
from zolightning.strategies.ranks import LossExchange, layout_of
from zolightning.training_loop import log_again, log_nothing


def zeroth_order_step(
    module: L.LightningModule,
    loss_fn: LossFunction,
    skip_nonfinite: bool = False,
    micro_batches: MicroBatches | None = None,
) -> StepRecord:
    """Takes one zeroth-order step: to be called in the ``training_step`` of a module with manual optimization.

    It estimates the gradient, updates the weights, steps the learning rate schedulers and logs.
    ``configure_optimizers`` must return one method of :mod:`zolightning.optim`. The loss is evaluated several times on
    the same batch, without gradients and in evaluation mode (no dropout; batch norms use their stored statistics); the
    module's mode is restored afterwards. Several ranks exchange one sum of a few numbers per step.

    Every learning rate scheduler takes a step, whatever its interval, except ``ReduceLROnPlateau``, which needs a
    metric and must be stepped by the module.

    Logs ``train/loss`` (mean of the evaluated losses), ``zo/projected_grad`` (RMS over queries), ``zo/lr``,
    ``zo/forward_passes`` and ``zo/skipped``. What `loss_fn` logs by ``module.log`` is kept from the first evaluation
    only; if it logs ``train/loss``, that value is used.

    Args:
        module: a module with ``automatic_optimization = False``.
        loss_fn: computes the loss of the current batch anew at each call: a scalar tensor, or a mapping with it as
            ``"loss"`` and the number of terms it is the mean of as ``"num_terms"``.
        skip_nonfinite: whether to leave the weights unchanged if a loss is NaN or infinite, instead of raising; at most
            20 times in a row.
        micro_batches: for the estimator ``PerExample()``: the same batch in parts, with the loss of each example, see
            :meth:`~zolightning.optim.base.ZerothOrderOptimizer.estimate`.

    Returns:
        The record of the step.

    Raises:
        NonFiniteLossError: if a loss is NaN or infinite; the weights are those of the last step.
        RanksError: if the ranks of a run differ or one does not answer; the weights are those of the last step.
        MisconfigurationException: if the module optimizes automatically, or its optimizer is another one.
    """
    wrapper: Any = module.optimizers()
    optimizer = getattr(wrapper, "optimizer", wrapper)
    if not isinstance(optimizer, ZerothOrderOptimizer):
        several = (
            [type(getattr(one, "optimizer", one)).__name__ for one in wrapper] if isinstance(wrapper, list) else []
        )
        more = ". Step an optimizer of other layers yourself, without handing it to Lightning" if several else ""
        raise MisconfigurationException(
            "`configure_optimizers` must return one zeroth-order method for `zeroth_order_step` "
            f"(zolightning.optim.MeZO, for example), got {', '.join(several) or type(optimizer).__name__}{more}."
        )
    if module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} has `automatic_optimization=True`, but `zeroth_order_step` takes the step "
            "itself. Set it to False in `__init__`, or use the ZerothOrder callback and return the loss."
        )
    if not optimizer.attached:
        optimizer.attach(module)

    is_replaying = optimizer.is_replaying
    with logged_once(module, optimizer.evaluator, loss_fn) as (evaluate, own_names):
        parts = micro_batches and [part.each(evaluate) for part in micro_batches]
        record = optimizer.estimate(evaluate, _share(module, optimizer), skip_nonfinite, parts)
    wrapper.step()
    schedulers = module.lr_schedulers()
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
    # Lightning refuses a name that is logged in two ways, and how the module would have logged this one is not known.
    _log(module, optimizer, record, {"train/loss"} if is_replaying else own_names)
    return record


@contextmanager
def logged_once(
    module: L.LightningModule, evaluator: Evaluator, loss_fn: LossFunction
) -> Iterator[tuple[Callable[..., LossOutput], set[str]]]:
    """A context at whose end is logged what the first evaluation of the step has given ``module.log``.

    That is the last one that is called the first: evaluations that turn out not to share a forward begin anew. What is
    logged by the epoch is a trace that the step leaves, as a record does not hold it.

    Yields a function that evaluates `loss_fn`, or another loss given to it, and the names that were logged.
    """
    is_logging = evaluator.leaves_more = False
    logged: dict[str | int, tuple[str, tuple[Any, ...], dict[str, Any]]] = {}
    names: set[str] = set()

    def log(name: str, *args: Any, **kwargs: Any) -> None:
        if is_logging:
            names.add(name)
            is_of_epoch = bool(kwargs.get("on_epoch", any(args[4:5])))
            evaluator.leaves_more |= is_of_epoch
            # Ranks exchange one value a step: the last of their micro-batches', whose numbers may differ
            key = name if kwargs.get("sync_dist") and not is_of_epoch else len(logged)
            # The module may go on to write to a tensor that it logs
            logged[key] = (name, *map_tensors(torch.clone, (args, kwargs)))

    def evaluate(loss: LossFunction = loss_fn) -> LossOutput:
        nonlocal is_logging
        is_logging = evaluator.is_first
        if is_logging:
            logged.clear()
            names.clear()
        return loss()

    with replaced(module, "log", log):
        yield evaluate, names
    for name, args, kwargs in logged.values():
        log_again(module.log, name, *args, **kwargs)


def _share(module: L.LightningModule, optimizer: ZerothOrderOptimizer) -> Share:
    if module.trainer.world_size == 1:
        return WHOLE
    layout, rank = layout_of(module.trainer), module.global_rank
    exchange = LossExchange(module, optimizer, layout)
    return Share(exchange, layout.data_rank(rank), layout.perturbation_rank(rank), layout.perturbation_parallel_size)


def _log(module: L.LightningModule, optimizer: ZerothOrderOptimizer, record: StepRecord, own_names: Set[str]) -> None:
    log_number(module, "zo/lr", record.lr[0])
    log_number(module, "zo/forward_passes", optimizer.param_groups[0]["forward_passes"])
    if not record.projected_grads:
        log_number(module, "zo/skipped", 1.0, on_step=False, on_epoch=True, reduce_fx=torch.sum)
        for name in {"zo/projected_grad", "train/loss"} - own_names:
            log_nothing(module, name)
        return
    squares = [g * g for g in record.projected_grads]
    log_number(module, "zo/projected_grad", (sum(squares) / len(squares)) ** 0.5)
    if "train/loss" not in own_names:  # Lightning refuses a name that is logged in two ways
        log_number(module, "train/loss", record.loss, prog_bar=True)
