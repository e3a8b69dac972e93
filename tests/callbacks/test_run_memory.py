"""A run that does not fit into the memory that is free is refused, or warned of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.run_memory import memory_plan, refuse_too_large
from zolightning.memory import MemoryPlan, trained_by
from zolightning.optim import MeZO, ZerothOrderOptimizer

# A run of 34.5 GB, of which 32.5 are certain
TOO_LARGE = MemoryPlan(16_200_000_000, 16_200_000_000, 100_000_000, 2_000_000_000, 0)
OTHERS = {
    "method.update_precision native": MemoryPlan(16_200_000_000, 0, 100_000_000, 2_000_000_000, 0),
    "one layer": MemoryPlan(16_200_000_000, 400_000_000, 100_000_000, 2_000_000_000, 0),
}


def test_a_run_that_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(MisconfigurationException) as raised:
        refuse_too_large(TOO_LARGE, 18_500_000_000, lambda: OTHERS)
    assert str(raised.value).splitlines() == [
        "The run needs 34.5 GB of the device's memory, but only 18.5 GB are free: weights 16.2 GB, state 16.2 GB, "
        "scratch 100.0 MB, activations 2.0 GB, logits 0.0 MB.",
        "Use a smaller batch, or one of these:",
        "  method.update_precision native  18.3 GB",
        "  one layer                       18.7 GB, too much",
    ]


def test_what_needs_no_less_than_the_run_is_not_recommended() -> None:
    smallest = OTHERS["method.update_precision native"]
    with pytest.raises(MisconfigurationException) as raised:
        refuse_too_large(smallest, 10_000_000_000, lambda: {"method.update_precision exact": TOO_LARGE})
    assert str(raised.value).splitlines()[1:] == ["Use a smaller batch."]


def test_a_run_whose_estimate_does_not_fit_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="The run needs 34.5 GB of the device's memory, but only 33.0 GB are free"):
        refuse_too_large(TOO_LARGE, 33_000_000_000, lambda: OTHERS)
    refuse_too_large(TOO_LARGE, 34_500_000_000, lambda: pytest.fail("it fits"))


class Planning(L.Callback):
    planned: MemoryPlan

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, ZerothOrderOptimizer)
        self.planned = memory_plan(trainer, pl_module, optimizer, trained_by(optimizer))


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("strategy", ["ddp", "zo_ddp"])
def test_what_ddp_allocates_for_gradients_is_counted(
    strategy: str,
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., Any],
) -> None:
    module = make_regression()
    module.net[0].bias.requires_grad_(False)
    trainer = make_trainer(strategy=strategy, max_steps=1, callbacks=[ZerothOrder(partial(MeZO, lr=1e-3)), Planning()])
    trainer.fit(module, regression_data())
    planned = next(callback.planned for callback in trainer.callbacks if isinstance(callback, Planning))
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    assert planned.ddp_buckets == (trained if strategy == "ddp" else 0)
    assert ("ddp buckets" in str(planned)) == (strategy == "ddp")
    assert planned.certain == planned.weights + planned.state + planned.scratch + planned.ddp_buckets
