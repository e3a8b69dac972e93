"""What trains: what the module's own ``configure_optimizers`` says, and parameters that thaw in mid-run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from training import Records, moved, weights
from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO

MakeModule = Callable[..., L.LightningModule]
Fit = Callable[..., L.Trainer]


class TestOwnOptimizers:
    """What ``configure_optimizers`` of the module says."""

    @pytest.fixture
    def said(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr("zolightning.callbacks.zeroth_order.rank_zero_info", said.append)
        return said

    def test_only_its_parameters_train(self, make_regression: MakeModule, fit: Fit, said: list[str]) -> None:
        module = make_regression()
        module.configure_optimizers = lambda: torch.optim.Adam(module.net[3].parameters(), lr=1e-3)
        before = weights(module)
        fit(module)
        assert {name for name, value in weights(module).items() if not torch.equal(value, before[name])} == {
            "net.3.weight",
            "net.3.bias",
        }
        assert said == ["MeZO trains 2 of 4 parameter tensors of Regression in place of Adam."]

    def test_what_is_replaced_is_said_in_a_line(self, make_regression: MakeModule, fit: Fit, said: list[str]) -> None:
        class WithHooks(type(make_regression())):
            def configure_optimizers(self) -> Any:
                groups = [{"params": self.net[0].parameters(), "lr": 1e-3}, {"params": self.net[3].parameters()}]
                optimizer = torch.optim.AdamW(groups, lr=1e-2)
                scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
                return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

            def optimizer_step(self, *_: Any) -> None:
                raise AssertionError

            def on_before_zero_grad(self, *_: Any) -> None:
                raise AssertionError

        fit(WithHooks())
        assert said == [
            "MeZO trains 4 of 4 parameter tensors of WithHooks in place of AdamW and StepLR, whose learning rates per "
            "group are not taken over; `on_before_zero_grad`, `optimizer_step` of WithHooks will not be called."
        ]

    @pytest.mark.parametrize("own_decay", [0.01, 0.0])
    def test_groups_without_weight_decay_keep_it(self, make_regression: MakeModule, fit: Fit, own_decay: float) -> None:
        module = make_regression()

        def configure_optimizers() -> torch.optim.Optimizer:
            vectors = [p for p in module.parameters() if p.ndim < 2]
            matrices = [p for p in module.parameters() if p.ndim > 1]
            groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices}]
            return torch.optim.AdamW(groups, weight_decay=own_decay)

        module.configure_optimizers = configure_optimizers
        trainer = fit(module, zeroth_order=ZerothOrder(partial(MeZO, lr=1e-2, weight_decay=0.3)))
        decays = {
            parameter.ndim: group["weight_decay"]
            for group in trainer.optimizers[0].param_groups
            for parameter in group["params"]
        }
        # No decay anywhere says nothing: it is what an optimizer without the argument has.
        assert decays == ({2: 0.3, 1: 0.0} if own_decay else {2: 0.3, 1: 0.3})

    def test_none_trains_all(self, make_regression: MakeModule, fit: Fit, said: list[str]) -> None:
        module = make_regression()
        module.configure_optimizers = lambda: None
        fit(module)
        assert said == ["MeZO trains 4 of 4 parameter tensors of Regression."]

    def test_several_are_refused(self, make_regression: MakeModule, fit: Fit) -> None:
        module = make_regression()
        module.configure_optimizers = lambda: [torch.optim.SGD(p.parameters()) for p in (module.net[0], module.net[3])]
        with pytest.raises(MisconfigurationException, match=r"returns 2 optimizers \(SGD, SGD\)"):
            fit(module)

    def test_one_of_frozen_parameters_is_refused(self, make_regression: MakeModule, fit: Fit) -> None:
        module = make_regression()
        module.net[3].requires_grad_(False)
        module.configure_optimizers = lambda: torch.optim.SGD(module.net[3].parameters(), lr=0.1)
        with pytest.raises(MisconfigurationException, match="No parameter is trainable: the SGD that"):
            fit(module)


class TestThawing:
    """Parameters that begin to train in mid-run."""

    @pytest.fixture
    def thawing(self, make_regression: MakeModule) -> type[L.LightningModule]:
        class Thawing(type(make_regression())):
            add = False

            def __init__(self) -> None:
                super().__init__()
                self.net[0].requires_grad_(False)

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                if batch_idx == 2:
                    self.net[0].requires_grad_(True)
                    if self.add:
                        self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})

        return Thawing

    @pytest.mark.parametrize("has_optimizer", [True, False])
    def test_is_refused(self, thawing: type[L.LightningModule], fit: Fit, has_optimizer: bool) -> None:
        module, records = thawing(), Records()
        if not has_optimizer:
            module.configure_optimizers = lambda: None
        with pytest.raises(
            MisconfigurationException, match=r"^`net.0.weight`, `net.0.bias`: `requires_grad` was False when the MeZO"
        ):
            fit(module, records)
        assert len(records.records) == 2

    def test_of_what_is_added(self, thawing: type[L.LightningModule], fit: Fit) -> None:
        module = thawing()
        module.add, before = True, weights(module)
        fit(module)
        assert moved(before, module).keys() == before.keys()

    def test_of_what_the_own_optimizer_leaves_out(self, thawing: type[L.LightningModule], fit: Fit) -> None:
        """By backpropagation it would not train either."""
        module = thawing()
        module.configure_optimizers = lambda: torch.optim.SGD(module.net[3].parameters(), lr=0.1)
        before = weights(module)
        fit(module)
        assert moved(before, module).keys() == {"net.3.weight", "net.3.bias"}

    def test_of_what_was_frozen_after_the_start(self, make_regression: MakeModule, fit: Fit) -> None:
        class Freezing(type(make_regression())):
            def on_train_start(self) -> None:
                self.net[0].requires_grad_(False)

            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.net[0].requires_grad_(batch_idx >= 2)

        module, records = Freezing(), Records()
        before = weights(module)
        fit(module, records)
        assert moved(before, module).keys() == before.keys()

    def test_in_the_loss_is_refused(self, make_regression: MakeModule, fit: Fit) -> None:
        """As two adapters of PEFT's do, each of which is set in turn: the first one would never move."""

        class Switching(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                for active in (0, 3):
                    for layer in (0, 3):
                        self.net[layer].requires_grad_(layer == active)
                return super().training_step(batch, batch_idx)

        with pytest.raises(ValueError, match=r"The loss has changed `requires_grad` of net.0.bias, net.0.weight, as"):
            fit(Switching())
