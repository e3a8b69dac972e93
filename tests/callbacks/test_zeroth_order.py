"""ZerothOrder in a Trainer: what it works together with, bad losses, and what it gives back."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from training import Records, assert_equal, weights
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.optim import LOZO, MeZO, MeZOAdam, NonFiniteLossError
from zolightning.optim.estimators import OneSided

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]


class TestNonFinite:
    @pytest.fixture
    def broken(self, make_regression: MakeModule) -> L.LightningModule:
        """Its loss is not a number on batch 2 of each epoch."""
        module = make_regression()
        own_step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            pair = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            return own_step(pair, batch_idx) * (float("nan") if batch_idx == 2 else 1)

        module.training_step = training_step
        return module

    @pytest.mark.parametrize("ids", [None, torch.tensor([7, 9]), ["a", "b"]])
    def test_it_stops_and_names_the_batch(self, broken: L.LightningModule, make_trainer: MakeTrainer, ids: Any) -> None:
        batch = {"x": torch.ones(2, 4), "y": torch.ones(2, 1)} | ({} if ids is None else {"id": ids})
        snapshots = []

        class Snapshot(Callback):
            def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
                snapshots.append(weights(module))

        trainer = make_trainer(max_steps=9, callbacks=[ZerothOrder(partial(MeZO, lr=1e-2)), Snapshot()])
        named = "" if ids is None else f", ids {ids.tolist() if isinstance(ids, Tensor) else ids}"
        with pytest.raises(NonFiniteLossError) as raised:
            trainer.fit(broken, DataLoader([batch] * 5, batch_size=None))
        assert "not finite at step 2: nan, nan" in str(raised.value) and f"Batch 2{named}. " in str(raised.value)
        assert "`skip_nonfinite=True`" in str(raised.value)
        assert_equal(weights(broken), snapshots[2])
        assert not torch.equal(snapshots[1]["net.0.weight"], snapshots[2]["net.0.weight"])

    def test_a_loss_that_is_never_finite_stops_the_run(
        self, make_regression: MakeModule, make_trainer: MakeTrainer, regression_data: MakeData
    ) -> None:
        module, recorder = make_regression(), Records()
        module.training_step = lambda batch, batch_idx: torch.tensor(float("inf"))
        callback = ZerothOrder(partial(MeZO, lr=1e-2), skip_nonfinite=True)
        with pytest.raises(
            NonFiniteLossError, match=r"step 20, nor in the 20 steps before, which were sk.*Batch 6"
        ) as e:
            make_trainer(max_steps=100, callbacks=[callback, recorder]).fit(module, regression_data())
        assert "skip_nonfinite" not in str(e.value) and len(recorder.records) == 20

    def test_skipped_batches_are_counted(
        self, broken: L.LightningModule, make_trainer: MakeTrainer, regression_data: MakeData
    ) -> None:
        recorder = Records()
        callback = ZerothOrder(partial(MeZO, lr=1e-2), skip_nonfinite=True)
        trainer = make_trainer(max_steps=14, callbacks=[callback, recorder])
        trainer.fit(broken, regression_data())
        assert trainer.callback_metrics["zo/skipped"] == 1  # in the last epoch
        assert [i for i, record in enumerate(recorder.records) if not record.projected_grads] == [2, 9]
        assert all(parameter.isfinite().all() for parameter in broken.parameters())

    def test_a_skipped_batch_logs_no_loss(
        self, broken: L.LightningModule, make_trainer: MakeTrainer, regression_data: MakeData
    ) -> None:
        """Lightning logs the last value of a name again in a step that logs none."""
        logged: dict[str, list[int]] = {}

        class Logger(DummyLogger):
            def log_metrics(self, metrics: dict[str, float], step: int) -> None:
                for name in metrics:
                    logged.setdefault(name, []).append(step)

        callback = ZerothOrder(partial(MeZO, lr=1e-2), skip_nonfinite=True)
        trainer = make_trainer(max_steps=5, callbacks=[callback], logger=Logger(), log_every_n_steps=1)
        trainer.fit(broken, regression_data())
        assert logged["zo/lr"] == [0, 1, 2, 3, 4]
        assert logged["train/loss"] == logged["zo/projected_grad"] == [0, 1, 3, 4]


class TestGivingBack:
    """Whatever happens in a fit, the module is its own again afterwards."""

    @staticmethod
    def assert_own(module: L.LightningModule) -> None:
        assert not {"training_step", "configure_optimizers", "log"} & vars(module).keys()
        assert module.automatic_optimization

    def test_after_a_fit(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression()
        trainer = make_trainer(max_steps=3, callbacks=[ZerothOrder(MeZO)])
        trainer.fit(module, regression_data())
        assert trainer.global_step == 3
        self.assert_own(module)
        before = weights(module)
        make_trainer(max_steps=3).fit(module, regression_data())
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert not torch.equal(before["net.0.weight"], module.net[0].weight)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_after_an_error(
        self,
        make_regression: MakeModule,
        regression_data: MakeData,
        make_trainer: MakeTrainer,
        error: type[BaseException],
    ) -> None:
        class Interrupting(type(make_regression())):
            armed = True

            def training_step(self, batch: Any, index: int) -> Tensor:
                if index == 2 and self.armed:
                    raise error
                return super().training_step(batch, index)

        module, undisturbed = Interrupting(), make_regression()
        callback, other_callback = ZerothOrder(partial(MeZO, lr=1e-2)), ZerothOrder(partial(MeZO, lr=1e-2))
        # Lightning ends the process on an interrupt, in its own way
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            make_trainer(max_steps=5, callbacks=[callback]).fit(module, regression_data())
        self.assert_own(module)
        make_trainer(max_steps=2, callbacks=[other_callback]).fit(undisturbed, regression_data())
        assert_equal(weights(module), weights(undisturbed))

        module.armed = False
        make_trainer(max_steps=3, callbacks=[callback]).fit(module, regression_data())  # once more
        make_trainer(max_steps=3, callbacks=[other_callback]).fit(undisturbed, regression_data())
        assert_equal(weights(module), weights(undisturbed))
        make_trainer(max_steps=1).fit(module, regression_data())

    def test_an_error_elsewhere_leaves_a_manual_module_manual(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression()
        module.automatic_optimization = False

        def validation_step(batch: Any, batch_idx: int) -> None:
            raise ValueError

        module.validation_step = validation_step
        with pytest.raises(ValueError):
            make_trainer(callbacks=[ZerothOrder(MeZO)]).validate(module, regression_data(), verbose=False)
        assert not module.automatic_optimization

    def test_modes_are_as_before(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module, modes = make_regression(), []

        class Watch(Callback):
            def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
                module.net[1].eval()
                modes.append([m.training for m in module.modules()])

            def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
                modes.append([m.training for m in module.modules()])

        make_trainer(max_steps=2, callbacks=[ZerothOrder(MeZO), Watch()]).fit(module, regression_data())
        assert modes[0] == modes[1] == modes[2] == modes[3] and modes[0].count(False) == 1


class TestInATrainer:
    def test_scheduler_checkpoints_monitors_and_validation(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
    ) -> None:
        module = make_regression()

        def validation_step(batch: Any, batch_idx: int) -> None:
            module.log("val/loss", F.mse_loss(module.net(batch[0]), batch[1]))

        module.validation_step = validation_step
        checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss", save_top_k=-1)
        trainer = make_trainer(
            max_epochs=3,
            logger=CSVLogger(tmp_path),
            log_every_n_steps=1,
            enable_checkpointing=True,
            callbacks=[
                ZerothOrder(
                    partial(MeZO, lr=1e-2, estimator=OneSided(), num_queries=2),
                    lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=7, gamma=0.5),
                ),
                checkpoint,
                LearningRateMonitor(),
                EarlyStopping("val/loss", patience=100),
            ],
        )
        trainer.fit(module, regression_data(), regression_data())
        assert trainer.global_step == 21 and len(checkpoint.best_k_models) == 3
        assert trainer.callback_metrics["zo/lr"] == pytest.approx(2.5e-3)
        assert trainer.callback_metrics["zo/forward_passes"] == 3 * 21
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1.25e-3)
        with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {"train/loss", "zo/projected_grad", "zo/lr", "zo/forward_passes", "val/loss"} <= set(rows[0])
        monitored = [float(row["lr-MeZO"]) for row in rows if row["lr-MeZO"]]
        assert monitored == [1e-2] * 7 + [5e-3] * 7 + [2.5e-3] * 7  # at every step, as the schedule goes

    @pytest.mark.parametrize(
        ("settings", "logged"), [({}, 0.0), ({"momentum": 0.9}, 0.9), ({"betas": (0.8, 0.95)}, 0.8)]
    )
    def test_momentum_is_monitored(
        self,
        make_regression: MakeModule,
        regression_data: MakeData,
        make_trainer: MakeTrainer,
        tmp_path: Path,
        settings: dict[str, Any],
        logged: float,
    ) -> None:
        monitor = LearningRateMonitor(log_momentum=True)
        callbacks = [ZerothOrder(partial(LOZO, **settings)), SubspaceResampling(), monitor]
        trainer = make_trainer(max_steps=1, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=callbacks)
        trainer.fit(make_regression(), regression_data())
        assert monitor.last_momentum_values["lr-LOZO-momentum"] == logged

    def test_the_run_seed_is_that_of_seed_everything(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        results = []
        for seed in (1, 1, 2):
            L.seed_everything(seed, verbose=False)
            module = make_regression()
            make_trainer(max_steps=2, callbacks=[ZerothOrder(MeZO)]).fit(module, regression_data())
            results.append(weights(module)["net.0.weight"])
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])

    def test_frozen_parameters_stay_out(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression()
        module.net[0].requires_grad_(False)
        before = weights(module)
        trainer = make_trainer(max_steps=3, callbacks=[ZerothOrder(partial(MeZOAdam, lr=1e-2))])
        trainer.fit(module, regression_data())
        assert torch.equal(module.net[0].weight, before["net.0.weight"])
        assert not torch.equal(module.net[3].weight, before["net.3.weight"])
        assert set(trainer.optimizers[0].state) == set(module.net[3].parameters())

    def test_torch_generators_are_left_alone(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        states = []

        class Watch(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                states.append(torch.get_rng_state())

            def on_train_batch_end(self, *_: Any) -> None:
                states.append(torch.get_rng_state())

        make_trainer(max_steps=3, callbacks=[ZerothOrder(MeZO), Watch()]).fit(make_regression(), regression_data())
        assert all(torch.equal(state, states[0]) for state in states)
