"""ZerothOrder under strangers' modules: what they return, bring along and expect of a fit."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from training import Records, assert_equal, weights
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.optim import LOZO, MeZO

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]
Fit = Callable[..., L.Trainer]

METHOD = partial(MeZO, lr=1e-2, eps=1e-2)


class TestStepsOfAnInstance:
    """``training_step`` set on the instance comes back after the fit."""

    def test_it_is_trained_again(self, make_regression: MakeModule, fit: Fit) -> None:
        module, calls = make_regression(), []
        class_step = type(module).training_step

        def own_step(batch: Any, batch_idx: int) -> Tensor:
            calls.append(batch_idx)
            return class_step(module, batch, batch_idx)

        module.training_step = own_step
        fit(module)
        assert module.training_step is own_step and "configure_optimizers" not in vars(module)
        calls.clear()
        fit(module)
        assert len(calls) >= 8

    def test_a_compiled_module(self, make_regression: MakeModule, fit: Fit) -> None:
        plain, module = make_regression(), make_regression()
        compiled = torch.compile(module, backend="eager")
        fit(plain)
        fit(compiled)
        assert hasattr(module.training_step, "__wrapped__")  # dynamo's
        assert_equal(weights(plain), weights(module))


def test_a_module_that_knows_its_trainer_is_copied(make_regression: MakeModule, make_trainer: MakeTrainer) -> None:
    """As WeightAveraging does, and as the command line makes modules: the functions of their settings know it."""
    module = make_regression()
    trainer = make_trainer(max_steps=1, callbacks=[ZerothOrder(METHOD), EMAWeightAveraging()])
    module.make = partial(print, trainer)
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(4, 4), torch.ones(4, 1))))


class TestFittingTwice:
    def test_the_second_fit_has_new_directions(self, make_regression: MakeModule, fit: Fit) -> None:
        module, callback, records = make_regression(), ZerothOrder(METHOD), Records()
        for _ in range(2):
            fit(module, records, zeroth_order=callback)
        assert [record.step for record in records.records] == list(range(8))

    def test_subspaces_too(self, make_regression: MakeModule, fit: Fit) -> None:
        module, callback, records = make_regression(), ZerothOrder(partial(LOZO, lr=1e-2, rank=1)), Records()
        for _ in range(2):
            fit(module, records, SubspaceResampling(2), zeroth_order=callback)
        assert [record.refresh for record in records.records] == [0, 0, 1, 1, 2, 2, 3, 3]

    def test_another_callback_begins_anew(self, make_regression: MakeModule, fit: Fit) -> None:
        records = Records()
        for _ in range(2):
            fit(make_regression(), records)
        assert [record.step for record in records.records] == [0, 1, 2, 3] * 2


class TestStrangers:
    def test_a_physics_informed_loss(self, make_regression: MakeModule, fit: Fit, caplog: Any) -> None:
        """Differentiates by its inputs, at points drawn in the step."""

        class Physics(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                points = batch[0].clone().requires_grad_()
                (slope,) = torch.autograd.grad(self.net(points).sum(), points, create_graph=True)
                return (slope[:, 0] - 2).square().mean()

        records, module = Records(), Physics()
        with caplog.at_level(logging.INFO):
            fit(module, records, zeroth_order=ZerothOrder(partial(MeZO, lr=0.1, num_queries=4)), max_steps=42)
        losses = [record.loss for record in records.records]
        assert sum(losses[-7:]) < 0.8 * sum(losses[:7])
        assert caplog.text.count("`training_step` of Physics differentiates") == 1
        assert all(parameter.grad is None for parameter in module.parameters())

    def test_targets_of_the_network_itself(self, make_regression: MakeModule, fit: Fit) -> None:
        """Where they are made before the step, projected gradients are autograd's; ``detach`` in the step does nothing.

        The loss is the distance of outputs from those for other inputs, which backpropagation takes as fixed (SimSiam).
        """

        class Detached(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return F.mse_loss(self.net(batch[0]), self.net(2 * batch[0]).detach())

        class Before(type(make_regression())):
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                with torch.no_grad():
                    return (*batch, self.net(2 * batch[0]))

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return F.mse_loss(self.net(batch[0]), batch[2])

        class Derivatives(Callback):
            """Of the loss of :class:`Detached`, along the direction of each step, before it."""

            def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
                (method,) = trainer.optimizers
                group = method.param_groups[0]
                moves = method.directions(group, group["seed"], group["step"], {0: 1.0})
                with torch.enable_grad():
                    loss = Detached.training_step(pl_module, batch, batch_idx)
                slopes = torch.autograd.grad(loss, list(moves))
                along = [move.of_elements(p.detach().view(-1)).view_as(p) for p, move in moves.items()]
                derivatives.append(sum(float((s * z).sum()) for s, z in zip(slopes, along, strict=True)))

        for make, is_right in ((Before, True), (Detached, False)):
            module, records, derivatives = make(), Records(), list[float]()
            module.net[2] = nn.Identity()  # in place of the dropout
            fit(module, records, Derivatives(), zeroth_order=ZerothOrder(partial(MeZO, lr=1e-2, eps=1e-3)))
            found = [record.projected_grads[0] for record in records.records]
            assert len(found) == 4 and (found == pytest.approx(derivatives, rel=0.02, abs=1e-3)) == is_right

    @pytest.mark.parametrize("method", [MeZO, partial(LOZO, rank=1)])
    def test_derivatives_by_torch_func(self, make_regression: MakeModule, fit: Fit, method: Any) -> None:
        """A step has the losses that it has with derivatives by autograd, and so has a run after it."""

        class Gradient(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                points = batch[0].clone().requires_grad_()
                (slopes,) = torch.autograd.grad(self.net(points).sum(), points, create_graph=True)
                return (slopes.norm(dim=1) - 1).square().mean()

        class Transform(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                slopes = torch.vmap(torch.func.grad(lambda point: self.net(point).sum()))(batch[0])
                return (slopes.norm(dim=1) - 1).square().mean()

        losses = []
        for make in (Transform, Gradient, Transform):
            records = Records()
            callbacks = [records] if method is MeZO else [records, SubspaceResampling(2)]
            fit(make(), *callbacks, zeroth_order=ZerothOrder(partial(method, lr=1e-2, eps=1e-2)))
            losses.append([loss for record in records.records for loss in record.losses])
        assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 8

    def test_a_loss_of_gradients_by_parameters(self, make_regression: MakeModule, fit: Fit) -> None:
        class Penalty(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                gradients = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
                return loss + sum(gradient.square().sum() for gradient in gradients)

        with pytest.raises(
            MisconfigurationException, match="`training_step` of Penalty differentiates with respect to the module's"
        ):
            fit(Penalty())

    def test_a_step_that_calls_backward(self, make_regression: MakeModule, fit: Fit) -> None:
        class Backward(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                loss.backward()
                return loss

        with pytest.raises(
            MisconfigurationException, match=r"of Backward calls `backward\(\)`, but ZerothOrder trains on"
        ):
            fit(Backward())

    def test_losses_in_train_mode_only(self, make_regression: MakeModule, fit: Fit) -> None:
        """As detection networks do: their error is told what caused it, and how to be served."""

        class Detector(nn.Linear):
            def forward(self, x: Tensor, y: Tensor) -> Any:
                predicted = super().forward(x)
                return {"box": F.mse_loss(predicted, y)} if self.training else [predicted]

        class Detection(type(make_regression())):
            def __init__(self, switched: bool) -> None:
                super().__init__()
                self.net, self.switched = Detector(4, 1), switched

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                if self.switched:
                    self.net.train()
                return sum(self.net(*batch).values())

        with pytest.raises(AttributeError, match="'list' object has no attribute 'values'") as raised:
            fit(Detection(switched=False))
        assert "in evaluation mode" in raised.value.__notes__[0] and "`.train()`" in raised.value.__notes__[0]
        module = Detection(switched=True)
        before = weights(module)
        fit(module)
        assert not torch.equal(before["net.weight"], module.net.weight) and module.net.training

    def test_a_manual_module(self, fit: Fit, make_trainer: MakeTrainer) -> None:
        for module in (BoringModel(), ManualOptimBoringModel()):
            trainer = make_trainer(max_steps=2, limit_val_batches=0, callbacks=[ZerothOrder(METHOD)])
            if module.automatic_optimization:
                trainer.fit(module)
                continue
            with pytest.raises(
                MisconfigurationException, match="ManualOptimBoringModel has `automatic_optimization=False`"
            ):
                trainer.fit(module)
            assert not module.automatic_optimization

    @pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
    def test_a_step_that_fetches_its_batches(self, make_regression: MakeModule, fit: Fit) -> None:
        class Fetching(type(make_regression())):
            def training_step(self, dataloader_iter: Any) -> Tensor:
                raise AssertionError

        with pytest.raises(MisconfigurationException, match="`training_step` of Fetching takes `dataloader_iter`"):
            fit(Fetching())

    def test_kept_memory_needs_fixed_batches(
        self, make_regression: MakeModule, make_trainer: MakeTrainer, regression_data: MakeData
    ) -> None:
        class Data(L.LightningDataModule):
            fixed_batches = False

            def train_dataloader(self) -> DataLoader:
                return regression_data()

        def fit() -> None:
            callback = ZerothOrder(METHOD, keep_prefix_gib=0.5)
            make_trainer(max_steps=1, callbacks=[callback]).fit(make_regression(), datamodule=Data())

        with pytest.raises(MisconfigurationException, match=r"`keep_prefix_gib` is 0.5, but `fixed_batches` of the da"):
            fit()
        Data.fixed_batches = True
        fit()

    def test_lazy_layers(self, make_regression: MakeModule, fit: Fit) -> None:
        module = make_regression()
        module.net[0] = nn.LazyLinear(5)
        with pytest.raises(MisconfigurationException, match=r"`net.0.weight` of Regression has no shape yet"):
            fit(module)
        module.net(torch.zeros(1, 4))
        fit(module)
