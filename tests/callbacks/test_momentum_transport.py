"""What becomes of the momentum when new subspaces come, under a Trainer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from zolightning.callbacks import MomentumTransport, SubspaceResampling, ZerothOrder
from zolightning.optim import LOZO, ZOMOPI


class Spy(Callback):
    """Takes the momentum and the basis of the first layer right before and right after a resampling."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor | None, Any]] = []

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer, weight = trainer.optimizers[0], pl_module.net[0].weight
        if optimizer.param_groups[0]["step"] == 3:
            state = optimizer.state[weight]
            momentum = state.get("momentum_buffer", state.get("exp_avg"))
            self.seen.append((None if momentum is None else momentum.clone(), optimizer.basis(weight)))


@pytest.fixture
def transported(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> Callable[..., tuple[list[tuple[Tensor | None, Any]], Any]]:
    def transported(how: str | None, method: Any) -> tuple[list[tuple[Tensor | None, Any]], Any]:
        before, after = Spy(), Spy()
        before.on_train_batch_start = lambda trainer, module, *_: before.look(trainer, module)
        after.on_train_batch_start = lambda trainer, module, *_: after.look(trainer, module)
        between = [SubspaceResampling(3)] if how is None else [SubspaceResampling(3), MomentumTransport(how)]
        callbacks = [before, *between, after, ZerothOrder(method)]
        trainer = make_trainer(max_steps=4, callbacks=callbacks)
        trainer.fit(make_regression(), regression_data())
        return before.seen + after.seen, trainer.optimizers[0]

    return transported


METHODS = [
    partial(ZOMOPI, lr=0.05, rank=3, power_rank=2),
    partial(LOZO, lr=0.05, rank=2, betas=(0.9, 0.95), normalize_directions=True),
]


@pytest.mark.parametrize("method", METHODS)
class TestTransport:
    @pytest.mark.parametrize("how", [None, "project"])
    def test_project(self, transported: Callable[..., Any], how: str | None, method: Any) -> None:
        ((old, old_basis), (new, new_basis)), _ = transported(how, method)
        old, new = (core.view(b.core_shape((5, 4))) for core, b in ((old, old_basis), (new, new_basis)))
        torch.testing.assert_close(new, new_basis.project(old_basis.lift(old)))

    def test_reset(self, transported: Callable[..., Any], method: Any) -> None:
        ((old, _), (new, _)), optimizer = transported("reset", method)
        assert old.any() and new is None
        assert optimizer.momentum_kept == 0

    def test_keep(self, transported: Callable[..., Any], method: Any) -> None:
        ((old, old_basis), (new, new_basis)), _ = transported("keep", method)
        assert torch.equal(old, new) and old_basis is not new_basis


class TestRefusals:
    def fit(self, make_trainer: Any, make_regression: Any, regression_data: Any, method: Any, *hows: str) -> None:
        callbacks = [SubspaceResampling(3), *(MomentumTransport(how) for how in hows), ZerothOrder(method)]
        make_trainer(max_steps=1, callbacks=callbacks).fit(make_regression(), regression_data())

    def test_two_of_them(self, make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
        with pytest.raises(
            MisconfigurationException, match=r"2 MomentumTransport callbacks, with `how` \['project', 'reset'\]"
        ):
            self.fit(make_trainer, make_regression, regression_data, METHODS[0], "project", "reset")

    def test_no_momentum(self, make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
        method = partial(LOZO, lr=0.01)
        with pytest.raises(MisconfigurationException, match="nothing to transport: LOZO keeps no momentum here"):
            self.fit(make_trainer, make_regression, regression_data, method, "project")


def test_bad_value() -> None:
    with pytest.raises(ValueError, match="`how` must be one of"):
        MomentumTransport("rotate")
