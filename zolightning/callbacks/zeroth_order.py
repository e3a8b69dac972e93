"""Zeroth-order training of any LightningModule."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zolightning.callbacks.folding import choose_folding
from zolightning.callbacks.micro_batches import evaluate_in_parts, in_examples, with_num_terms
from zolightning.callbacks.own_optimizer import OwnOptimizer
from zolightning.callbacks.refusals import made_scheduler, refuse_module, refuse_unsupported
from zolightning.callbacks.step_refusals import evaluating, refuse_own_gradients, refuse_thawed
from zolightning.callbacks.subspace_resampling import require_resampling
from zolightning.checks import require_integer
from zolightning.directions.dense import compute_dtype
from zolightning.evaluation.fresh_batches import FreshBatches
from zolightning.evaluation.losses import LossOutput
from zolightning.evaluation.nested import map_tensors
from zolightning.evaluation.replaced import replaced
from zolightning.optim import NonFiniteLossError, SubspaceOptimizer, ZerothOrderOptimizer
from zolightning.optim.base import Method
from zolightning.optim.checks import require_prefix
from zolightning.optim.schedules import WarmupDecay
from zolightning.partners import callbacks_of, methods_of
from zolightning.rank_zero import rank_zero_info, rank_zero_warn
from zolightning.step import zeroth_order_step
from zolightning.strategies.ranks import layout_of
from zolightning.training_loop import is_validation_next

_COUNTERS = ("step", "refresh", "folds")  # of a method, which determine its directions and bases


class ZerothOrder(Callback):
    """Trains a module with a zeroth-order method: its ``training_step`` is evaluated, but not differentiated.

    During ``fit``, `method` replaces the module's optimizer, over the same parameters, and each batch is one
    :func:`~zolightning.step.zeroth_order_step` whose loss is the module's own ``training_step``. It is called several
    times for each batch, in evaluation mode, without gradients and with the same random numbers. Other callbacks see
    what it logs, returns and changes in the first of these calls. Without this callback the same module trains by
    backpropagation.

    ``training_step`` returns what it returns for backpropagation: a scalar tensor, a dictionary with it as ``"loss"``,
    or None to skip the batch. If the loss is a mean over something other than the batch's examples (tokens, for one),
    the dictionary holds their number as ``"num_terms"``.

    The module's ``configure_optimizers`` says which parameters train, and which of them have no weight decay. Its
    optimizer and schedulers do not run, and the hooks around them (``optimizer_step``, ``lr_scheduler_step``,
    ``on_before_zero_grad``) are not called; a message at the start says so.

    Hooks that run between steps see the trained weights and may change them. Subspace methods add their updates to the
    weights at every step if there is such a hook, and otherwise only before a resampling, a validation and at the end
    (:mod:`zolightning.callbacks.folding`). A second fit with the same callback continues with new directions.

    Args:
        method: makes the optimizer from the parameters: ``functools.partial(MeZO, lr=1e-6)`` in Python,
            ``class_path`` and ``init_args`` in YAML.
        lr_scheduler: makes a scheduler from the optimizer; it is stepped after every optimizer step.
        micro_batch_size: evaluate each batch in parts of this many examples, cut along the first dimension of its
            tensors, to save memory. Their losses are averaged by their numbers of examples, or by ``"num_terms"``.
        skip_nonfinite: skip steps whose loss is NaN or infinite instead of raising; more than 20 in a row raise.
        evaluations_per_forward: how many evaluations of a step run as one forward pass, over the batch repeated that
            often: faster for small batches, at as many times the memory for activations. It needs a submodule that
            holds all trainable parameters and whose outputs have one row per example
            (:mod:`zolightning.evaluation.stacked`); otherwise each evaluation runs by itself, with a warning. Leave it
            at 1 if only late layers train, because layers below them then run only once per step.
        keep_prefix_gib: memory, in GiB, to keep the outputs of the layers below the first trained one for the whole
            run, so that each batch passes through them only once. For data whose batches repeat
            (``data.fixed_batches``).
        cuda_graphs: record the network's forward as CUDA graphs and replay them for batches of the same shapes, which
            is faster for batches of few tokens: several times where launches by the host are the bottleneck. It takes
            the memory of some forwards. What cannot be recorded runs as usual, with a warning
            (:mod:`zolightning.evaluation.graphs`). Every evaluation then runs all layers, so leave it off if only late
            layers train.

    If the method has ``estimator=PerExample()``, each example of a batch has a direction of its own, and the loss of a
    batch must be the mean of those of its examples. ``training_step`` is called once for the whole batch and once for
    each example as a batch of one; the network runs in the first call only, and each other call gets its rows of that
    output. If that is not possible, the network runs once for each example, with a warning.

    Raises:
        MisconfigurationException: in ``setup``, for strategies, precisions, Trainer options and modules that cannot be
            trained by forward passes (:mod:`zolightning.callbacks.refusals`), with what to use instead.

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
        if not callable(method):
            raise ValueError(
                "`method` must make the optimizer from the module's parameters, as partial(MeZO, lr=1e-6) does, got an "
                f"object of {type(method).__name__}."
            )
        if micro_batch_size is not None:
            require_integer("micro_batch_size", micro_batch_size)
        require_integer("evaluations_per_forward", evaluations_per_forward)
        require_prefix(keep_prefix_gib, cuda_graphs)
        self.method = method
        self.lr_scheduler = lr_scheduler
        self.micro_batch_size = micro_batch_size
        self.skip_nonfinite = skip_nonfinite
        self.evaluations_per_forward = evaluations_per_forward
        self.keep_prefix_gib = keep_prefix_gib
        self.cuda_graphs = cuda_graphs
        self._restore = ExitStack()  # undoes what `setup` has done
        self._left_out: list[nn.Parameter] = []  # that the module's optimizer holds, and the method does not
        self._differentiates = False
        self._counters: dict[str, int] = {}  # at the end of the last fit with this callback

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.check(trainer, pl_module)
        if self.keep_prefix_gib and not getattr(getattr(trainer, "datamodule", None), "fixed_batches", True):
            raise MisconfigurationException(
                f"`keep_prefix_gib` is {self.keep_prefix_gib}, but `fixed_batches` of the data is False: what is kept "
                "would never be used. Set `data.fixed_batches` to True, or `keep_prefix_gib` to 0."
            )
        if trainer.precision == "64-true":
            pl_module.double()  # Lightning does so after it has loaded a checkpoint, which would be rounded to float32
        own_step, own_optimizers = pl_module.training_step, pl_module.configure_optimizers
        own_end = pl_module.on_train_end
        takes_index = is_param_in_hook_signature(own_step, "batch_idx", min_args=2)
        batches = FreshBatches()

        def zeroth_order_training_step(batch: Any, batch_idx: int = 0) -> Any:
            index = (batch_idx,) if takes_index else ()
            evaluate = partial(batches.evaluate, lambda part: own_step(part, *index))
            return self._step(pl_module, evaluate, batch, batch_idx)

        def fold_and_end_training() -> None:
            # After callbacks have written checkpoints, from which a run may be resumed, and before Lightning moves the
            # weights and cores, but not the bases, to the host
            _fold(trainer)
            own_end()

        self._restore.callback(self._detach, trainer, pl_module)
        # An instance may have a step of its own, as modules under torch.compile do.
        for name, method in (
            ("training_step", zeroth_order_training_step),
            ("configure_optimizers", lambda: self._configure(pl_module, own_optimizers())),
            ("on_train_end", fold_and_end_training),
        ):
            self._restore.enter_context(replaced(pl_module, name, method))
        pl_module.automatic_optimization = False
        self._differentiates = False

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises what ``setup`` raises. The command line calls it before the validation that precedes a fit."""
        refuse_unsupported(trainer)
        refuse_module(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Not only when it starts: a run resumed from a checkpoint of this batch skips the validation.
        if is_validation_next(trainer):
            _fold(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            _fold(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _fold(trainer)  # for a run that was resumed after its last step, in which `on_train_end` is not called

    def teardown(self, *_: Any, **__: Any) -> None:
        self._restore.close()

    on_exception = teardown  # Lightning calls no teardown after an exception or an interrupt

    def _detach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in methods_of(trainer):
            optimizer.detach()
            self._counters = {name: optimizer.param_groups[0].get(name, 0) for name in _COUNTERS}
        # `trainer.global_step` reads the automatic counter of an automatic module, also after the fit.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = trainer.global_step
        pl_module.automatic_optimization = True

    def _configure(self, pl_module: L.LightningModule, configured: Any) -> Any:
        """What the module's ``configure_optimizers`` returns to Lightning in place of `configured`."""
        own = OwnOptimizer(configured)
        groups, self._left_out = own.groups(pl_module), own.left_out(pl_module)
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
        optimizer.attach(pl_module, self.evaluations_per_forward, self.keep_prefix_gib, self.cuda_graphs)
        for group in optimizer.param_groups:
            group.update({name: value for name, value in self._counters.items() if name in group})
        rank_zero_info(
            f"{type(optimizer).__name__} trains {sum(len(group['params']) for group in groups)} of "
            f"{len(list(pl_module.parameters()))} parameter tensors of {type(pl_module).__name__}"
            f"{own.replaced(pl_module)}."
        )
        if self.lr_scheduler is None:
            return optimizer
        scheduler = made_scheduler(self.lr_scheduler, optimizer)
        if isinstance(scheduler, WarmupDecay):
            scheduler.fit_to(pl_module.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _step(
        self, pl_module: L.LightningModule, training_step: Callable[[Any], Any], batch: Any, batch_idx: int
    ) -> Any:
        """Trains on a batch, and returns what `training_step` returned in its first call."""
        first: Any = None
        (optimizer, *_) = methods_of(pl_module.trainer)
        refuse_thawed(pl_module, optimizer, self._left_out)
        evaluator, is_replaying = optimizer.evaluator, optimizer.is_replaying

        def loss(part: Any = batch, size: int | None = self.micro_batch_size) -> LossOutput:
            nonlocal first
            with evaluating(pl_module, self._differentiates):
                output = training_step(part) if size is None else evaluate_in_parts(training_step, part, size)
            if evaluator.is_first:
                first = map_tensors(Tensor.detach, output)
            return with_num_terms(output, part, pl_module.device)

        examples = None
        if optimizer.estimator.reads_examples:
            layout = layout_of(pl_module.trainer)
            place = layout.data_rank(pl_module.global_rank), layout.data_parallel_size
            examples = in_examples(lambda part: loss(part, None), batch, self.micro_batch_size, *place)
        try:
            record = zeroth_order_step(pl_module, loss, self.skip_nonfinite, examples)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error} {self._advice(batch, batch_idx)}") from None
        except RuntimeError as error:
            if self._differentiates:
                refuse_own_gradients(pl_module, error)
            if self._differentiates or "does not require grad" not in str(error):
                raise
            self._differentiates = True
            rank_zero_info(
                f"`training_step` of {type(pl_module).__name__} differentiates (torch.autograd), so it is evaluated "
                "with gradients enabled, which keeps activations in memory as in backpropagation."
            )
            return self._step(pl_module, training_step, batch, batch_idx)
        if is_replaying:
            dtype = compute_dtype(optimizer.param_groups[0]["params"][0].dtype)
            return {"loss": torch.tensor(record.losses[0], dtype=dtype, device=pl_module.device)}
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
