"""Zeroth-order training of a LightningModule that knows nothing of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zolightning.optim import NonFiniteLossError, ZerothOrderOptimizer
from zolightning.optim.checks import loss_and_terms
from zolightning.step import Loss, zeroth_order_step

Method = Callable[[Iterable[Any]], ZerothOrderOptimizer]


class ZerothOrder(Callback):
    """Trains the module by a zeroth-order method: its ``training_step`` is evaluated, never differentiated.

    During ``fit`` the module's optimizers are replaced by `method` over all parameters that require gradients, and
    each batch becomes one :func:`~zolightning.step.zeroth_order_step` whose loss is the module's own
    ``training_step``. That one runs several times a batch, in evaluation mode; only its first run logs. Without
    this callback the same module trains by backpropagation. The module must define ``configure_optimizers`` (it is
    not called), because Lightning asks for it before any callback can act.

    Args:
        method: makes the optimizer from the parameters: ``functools.partial(MeZO, lr=1e-6)`` in Python,
            ``class_path`` and ``init_args`` in YAML.
        lr_scheduler: makes a scheduler from the optimizer; stepped after every optimizer step.
        micro_batch_size: evaluate a batch in parts of this many examples, along the first dimension of each of its
            tensors, under the same directions. The parts' losses are averaged as one batch's would be: by number
            of examples, or by ``"weight"`` where ``training_step`` returns it beside ``"loss"``.
        skip_nonfinite: skip a step whose loss is NaN or infinite, instead of stopping.
        evaluations_per_forward: how many evaluations of a step share one run of the network, on the batch repeated
            that often: faster where batches are small, for as many times the activations' memory. It needs one
            submodule with all trainable parameters, whose outputs have one row an example
            (:mod:`zolightning.evaluation.stacked`); where evaluations turn out to be inseparable, a warning says why
            and each runs by itself. Leave it at 1 where only late layers train: what lies below them is computed once
            a step then.
        keep_prefix_gib: memory, in GiB, for what lies below the first trained layer to be computed once a run instead
            of once a step; for training sets whose batches come again (``data.fixed_batches``).

    Raises:
        MisconfigurationException: in ``setup``, for strategies, precisions and Trainer options under which
            forward-only training would be wrong, with what to use instead.

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
    ) -> None:
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"`micro_batch_size` must be at least 1, got {micro_batch_size}.")
        if evaluations_per_forward < 1:
            raise ValueError(f"`evaluations_per_forward` must be at least 1, got {evaluations_per_forward}.")
        if not keep_prefix_gib >= 0:
            raise ValueError(f"`keep_prefix_gib` must not be negative, got {keep_prefix_gib}.")
        self.method = method
        self.lr_scheduler = lr_scheduler
        self.micro_batch_size = micro_batch_size
        self.skip_nonfinite = skip_nonfinite
        self.evaluations_per_forward = evaluations_per_forward
        self.keep_prefix_gib = keep_prefix_gib
        self._automatic_optimization = True
        self._validation = ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_unsupported(trainer)
        own_step = pl_module.training_step
        takes_index = is_param_in_hook_signature(own_step, "batch_idx", min_args=2)

        def training_step(batch: Any, batch_idx: int) -> Any:
            return own_step(batch, batch_idx) if takes_index else own_step(batch)

        def zeroth_order_training_step(batch: Any, batch_idx: int = 0) -> None:
            try:
                zeroth_order_step(pl_module, lambda: self._losses(training_step, batch, batch_idx), self.skip_nonfinite)
            except NonFiniteLossError as error:
                raise NonFiniteLossError(f"{error} {_describe(batch, batch_idx)}") from None

        self._automatic_optimization = pl_module.automatic_optimization
        pl_module.automatic_optimization = False
        pl_module.training_step = zeroth_order_training_step  # type: ignore[method-assign]
        pl_module.configure_optimizers = lambda: self._configure(pl_module)  # type: ignore[method-assign]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._give_back(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._give_back(trainer, pl_module)  # Lightning calls no teardown after an exception or an interrupt

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in trainer.optimizers:
                self._validation.enter_context(optimizer.effective())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation.close()

    def _give_back(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation.close()
        if vars(pl_module).pop("configure_optimizers", None) is None:
            return
        for optimizer in trainer.optimizers:
            optimizer.detach()
        del pl_module.training_step
        # `trainer.global_step` reads the automatic counter of an automatic module, also after the fit.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = trainer.global_step
        pl_module.automatic_optimization = self._automatic_optimization

    def _configure(self, pl_module: L.LightningModule) -> Any:
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        if not parameters:
            raise MisconfigurationException(
                "No parameter is trainable: all of the module's have `requires_grad=False`. Unfreeze at least one."
            )
        optimizer = self.method(parameters)
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise MisconfigurationException(
                "`method` must make a zeroth-order optimizer (zolightning.optim.MeZO, for example), "
                f"got {type(optimizer).__name__}."
            )
        present = {base.__name__ for callback in pl_module.trainer.callbacks for base in type(callback).__mro__}
        for partner in optimizer.partners:
            if partner not in present:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} needs the callback {partner} beside ZerothOrder, "
                    f"`zolightning.callbacks.{partner}` in `trainer.callbacks`."
                )
        optimizer.attach(pl_module, self.evaluations_per_forward)
        optimizer.evaluator.prefix.keep_bytes = int(self.keep_prefix_gib * 2**30)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise MisconfigurationException(
                "`lr_scheduler` is ReduceLROnPlateau, which waits for a metric, and schedulers are stepped after every "
                "training step. Use one that goes by the step, such as LinearLR or CosineAnnealingLR."
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def _losses(self, training_step: Callable[..., Any], batch: Any, batch_idx: int) -> Loss:
        if self.micro_batch_size is None:
            return _weighted(training_step(batch, batch_idx), batch)
        parts = []
        for part in micro_batches(batch, self.micro_batch_size):
            output = _weighted(training_step(part, batch_idx), part)
            parts.append(loss_and_terms((output["loss"], output["weight"])))
        losses, weights = (torch.stack(values) for values in zip(*parts, strict=True))
        return {"loss": (losses * weights).sum() / weights.sum(), "weight": weights.sum()}


def micro_batches(batch: Any, size: int) -> Iterator[Any]:
    """The batch in parts of at most `size` examples; what is not a tensor of its length goes into every part."""
    total = _batch_size(batch)
    if total is None:
        raise ValueError(
            f"`micro_batch_size` is {size}, and a batch of type {type(batch).__name__} has no tensor to cut."
        )

    for start in range(0, total, size):

        def cut(tensor: Tensor, start: int = start) -> Tensor:
            return tensor[start : start + size] if tensor.ndim and len(tensor) == total else tensor

        yield apply_to_collection(batch, Tensor, cut)


def refuse_unsupported(trainer: L.Trainer) -> None:
    """Raises a MisconfigurationException for surroundings in which forward-only training would be silently wrong."""
    strategy, precision = trainer.strategy, trainer.precision_plugin
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise MisconfigurationException(
            f"`trainer.strategy` is {type(strategy).__name__}, which shards parameters or runs the optimizer itself; "
            "zeroth-order training has no gradients or optimizer states to shard. Use 'auto' or 'ddp'."
        )
    if isinstance(precision, MixedPrecision) and precision.precision == "16-mixed":
        raise MisconfigurationException(
            "`trainer.precision` is '16-mixed', which scales gradients, and zeroth-order training has none. "
            "Use 'bf16-mixed', 'bf16-true', '16-true' or '32-true'."
        )
    if type(precision) not in (Precision, HalfPrecision, DoublePrecision, MixedPrecision):
        raise MisconfigurationException(
            f"`trainer.precision` is {precision.precision!r}, which is not supported by zeroth-order training. "
            "Use '32-true', '64-true', 'bf16-true', '16-true' or 'bf16-mixed'."
        )
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            f"`trainer.accumulate_grad_batches` is {trainer.accumulate_grad_batches}, and zeroth-order training has no "
            "gradients to accumulate. Use a larger batch with `micro_batch_size` of ZerothOrder."
        )
    if trainer.gradient_clip_val is not None:
        raise MisconfigurationException(
            f"`trainer.gradient_clip_val` is {trainer.gradient_clip_val}, and zeroth-order training has no gradients "
            "to clip. Use `clip` of the method, which bounds the projected gradient."
        )


def _weighted(output: Any, batch: Any) -> dict[str, Any]:
    """What ``training_step`` returned, with the number of examples as its weight unless it names one itself."""
    if isinstance(output, Mapping):
        return {"loss": output.get("loss"), "weight": output.get("weight", _batch_size(batch) or 1)}
    return {"loss": output, "weight": _batch_size(batch) or 1}


def _batch_size(batch: Any) -> int | None:
    """Length of the first tensor found that has a first dimension."""
    lengths: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: lengths.extend(tensor.shape[:1]), allow_frozen=True)
    return lengths[0] if lengths else None


def _describe(batch: Any, batch_idx: int) -> str:
    ids = batch.get("id") if isinstance(batch, Mapping) else None
    which = "" if ids is None else f", ids {ids.tolist() if isinstance(ids, Tensor) else ids}"
    return (
        f"Batch {batch_idx}{which}. The weights are those of the last step; a smaller `lr` or `eps` may help, "
        "or `skip_nonfinite=True` to pass over such batches."
    )
