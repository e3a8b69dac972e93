"""One step of a module that calls `zeroth_order_step` itself."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tape import Tape
from zolightning import zeroth_order_step
from zolightning.evaluation.evaluator import Evaluator
from zolightning.evaluation.mode import evaluation_mode
from zolightning.optim import MeZO, MeZOAdam, NonFiniteLossError
from zolightning.optim.estimators import OneSided
from zolightning.partners import log_number
from zolightning.step import logged_once

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]


class OwnLoop(L.LightningModule):
    """Manual optimization, as a user would write it, with layers that behave differently in training."""

    def __init__(self, make_optimizer: Callable[[Any], Any] = MeZO) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1))
        self.frozen_norm = nn.BatchNorm1d(4)
        self.make_optimizer = make_optimizer
        self.losses = Tape()
        self.records: list[Any] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Any:
        inputs, targets = batch
        loss = F.mse_loss(self.net(self.frozen_norm(inputs)), targets)
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.records.append(zeroth_order_step(self, lambda: self.loss(batch)))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


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

    def test_modes_are_set_without_calling_train(self) -> None:
        """Which some modules override to do more, to merge adapters into their weights for example."""

        class Merging(nn.Linear):
            def train(self, mode: bool = True) -> "Merging":
                raise AssertionError("asked to change its weights")

        module = nn.Sequential(Merging(2, 2), nn.Dropout())
        with evaluation_mode(module):
            assert not any(m.training for m in module.modules())
        assert all(m.training for m in module.modules())

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


class TestLogging:
    def logged(self, fit: Callable[..., L.Trainer], module: L.LightningModule, **kwargs: Any) -> dict[str, float]:
        return {name: value.item() for name, value in fit(module, **kwargs).logged_metrics.items()}

    def test_what_a_step_logs(self, fit: Callable[..., L.Trainer]) -> None:
        module = OwnLoop(lambda p: MeZO(p, lr=1e-3, num_queries=2))
        logged = self.logged(fit, module, max_steps=3)
        record = module.records[-1]
        assert logged["train/loss"] == pytest.approx(record.loss, rel=1e-6)
        assert logged["zo/lr"] == pytest.approx(1e-3)
        assert logged["zo/forward_passes"] == 12
        rms = (sum(g**2 for g in record.projected_grads) / 2) ** 0.5
        assert logged["zo/projected_grad"] == pytest.approx(rms, rel=1e-6)

    @pytest.mark.parametrize("own_name", ["train/loss", "loss"])
    def test_the_loss_function_logs_once_a_step(self, fit: Callable[..., L.Trainer], own_name: str) -> None:
        """Under any name; the step's own metric gives way to one of its name."""
        module, values = OwnLoop(), []
        inner = module.loss

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            value = inner(batch)
            values.append(value.item())
            module.log(own_name, value, on_epoch=True)
            module.log_dict({"a": value, "b": -value})
            return value

        module.loss = loss
        logged = self.logged(fit, module, max_steps=1)
        first = module.records[0].losses[0]  # evaluations that only audit the parameters log nothing
        assert logged["a"] == pytest.approx(first) and logged["b"] == pytest.approx(-first)
        assert logged[f"{own_name}_step"] == pytest.approx(first) != pytest.approx(module.records[0].loss)
        assert ("train/loss" in logged) == (own_name != "train/loss")
        assert "log" not in vars(module)

    def test_a_log_of_its_own_is_respected(self, fit: Callable[..., L.Trainer]) -> None:
        module, names = OwnLoop(), []

        def log(name: str, value: Any, **kwargs: Any) -> None:
            names.append(name)

        module.log = log
        inner = module.loss
        module.loss = lambda batch: (module.log("mine", 1.0), inner(batch))[1]
        fit(module, max_steps=2)
        assert names.count("mine") == 2 and names.count("train/loss") == 2 and module.log is log

    @pytest.mark.parametrize("own_log", [False, True])
    def test_numbers_are_where_lightning_puts_them(
        self, make_trainer: MakeTrainer, regression_data: MakeData, monkeypatch: pytest.MonkeyPatch, own_log: bool
    ) -> None:
        """At each step and in each epoch, for callbacks, bars and loggers, though most steps call no ``log``."""

        def shown(trainer: L.Trainer) -> list[dict[str, float]]:
            found = trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics
            return [{name: torch.as_tensor(value).tolist() for name, value in metrics.items()} for metrics in found]

        class Logging(OwnLoop):
            def loss(self, batch: tuple[Tensor, Tensor]) -> Any:
                loss = super().loss(batch)
                self.log("inner", loss[None], prog_bar=True)
                self.log("weighted", loss, on_epoch=True, batch_size=1 + len(self.losses) % 3)
                return loss

            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
                super().training_step(batch, batch_idx)
                self.log("own", self.records[-1].losses[0])  # behind those of the step
                log_number(self, "mean", float(batch_idx), on_epoch=True)

            def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
                self.log("val/loss", F.mse_loss(self.net(batch[0]), batch[1]))

            def on_train_batch_end(self, *_: Any) -> None:
                if self.trainer.global_step % 3 == 0:
                    self.log("sometimes", float(self.trainer.global_step))
                self.seen.append(shown(self.trainer))

        class WithLog(Logging):
            def log(self, name: str, *args: Any, **options: Any) -> None:
                self.names.append(name)
                super().log(name, *args, **options)

        def fit() -> tuple[list[Any], list[Any], list[str]]:
            torch.manual_seed(1)
            module, rows = (WithLog if own_log else Logging)(lambda p: MeZO(p, lr=1e-2)), []
            module.seen, module.names = [], []
            logger = DummyLogger()
            logger.log_metrics = lambda metrics, step: rows.append((step, metrics))
            trainer = make_trainer(logger=logger, max_epochs=3, log_every_n_steps=2, val_check_interval=3)
            trainer.fit(module, regression_data(), regression_data())
            return rows, [*module.seen, shown(trainer)], module.names

        rows, seen, names = fit()
        assert len({metrics["zo/projected_grad"] for metrics, *_ in seen}) == 21  # of three epochs, by step
        assert names.count("zo/lr") == names.count("inner") == (21 if own_log else 0)
        monkeypatch.setattr("zolightning.training_loop._has_logged_again", lambda *_, **__: False)
        assert (rows, seen) == fit()[:2]

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            (
                lambda log, value: log("own", value, prog_bar=True),
                "twice in `training_step` with different arguments",
            ),
            (lambda log, value: log("own", torch.ones(2)), "the tensor must have a single element"),
        ],
    )
    def test_what_lightning_refuses_is_refused_later_too(
        self, fit: Callable[..., L.Trainer], changed: Callable[..., None], said: str
    ) -> None:
        module = OwnLoop()
        inner = module.loss

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            value = inner(batch)
            changed(module.log, value) if len(module.records) == 3 else module.log("own", value)
            return value

        module.loss = loss
        with pytest.raises((MisconfigurationException, ValueError), match=said):
            fit(module, max_steps=5)
        assert len(module.records) == 3


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
