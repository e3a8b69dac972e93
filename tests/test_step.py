"""One step of a module that calls `zeroth_order_step` itself."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from own_loop import OwnLoop
from zolightning import zeroth_order_step
from zolightning.evaluation.evaluator import Evaluator
from zolightning.evaluation.mode import evaluation_mode
from zolightning.optim import MeZO, MeZOAdam, NonFiniteLossError
from zolightning.optim.estimators import OneSided
from zolightning.step import logged_once

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]


@pytest.fixture
def fit(make_trainer: MakeTrainer, regression_data: MakeData) -> Callable[..., L.Trainer]:
    def fit(module: L.LightningModule, max_steps: int = 2, **kwargs: Any) -> L.Trainer:
        trainer = make_trainer(max_steps=max_steps, **kwargs)
        trainer.fit(module, regression_data())
        return trainer

    return fit


class TestModes:
    def test_estimates_run_in_evaluation_mode_and_the_mode_comes_back(self, fit: Callable[..., L.Trainer]) -> None:
        module, seen = OwnLoop(), []
        inner = module.loss
        module.loss = lambda batch: (seen.append([m.training for m in module.modules()]), inner(batch))[1]
        before = None

        class Watch(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                nonlocal before
                module.frozen_norm.eval()
                before = {name: m.training for name, m in module.named_modules()}

            def on_train_batch_end(self, *_: Any) -> None:
                assert {name: m.training for name, m in module.named_modules()} == before

        fit(module, callbacks=[Watch()])
        assert seen and not any(any(modes) for modes in seen)
        assert before["net"] and not before["frozen_norm"]

    def test_modes_are_set_without_calling_eval(self) -> None:
        """Which some modules override to do more, to merge adapters into their weights for example."""

        class Merging(nn.Sequential):
            def train(self, mode: bool = True) -> "Merging":
                assert mode, "asked to change its weights"
                return super().train(mode)

        module = nn.Sequential(Merging(nn.Linear(2, 2), nn.Dropout()), Merging())
        module[0][1].training = module[1].training = False
        before = [m.training for m in module.modules()]
        with evaluation_mode(module):
            assert not any(m.training for m in module.modules())
        assert [m.training for m in module.modules()] == before

    def test_statistics_of_batch_norms_stay(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop()
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        fit(module)
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, before[name]), name

    def test_the_same_batch_gives_the_same_loss(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop(lambda p: MeZO(p, estimator=OneSided()))
        inner = module.loss
        module.loss = lambda batch: (inner(batch), inner(batch))[1]
        fit(module)
        assert module.losses[::2] == module.losses[1::2]  # with dropout on, no two would be equal

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_everything_comes_back_after_an_error(self, error: type[BaseException]) -> None:
        module = OwnLoop()
        hook = module.net.register_forward_hook(lambda *_: None)
        module.net.train(), module.net[3].eval()
        modes = {name: m.training for name, m in module.named_modules()}
        hooks = [list(m._forward_hooks.items()) for m in module.modules()]
        log = module.log
        with (
            pytest.raises(error),
            evaluation_mode(module),
            logged_once(module, Evaluator(), lambda: torch.tensor(1.0)) as (evaluate, _),
        ):
            evaluate(), evaluate()
            raise error
        assert {name: m.training for name, m in module.named_modules()} == modes
        assert [list(m._forward_hooks.items()) for m in module.modules()] == hooks
        assert module.log == log and "log" not in vars(module)
        hook.remove()


class TestEvaluations:
    @pytest.mark.parametrize("num_queries", [1, 3])
    def test_as_many_as_the_estimator_says(self, fit: Callable[..., L.Trainer], num_queries: int) -> None:
        module = OwnLoop(lambda p: MeZO(p, num_queries=num_queries))
        fit(module, max_steps=3)
        audit = 5  # once in a run
        assert len(module.losses) == audit + 3 * 2 * num_queries
        assert [record.step for record in module.records] == [0, 1, 2]
        assert module.records[-1].loss == pytest.approx(sum(module.losses[-2 * num_queries :]) / (2 * num_queries))

    def test_global_step_counts_them_as_steps(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop()
        assert fit(module, max_steps=5).global_step == 5 and len(module.records) == 5

    def test_two_steps_on_one_batch_under_autocast(self, make_trainer: MakeTrainer, regression_data: MakeData) -> None:
        """Autocast keeps casts of the weights for as long as `training_step` lasts: they have to go with the update."""

        class Twice(OwnLoop):
            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
                zeroth_order_step(self, lambda: self.loss(batch))
                with torch.no_grad():
                    self.loss(batch)  # makes casts
                zeroth_order_step(self, lambda: self.loss(batch))
                with torch.no_grad(), evaluation_mode(self):
                    self.loss(batch)
                    self.cached = self.losses[-1]
                    torch.clear_autocast_cache()
                    self.loss(batch)

        module = Twice(lambda p: MeZO(p, lr=0.5))
        make_trainer(max_steps=2, precision="bf16-mixed").fit(module, regression_data())
        assert module.cached == module.losses[-1]

    def test_loss_and_weight(self, fit: Callable[..., L.Trainer]) -> None:
        plain, weighted = OwnLoop(), OwnLoop()
        weighted.load_state_dict(plain.state_dict())
        inner = weighted.loss
        weighted.loss = lambda batch: {"loss": inner(batch), "num_terms": 7}
        fit(plain), fit(weighted)
        for one, other in zip(plain.records, weighted.records, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-12)  # a mean, on one rank, whatever the weight


class TestSchedulers:
    def test_every_scheduler_takes_a_step_a_step(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop(lambda p: MeZO(p, lr=1.0))

        def configure_optimizers() -> tuple[list, list]:
            optimizer = MeZO(module.parameters(), lr=1.0)
            halved = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            tenth_later = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.1)
            return [optimizer], [halved, tenth_later]

        module.configure_optimizers = configure_optimizers
        fit(module, max_steps=4)
        assert [record.lr[0] for record in module.records] == pytest.approx([1.0, 0.5, 0.025, 0.0125])

    def test_one_that_waits_for_a_metric_is_left_alone(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop()

        def configure_optimizers() -> dict[str, Any]:
            optimizer = MeZO(module.parameters(), lr=1e-3)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau}}

        module.configure_optimizers = configure_optimizers
        module.on_train_epoch_end = lambda: module.lr_schedulers().step(1.0)
        trainer = fit(module, max_steps=21)  # 3 epochs: two of them without an improvement
        assert [record.lr[0] for record in module.records[::7]] == pytest.approx([1e-3, 1e-3, 1e-4])
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5)


class TestRefusals:
    @pytest.mark.parametrize(
        ("make_optimizer", "found"),
        [
            (lambda p: torch.optim.SGD(p, lr=0.1), "SGD"),
            (lambda p: [MeZO([p]) for p in p], "MeZO, MeZO.* Step an optimizer of other layers yourself"),
            (lambda p: None, "_MockOptimizer"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
    def test_other_optimizers(self, fit: Callable[..., L.Trainer], make_optimizer: Any, found: str) -> None:
        with pytest.raises(MisconfigurationException, match=f"must return one zeroth-order method .* got {found}"):
            fit(OwnLoop(make_optimizer))

    def test_automatic_optimization(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop()
        module.automatic_optimization = True
        with pytest.raises(MisconfigurationException, match="OwnLoop has `automatic_optimization=True`"):
            fit(module)

    @pytest.mark.parametrize("loss", [None, {"logits": 1}])
    def test_losses_that_are_none(self, fit: Callable[..., L.Trainer], loss: Any) -> None:
        module = OwnLoop()
        module.loss = lambda batch: loss
        with pytest.raises(TypeError, match="The loss must be a tensor with one element, got None"):
            fit(module)


class TestNonFinite:
    @pytest.fixture
    def bad_at_two(self) -> Iterator[OwnLoop]:
        """A module whose loss is not a number on the third batch."""
        module = OwnLoop(lambda p: MeZOAdam(p, lr=1e-2))
        inner = module.loss
        module.loss = lambda batch: inner(batch) * (float("nan") if len(module.records) == 2 else 1)
        return module

    def test_it_stops_and_says_where(self, fit: Callable[..., L.Trainer], bad_at_two: OwnLoop) -> None:
        with pytest.raises(NonFiniteLossError, match="not finite at step 2: nan, nan"):
            fit(bad_at_two, max_steps=5)

    def test_it_may_be_skipped(self, fit: Callable[..., L.Trainer], bad_at_two: OwnLoop) -> None:
        module, weights = bad_at_two, []

        def training_step(batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            module.records.append(zeroth_order_step(module, lambda: module.loss(batch), skip_nonfinite=True))
            weights.append(module.net[0].weight.detach().clone())

        module.training_step = training_step
        trainer = fit(module, max_steps=7)
        assert [len(record.projected_grads) for record in module.records] == [1, 1, 0, 1, 1, 1, 1]
        assert [torch.equal(one, other) for one, other in pairwise(weights)] == [i == 1 for i in range(6)]
        assert trainer.callback_metrics["zo/skipped"] == 1 and trainer.global_step == 7


def test_the_optimizer_is_attached_at_the_first_step(fit: Callable[..., L.Trainer]) -> None:
    plain, named = OwnLoop(), OwnLoop()
    named.load_state_dict(plain.state_dict())
    named.make_optimizer = lambda _: MeZO(named.named_parameters())
    fit(plain), fit(named)
    assert plain.trainer.optimizers[0].attached
    for one, other in zip(plain.parameters(), named.parameters(), strict=True):
        assert torch.equal(one, other)
