"""ZerothOrder under modules that know nothing of it, with real Trainers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from zolightning import zeroth_order_step
from zolightning.callbacks import ZerothOrder
from zolightning.estimators import OneSided
from zolightning.optim import MeZO, MeZOAdam, NonFiniteLossError, StepRecord, ZerothOrderOptimizer

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]

NORMALIZED = partial(MeZO, lr=0.02, eps=1e-2, normalize=True, num_queries=4)


class Records(Callback):
    """Keeps the record of every step."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.records.append(trainer.optimizers[0].record)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Images(L.LightningModule):
    """A convolutional network with batch norm, its weights and images in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
        ).to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        return {"loss": F.cross_entropy(self.net(images.to(memory_format=torch.channels_last)), labels)}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1000)]

    @staticmethod
    def data() -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(64, 1, 6, 6, generator=generator)
        labels = (images[:, 0, :3].mean((1, 2)) > images[:, 0, 3:].mean((1, 2))).long()
        return DataLoader([(images, labels)], batch_size=None)


class Bert(L.LightningModule):
    """A Hugging Face classifier, as its users write it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=12, **sizes))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        outputs = self.model(**batch)
        self.log("train/loss", outputs.loss)
        self.log("train/accuracy", (outputs.logits.argmax(-1) == batch["labels"]).float().mean(), prog_bar=True)
        return outputs.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    @staticmethod
    def data() -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 20, (32, 8), generator=generator)
        mask = torch.arange(8) < torch.randint(4, 9, (32, 1), generator=generator)
        labels = (ids[:, 0] > 10).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
        return DataLoader([batch], batch_size=None)


def loss_of(module: L.LightningModule, batch: Any) -> float:
    module.eval()
    log, module.log = module.log, lambda *_, **__: None
    with torch.no_grad():
        outputs = module.training_step(batch) if isinstance(module, Images) else module.training_step(batch, 0)
    module.log = log
    module.train()
    return (outputs["loss"] if isinstance(outputs, dict) else outputs).item()


class TestUnchangedModules:
    @pytest.fixture(params=["regression", "images", "bert"])
    def module_and_data(
        self, request: pytest.FixtureRequest, make_regression: MakeModule, regression_data: MakeData
    ) -> tuple[L.LightningModule, Any]:
        L.seed_everything(0)
        if request.param == "regression":
            return make_regression(), regression_data(num_batches=1, batch_size=32)
        cls = {"images": Images, "bert": Bert}[request.param]
        return cls().train(), cls.data()

    def test_they_train_with_it_and_without_it(
        self, module_and_data: tuple[L.LightningModule, Any], make_trainer: MakeTrainer
    ) -> None:
        module, data = module_and_data
        (batch,) = iter(data)
        start = module.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        before = loss_of(module, batch)

        make_trainer(max_steps=60, callbacks=[ZerothOrder(NORMALIZED)]).fit(module, data)
        assert loss_of(module, batch) < 0.8 * before
        assert all(parameter.grad is None for parameter in module.parameters())

        module.load_state_dict(start)
        make_trainer(max_steps=60).fit(module, data)
        assert loss_of(module, batch) < 0.8 * before
        assert any(parameter.grad is not None for parameter in module.parameters())

    @pytest.mark.parametrize("takes_index", [True, False])
    def test_signatures_of_training_step(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer, takes_index: bool
    ) -> None:
        module, indices = make_regression(), []
        own_step = module.training_step

        def with_index(batch: Any, batch_idx: int) -> Tensor:
            indices.append(batch_idx)
            return own_step(batch, batch_idx)

        def without_index(batch: Any) -> Tensor:
            return own_step(batch, 0)

        module.training_step = with_index if takes_index else without_index
        recorder = Records()
        make_trainer(max_steps=3, callbacks=[ZerothOrder(MeZO), recorder]).fit(module, regression_data())
        assert [record.forward_passes for record in recorder.records] == [2, 2, 2]
        assert indices == ([0] * 7 + [1] * 2 + [2] * 2 if takes_index else [])

    def test_dictionaries_without_a_loss(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression()
        module.training_step = lambda batch, batch_idx: {"logits": batch[0]}
        with pytest.raises(TypeError, match="The loss must be a tensor with one element, got None"):
            make_trainer(max_steps=1, callbacks=[ZerothOrder(MeZO)]).fit(module, regression_data())

    def test_it_is_the_step_of_a_module_that_calls_it_itself(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        class Own(type(make_regression())):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                zeroth_order_step(self, lambda: super(Own, self).training_step(batch, batch_idx))

            def configure_optimizers(self) -> ZerothOrderOptimizer:
                return MeZO(self.parameters(), lr=1e-2)

        own, plain = Own(), make_regression()
        make_trainer(max_steps=9).fit(own, regression_data())
        make_trainer(max_steps=9, callbacks=[ZerothOrder(partial(MeZO, lr=1e-2))]).fit(plain, regression_data())
        assert_equal(weights(own), weights(plain))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.float32),
        ("64-true", torch.float64),
    ],
)
@pytest.mark.parametrize("method", [partial(NORMALIZED, lr=0.04), partial(MeZOAdam, lr=0.04, eps=1e-2, num_queries=4)])
def test_precisions(
    make_regression: MakeModule,
    regression_data: MakeData,
    make_trainer: MakeTrainer,
    precision: str,
    dtype: torch.dtype,
    method: Any,
) -> None:
    module, recorder = make_regression(), Records()
    trainer = make_trainer(max_steps=40, precision=precision, callbacks=[ZerothOrder(method), recorder])
    trainer.fit(module, regression_data(num_batches=1, batch_size=32))
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    losses = [record.loss for record in recorder.records]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    state = [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
    wide = {torch.float64} if precision == "64-true" else {torch.float32, torch.int16}
    assert {value.dtype for value in state if isinstance(value, Tensor)} <= wide


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

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                if batch_idx == 2 and self.armed:
                    raise error
                return super().training_step(batch, batch_idx)

        module, undisturbed = Interrupting(), make_regression()
        callback = ZerothOrder(partial(MeZO, lr=1e-2))
        # Lightning ends the process on an interrupt, in its own way
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            make_trainer(max_steps=5, callbacks=[callback]).fit(module, regression_data())
        self.assert_own(module)
        make_trainer(max_steps=2, callbacks=[callback]).fit(undisturbed, regression_data())
        assert_equal(weights(module), weights(undisturbed))

        module.armed = False
        for other in (module, undisturbed):  # the same callback, once more
            make_trainer(max_steps=3, callbacks=[callback]).fit(other, regression_data())
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
        names = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"train/loss", "zo/projected_grad", "zo/lr", "zo/forward_passes", "val/loss"} <= set(names)

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
