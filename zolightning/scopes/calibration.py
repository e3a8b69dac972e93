"""Forward passes of a module on a few training prompts, before training."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils.data import DataLoader, IterableDataset, Subset

from zolightning.evaluation.fresh_batches import copied
from zolightning.evaluation.losses import LossOutput
from zolightning.evaluation.mode import evaluation_mode
from zolightning.evaluation.nested import batch_size
from zolightning.evaluation.replaced import replaced
from zolightning.evaluation.traces import Traces

T = TypeVar("T")


def own_loss(module: L.LightningModule, batch: Any) -> LossOutput:
    """What the module's own ``training_step`` returns for a batch, in evaluation mode, without logging and traces.

    Metrics, counters and buffers are afterwards what they were (:mod:`zolightning.evaluation.traces`): these forwards
    are no steps, and some are at weights that no step has.

    Raises:
        MisconfigurationException: if that step does not only compute a loss (manual optimization).
    """
    # Under the ZerothOrder callback the instance has a `training_step` of its own, and the class's is the module's.
    if not module.automatic_optimization and "training_step" not in vars(module):
        raise MisconfigurationException(
            f"{type(module).__name__} has `automatic_optimization=False`: its `training_step` trains, and is not "
            "run just to look at activations. Use the ZerothOrder callback on a module whose `training_step` returns a "
            "loss, or name the layers yourself (DominantLayer: `layer` or `profile`)."
        )
    step: Any = type(module).training_step
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)  # beside `self`, as Lightning counts
    with evaluation_mode(module), replaced(module, "log", lambda *_, **__: None):
        trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        traces = Traces()
        with traces.step(list(module.modules()), trained), traces.watched():
            index = (0,) if takes_index else ()
            return traces.evaluate(lambda: step(module, copied(batch), *index), is_first=False)


calibration_forward = torch.no_grad()(own_loss)


def calibration_batches(trainer: L.Trainer, module: L.LightningModule, num_prompts: int) -> list[Any]:
    """The first examples of the training data as they are stored, in batches on the module's device.

    A loader with a method ``first_batches(num_examples)`` is asked for them; otherwise its data set is read. This does
    not change the order of the run's batches or the state of torch's generators. All ranks get the same examples.

    Raises:
        ValueError: if there are none.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    with isolate_rng():
        batches = list(_first_batches(loader, num_prompts))
    if not batches:
        raise ValueError(
            f"`num_prompts` is {num_prompts}, but the training data ({type(loader).__name__}) hold no example to "
            "calibrate on: at least one is needed."
        )
    handler = module._apply_batch_transfer_handler
    return [handler(module._on_before_batch_transfer(batch), module.device) for batch in batches]


def read_examples(
    trainer: L.Trainer, module: L.LightningModule, read: Callable[[Any], T], num_examples: int | None = None
) -> list[T]:
    """What `read` returns for each batch of the first training examples, in evaluation mode and without gradients.

    `num_examples` None takes all.
    """
    batches = calibration_batches(trainer, module, sys.maxsize if num_examples is None else num_examples)
    with torch.no_grad(), evaluation_mode(module), trainer.precision_plugin.forward_context():
        return [read(trainer.precision_plugin.convert_input(batch)) for batch in batches]


def _first_batches(loader: Any, num_prompts: int) -> Iterator[Any]:
    if hasattr(loader, "first_batches"):
        yield from loader.first_batches(num_prompts)
        return
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        if loader.batch_size is not None or loader.batch_sampler is not None:
            size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
            first = Subset(loader.dataset, range(min(num_prompts, len(cast(Sized, loader.dataset)))))
            yield from DataLoader(first, size, collate_fn=loader.collate_fn)
            return
        loader = DataLoader(loader.dataset, batch_size=None, collate_fn=loader.collate_fn)
    if not isinstance(loader, Iterable) or isinstance(loader, dict | list | tuple):
        raise ValueError(f"Calibration reads one training dataloader, got {type(loader).__name__}.")
    seen = 0
    for batch in loader:
        yield batch
        seen += batch_size(batch) or 1
        if seen >= num_prompts:
            return
