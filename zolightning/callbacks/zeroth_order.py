"""Zeroth-order training of a LightningModule that knows nothing of it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zolightning.callbacks.folding import choose_folding, is_validation_next
from zolightning.callbacks.micro_batches import evaluate_in_parts, in_examples, with_num_terms
from zolightning.callbacks.own_optimizer import OwnOptimizer
from zolightning.callbacks.refusals import refuse_module, refuse_unsupported
from zolightning.callbacks.subspace_resampling import require_resampling
from zolightning.evaluation.capture import CudaCapture
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.stacked import network_of
from zolightning.optim import NonFiniteLossError, SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.optim.checks import Loss
from zolightning.optim.estimators import PerExample
from zolightning.optim.schedules import WarmupDecay
from zolightning.partners import callbacks_of, methods_of
from zolightning.ranks import layout_of
from zolightning.step import zeroth_order_step

Method = Callable[[Iterable[Any]], ZerothOrderOptimizer]

_COUNTERS = ("step", "refresh", "folds")  # of a method: they name its directions and bases
_NOTE = (
    "(Raised in `training_step` while ZerothOrder evaluated it: in evaluation mode, without gradients, several times a "
    "batch. A network that returns losses in train mode only needs its `.train()` called in `training_step`.)"
)


class ZerothOrder(Callback):
    """Trains the module by a zeroth-order method: its ``training_step`` is evaluated, never differentiated.

    During ``fit`` the module's optimizer is replaced by `method` over the same parameters, and each batch becomes one
    :func:`~zolightning.step.zeroth_order_step` whose loss is the module's own ``training_step``. That one runs several
    times a batch, in evaluation mode, without gradients and on the same random numbers; what it logs, returns and
    changes in the first run is what other callbacks see. Without this callback the same module trains by
    backpropagation.

    Outside a step's evaluations the module's weights are the trained ones, for whoever reads or writes them in a hook.
    Subspace methods add their updates to them at every step, or, where nobody looks between steps, at a resampling, a
    validation and the end (:mod:`zolightning.callbacks.folding`).

    What ``training_step`` returns: a scalar tensor; or a dictionary with it as ``"loss"`` and, where the loss is a mean
    over something else than the batch's examples (tokens), their number as ``"num_terms"``; or None, to skip the batch.

    ``configure_optimizers`` of the module says which parameters train and which of them have no weight decay. Its
    optimizer and schedulers do not run, and hooks around them (``optimizer_step``, ``lr_scheduler_step``,
    ``on_before_zero_grad``) are not called; a line at the start says so. A second fit with the same callback goes on
    with new directions.

    Args:
        method: makes the optimizer from the parameters: ``functools.partial(MeZO, lr=1e-6)`` in Python,
            ``class_path`` and ``init_args`` in YAML.
        lr_scheduler: makes a scheduler from the optimizer; stepped after every optimizer step.
        micro_batch_size: evaluate a batch in parts of this many examples, along the first dimension of each of its
            tensors, under the same directions. The parts' losses are averaged as one batch's would be: by number
            of examples, or by ``"num_terms"`` where ``training_step`` returns it beside ``"loss"``.
        skip_nonfinite: skip a step whose loss is NaN or infinite, instead of stopping; more than 20 such steps in a
            row stop the run nevertheless.
        evaluations_per_forward: how many evaluations of a step share one run of the network, on the batch repeated
            that often: faster where batches are small, for as many times the activations' memory. It needs one
            submodule with all trainable parameters, whose outputs have one row an example
            (:mod:`zolightning.evaluation.stacked`); where evaluations turn out to be inseparable, a warning says why
            and each runs by itself. Leave it at 1 where only late layers train: what lies below them is computed once
            a step then.
        keep_prefix_gib: memory, in GiB, for what lies below the first trained layer to be computed once a run instead
            of once a step; for training sets whose batches come again (``data.fixed_batches``).
        cuda_graphs: on a CUDA device: launch the network's forward by one call instead of thousands, where a batch
            has the shapes of an earlier one: for batches of few tokens. What cannot be recorded runs as ever, and a
            warning says why (:mod:`zolightning.evaluation.graphs`). All of the network is then computed in each
            evaluation, so leave it off where only late layers train.

    With the method's ``estimator=PerExample()`` each example of a batch has a direction of its own, in the same two
    forwards. The loss of a batch must be a mean over its examples, as for micro-batches: ``training_step`` is called
    for the batch, in which the network runs, and for each example as a batch of one, in which it has that run's rows.
    Where rows are not the examples', or not independent, the network runs once an example, after a warning.

    Raises:
        MisconfigurationException: in ``setup``, for strategies, precisions, Trainer options and modules with which
            forward-only training would be wrong (:mod:`zolightning.callbacks.refusals`), with what to use instead.

    Example::

        trainer = L.Trainer(max_steps=1000, callbacks=[ZerothOrder(partial(MeZO, lr=1e-6, eps=1e-3))])
        trainer.fit(any_lightning_module, datamodule)
    """

    def __init__(
        self,
        method: Method,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        micro_batch_size: int | None = None,
        skip_nonfinite: bool = False,
        evaluations_per_forward: int = 1,
        keep_prefix_gib: float = 0.0,
        cuda_graphs: bool = False,
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"`micro_batch_size` must be at least 1, got {micro_batch_size}.")
        if evaluations_per_forward < 1:
            raise ValueError(f"`evaluations_per_forward` must be at least 1, got {evaluations_per_forward}.")
        if not keep_prefix_gib >= 0:
            raise ValueError(f"`keep_prefix_gib` must not be negative, got {keep_prefix_gib}.")
        if cuda_graphs and keep_prefix_gib:
            raise ValueError(
                "`cuda_graphs` is True, and a graph runs all of the network: leave `keep_prefix_gib` at 0, got "
                f"{keep_prefix_gib}."
            )
        self.method = method
        self.lr_scheduler = lr_scheduler
        self.micro_batch_size = micro_batch_size
        self.skip_nonfinite = skip_nonfinite
        self.evaluations_per_forward = evaluations_per_forward
        self.keep_prefix_gib = keep_prefix_gib
        self.cuda_graphs = cuda_graphs
        self._replaced: dict[str, Any] = {}  # what the instance of the module had itself; None: its class's
        self._differentiates = False
        self._counters: dict[str, int] = {}  # where the last fit with this callback ended

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.check(trainer, pl_module)
        if self.keep_prefix_gib and not getattr(getattr(trainer, "datamodule", None), "fixed_batches", True):
            raise MisconfigurationException(
                f"`keep_prefix_gib` is {self.keep_prefix_gib}, and `fixed_batches` of the data is False: what is kept "
                "would never be used. Set `data.fixed_batches` to True, or `keep_prefix_gib` to 0."
            )
        if trainer.precision == "64-true":
            pl_module.double()  # Lightning does so after it has loaded a checkpoint, which would be rounded to float32
        own_step, own_optimizers = pl_module.training_step, pl_module.configure_optimizers
        takes_index = is_param_in_hook_signature(own_step, "batch_idx", min_args=2)

        def zeroth_order_training_step(batch: Any, batch_idx: int = 0) -> Any:
            index = (batch_idx,) if takes_index else ()
            return self._step(pl_module, lambda part: own_step(part, *index), batch, batch_idx)

        replacements = {
            "training_step": zeroth_order_training_step,
            "configure_optimizers": lambda: self._configure(pl_module, own_optimizers()),
        }
        # An instance may have a step of its own, as modules under torch.compile do.
        self._replaced = {name: vars(pl_module).get(name) for name in replacements}
        vars(pl_module).update(replacements)
        pl_module.automatic_optimization = False
        self._differentiates = False

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses what ``setup`` refuses; for whoever has something long to do before a fit.

        Raises:
            MisconfigurationException: naming the option or the module, what was found and what is accepted.
        """
        refuse_unsupported(trainer)
        refuse_module(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._give_back(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._give_back(trainer, pl_module)  # Lightning calls no teardown after an exception or an interrupt

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Not only when it starts: a run that goes on from a checkpoint of this batch skips the validation.
        if is_validation_next(trainer):
            _fold(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            _fold(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _fold(trainer)

    def _give_back(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._replaced:
            return
        for optimizer in methods_of(trainer):
            optimizer.detach()
            self._counters = {name: optimizer.param_groups[0].get(name, 0) for name in _COUNTERS}
        for name, own in self._replaced.items():
            del vars(pl_module)[name]
            if own is not None:
                vars(pl_module)[name] = own
        self._replaced = {}
        # `trainer.global_step` reads the automatic counter of an automatic module, also after the fit.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = trainer.global_step
        pl_module.automatic_optimization = True

    def _configure(self, pl_module: L.LightningModule, configured: Any) -> Any:
        """What Lightning is told instead of what the module's own ``configure_optimizers`` returned."""
        own = OwnOptimizer(configured)
        groups = own.groups(pl_module)
        optimizer = self.method(groups if len(groups) > 1 else groups[0]["params"])
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise MisconfigurationException(
                "`method` must make a zeroth-order optimizer (zolightning.optim.MeZO, for example), "
                f"got {type(optimizer).__name__}."
            )
        if isinstance(optimizer, SubspaceOptimizer):
            callbacks = callbacks_of(pl_module.trainer)
            require_resampling(optimizer, callbacks)
            choose_folding(optimizer, callbacks, pl_module)
        optimizer.attach(pl_module, self.evaluations_per_forward)
        optimizer.evaluator.prefix.keep_bytes = int(self.keep_prefix_gib * 2**30)
        if self.cuda_graphs:
            network = network_of(pl_module, [parameter for *_, parameter in optimizer.trainable()], "cuda_graphs")
            optimizer.evaluator.graphs = GraphedNetwork(network, CudaCapture(pl_module.device))
        for group in optimizer.param_groups:
            group.update({name: value for name, value in self._counters.items() if name in group})
        rank_zero_info(
            f"{type(optimizer).__name__} trains {sum(len(group['params']) for group in groups)} of "
            f"{len(list(pl_module.parameters()))} parameter tensors of {type(pl_module).__name__}"
            f"{own.replaced(pl_module)}."
        )
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise MisconfigurationException(
                "`lr_scheduler` is ReduceLROnPlateau, which waits for a metric, and schedulers are stepped after every "
                "training step. Use one that goes by the step, such as WarmupDecay or CosineAnnealingLR."
            )
        if isinstance(scheduler, WarmupDecay):
            scheduler.fit_to(pl_module.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def _step(
        self, pl_module: L.LightningModule, training_step: Callable[[Any], Any], batch: Any, batch_idx: int
    ) -> Any:
        """Trains on a batch, and returns what `training_step` returned when it was first evaluated."""
        first: Any = None
        (optimizer, *_) = methods_of(pl_module.trainer)
        evaluator, is_replaying = optimizer.evaluator, optimizer.is_replaying

        def loss(part: Any = batch, size: int | None = self.micro_batch_size) -> Loss:
            nonlocal first
            try:
                with torch.set_grad_enabled(self._differentiates):
                    output = training_step(part) if size is None else evaluate_in_parts(training_step, part, size)
            except Exception as error:
                error.add_note(_NOTE)
                raise
            if evaluator.is_first:
                first = apply_to_collection(output, Tensor, Tensor.detach)
            return with_num_terms(output, part, pl_module.device)

        examples = None
        if isinstance(optimizer.estimator, PerExample):
            layout = layout_of(pl_module.trainer)
            place = layout.data_rank(pl_module.global_rank), layout.data_parallel_size
            examples = in_examples(lambda part: loss(part, None), batch, self.micro_batch_size, *place)
        try:
            record = zeroth_order_step(pl_module, loss, self.skip_nonfinite, examples)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error} {self._advice(batch, batch_idx)}") from None
        except RuntimeError as error:
            if self._differentiates and "used in the graph" in str(error):
                raise MisconfigurationException(
                    f"`training_step` of {type(pl_module).__name__} differentiates by the module's parameters, and "
                    "ZerothOrder evaluates it at perturbed copies of them. Differentiate by inputs, or by copies made "
                    "in the step (`torch.func.functional_call`), or leave that term out."
                ) from error
            if self._differentiates or "does not require grad" not in str(error):
                raise
            self._differentiates = True
            rank_zero_info(
                f"`training_step` of {type(pl_module).__name__} differentiates (torch.autograd), so it is evaluated "
                "with gradients enabled, which keeps activations in memory as in backpropagation."
            )
            return self._step(pl_module, training_step, batch, batch_idx)
        if is_replaying:
            return {"loss": torch.tensor(record.losses[0], device=pl_module.device)}
        if first is None:
            rank_zero_warn("`training_step` returned None, which skips the batch. If that was on purpose, ignore this.")
        return first

    def _advice(self, batch: Any, batch_idx: int) -> str:
        ids = batch.get("id") if isinstance(batch, Mapping) else None
        which = "" if ids is None else f", ids {ids.tolist() if isinstance(ids, Tensor) else ids}"
        otherwise = "" if self.skip_nonfinite else ", or `skip_nonfinite=True` to pass over such batches"
        return (
            f"Batch {batch_idx}{which}. The weights are those of the last step; a smaller `lr` or `eps` may help"
            f"{otherwise}."
        )


def _fold(trainer: L.Trainer) -> None:
    for optimizer in methods_of(trainer):
        optimizer.fold()
