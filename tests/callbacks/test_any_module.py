"""ZerothOrder under strangers' modules: what they return, bring along and expect of a fit."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping, LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from training import Records, assert_equal, weights
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.optim import LOZO, MeZO

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]
Fit = Callable[..., L.Trainer]

METHOD = partial(MeZO, lr=1e-2, eps=1e-2)


@pytest.fixture
def fit(make_trainer: MakeTrainer, regression_data: MakeData) -> Fit:
    def fit(module: Any, *callbacks: Callback, zeroth_order: ZerothOrder | None = None, **kwargs: Any) -> L.Trainer:
        trainer = make_trainer(
            **{"max_steps": 4, "callbacks": [zeroth_order or ZerothOrder(METHOD), *callbacks]} | kwargs
        )
        trainer.fit(module, regression_data())
        return trainer

    return fit


class TestWhatTrainingStepReturns:
    @pytest.mark.parametrize("own", [torch.rand(4), 0.0, None, "heavy"])
    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    def test_a_dictionary_may_have_a_weight_of_its_own(
        self, make_regression: MakeModule, fit: Fit, own: Any, micro_batch_size: int | None
    ) -> None:
        plain, weighted = make_regression(), make_regression()
        own_step = weighted.training_step
        weighted.training_step = lambda batch, batch_idx: {"loss": own_step(batch, batch_idx), "weight": own}
        for module in (plain, weighted):
            fit(module, zeroth_order=ZerothOrder(METHOD, micro_batch_size=micro_batch_size))
        assert_equal(weights(plain), weights(weighted))

    @pytest.mark.parametrize(
        ("terms", "found"), [(torch.ones(4), r"torch.Size\(\[4\]\)"), ("many", "'many'"), (-1, "-1")]
    )
    def test_the_number_of_terms_is_one_number(
        self, make_regression: MakeModule, fit: Fit, terms: Any, found: str
    ) -> None:
        module = make_regression()
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: {"loss": own_step(batch, batch_idx), "num_terms": terms}
        with pytest.raises(ValueError, match=f"`num_terms`.* must (be a number|not be negative).* got {found}"):
            fit(module)

    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    @pytest.mark.parametrize("skipped", [0, 2])
    def test_none_skips_the_batch(
        self, make_regression: MakeModule, fit: Fit, micro_batch_size: int | None, skipped: int
    ) -> None:
        """As in backpropagation, with a line of Lightning's kind; the step is counted."""
        module, records, seen = make_regression(), Records(), []
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: None if batch_idx == skipped else own_step(batch, batch_idx)

        class Weights(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
                seen.append((weights(module)["net.0.weight"], outputs))

        callback = ZerothOrder(METHOD, micro_batch_size=micro_batch_size)
        with pytest.warns(UserWarning, match="`training_step` returned None, which skips the batch"):
            trainer = fit(module, records, Weights(), zeroth_order=callback)
        assert trainer.global_step == 4 and [record.step for record in records.records] == [0, 1, 2, 3]
        assert [not record.projected_grads for record in records.records] == [step == skipped for step in range(4)]
        unmoved = [step for step in range(1, 4) if torch.equal(seen[step][0], seen[step - 1][0])]
        assert unmoved == ([skipped] if skipped else []) and seen[skipped][1] == {}
        assert trainer.callback_metrics["train/loss"].isfinite()

    def test_shared_runs_of_the_network_go_on_after_a_skipped_batch(
        self, make_regression: MakeModule, fit: Fit
    ) -> None:
        module, records, calls = make_regression(), Records(), []
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: None if batch_idx == 2 else own_step(batch, batch_idx)
        module.net[0].register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        with pytest.warns(UserWarning, match="returned None") as warned:
            fit(module, records, zeroth_order=ZerothOrder(METHOD, evaluations_per_forward=2))
        assert not any("evaluations_per_forward" in str(warning.message) for warning in warned)
        assert [not record.projected_grads for record in records.records] == [False, False, True, False]
        assert calls[-1] == 8  # both evaluations of four examples

    def test_some_parts_of_a_batch_may_be_skipped(self, make_regression: MakeModule, fit: Fit) -> None:
        """Their examples do not count: the loss is that of a batch without them."""
        module, records = make_regression(), [Records(), Records()]
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: None if len(batch[0]) == 1 else own_step(batch, batch_idx)
        fit(module, records[0], zeroth_order=ZerothOrder(METHOD, micro_batch_size=3), max_steps=1)
        other = make_regression()
        own_step = other.training_step
        other.training_step = lambda batch, batch_idx: own_step([part[:3] for part in batch], batch_idx)
        fit(other, records[1], max_steps=1)
        for one, two in zip(records[0].records, records[1].records, strict=True):
            assert one.losses == pytest.approx(two.losses, rel=1e-6)

    @pytest.mark.parametrize("terms", [0, 0.0, torch.tensor([0])])
    def test_no_terms_skip_the_batch_too(self, make_regression: MakeModule, fit: Fit, terms: Any) -> None:
        module, before = make_regression(), weights(make_regression())
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: {"loss": own_step(batch, batch_idx) / 0, "num_terms": terms}
        fit(module)
        assert_equal(weights(module), before)

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (lambda loss: (loss, torch.zeros(99, 99)), "a tuple"),
            (lambda loss: [{"boxes": torch.zeros(99, 4)}], "a list"),
            (lambda loss: {"loss": "low"}, "a str"),
            (lambda loss: loss.item() * 0, "0.0"),
            (lambda loss: loss.expand(3), r"torch.Size\(\[3\]\)"),
        ],
    )
    def test_what_is_no_loss_takes_one_line(
        self, make_regression: MakeModule, fit: Fit, change: Callable[[Tensor], Any], found: str
    ) -> None:
        module = make_regression()
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: change(own_step(batch, batch_idx))
        with pytest.raises(TypeError, match=rf"The loss must be a tensor with one element, got {found}\.$"):
            fit(module)

    def test_outputs_of_hugging_face(self, make_regression: MakeModule, fit: Fit) -> None:
        """A dictionary of their own class, returned as it is."""
        module, seen = make_regression(), []
        own_step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> SequenceClassifierOutput:
            return SequenceClassifierOutput(loss=own_step(batch, batch_idx), logits=batch[1])

        class Outputs(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
                seen.append(outputs.logits)

        module.training_step = training_step
        before = weights(module)
        fit(module, Outputs())
        assert len(seen) == 4 and not torch.equal(before["net.0.weight"], module.net[0].weight)

    def test_other_callbacks_get_what_it_returned_first(self, make_regression: MakeModule, fit: Fit) -> None:
        module, seen = make_regression(), []
        own_step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> dict[str, Any]:
            output = {"loss": own_step(batch, batch_idx), "logits": module.net(batch[0]), "name": "a"}
            seen.append(output)
            return output

        class Outputs(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
                first = seen[-2]  # two evaluations a step
                assert outputs.keys() == {"loss", "logits", "name"}
                assert torch.equal(outputs["loss"], first["loss"])
                assert torch.equal(outputs["logits"], first["logits"])
                assert not outputs["logits"].requires_grad and outputs["name"] == "a"
                seen.clear()

        module.training_step = training_step
        fit(module, Outputs())

    def test_a_tensor_is_the_loss_of_the_outputs(self, make_regression: MakeModule, fit: Fit) -> None:
        outputs = []

        class Outputs(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, output: Any, *_: Any) -> None:
                outputs.append(output)

        fit(make_regression(), Outputs())
        fit(make_regression(), Outputs(), zeroth_order=ZerothOrder(METHOD, micro_batch_size=2))
        assert [output["loss"].item() for output in outputs[:4]] == pytest.approx(
            [output["loss"].item() for output in outputs[4:]], rel=1e-5
        )

    def test_the_learning_rate_finder(self, make_trainer: MakeTrainer, tmp_path: Any) -> None:
        class Model(BoringModel):
            lr = 1e-3

            def train_dataloader(self) -> DataLoader:
                return DataLoader(RandomDataset(32, 64), batch_size=2)

        finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
        module = Model()
        trainer = make_trainer(
            max_steps=16, limit_val_batches=0, callbacks=[finder, ZerothOrder(partial(MeZO, lr=1e-2, eps=1e-2))]
        )
        trainer.fit(module)
        assert len(finder.optimal_lr.results["loss"]) == 15
        assert all(torch.tensor(finder.optimal_lr.results["loss"]).isfinite())
        assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr != 1e-3

    @pytest.mark.parametrize("name", ["train/loss", "loss"])
    def test_its_own_logs_go_on_existing(
        self, make_regression: MakeModule, fit: Fit, make_trainer: MakeTrainer, name: str
    ) -> None:
        """Under every name, with the arguments that it gave them."""
        module, values = make_regression(), []
        own_step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            loss = own_step(batch, batch_idx)
            module.log(name, loss, on_step=True, on_epoch=True)
            values.append(loss.item())
            return loss

        module.training_step = training_step
        records = Records()
        trainer = fit(module, records, EarlyStopping(f"{name}_epoch"), max_steps=14)
        metrics = trainer.callback_metrics
        assert metrics[f"{name}_epoch"] == pytest.approx(sum(values[-14::2]) / 7)  # of the first of two evaluations
        assert metrics[f"{name}_step"] == pytest.approx(values[-2])
        if name == "loss":
            assert metrics["train/loss"] == pytest.approx(records.records[-1].loss)

    def test_the_batch_size_finder(self, make_trainer: MakeTrainer) -> None:
        """The run after it is at the same precision, with the same state, as one without it."""

        class Model(BoringModel):
            def __init__(self) -> None:
                super().__init__()
                self.batch_size = 2
                with torch.no_grad():
                    self.layer.weight.fill_(0.1), self.layer.bias.zero_()

            def train_dataloader(self) -> DataLoader:
                torch.manual_seed(0)
                return DataLoader(RandomDataset(32, 64), batch_size=self.batch_size)

        finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
        found, plain = Model(), Model()
        plain.batch_size = 4
        optimizers = []
        for module, callbacks in ((found, [finder]), (plain, [])):
            trainer = make_trainer(
                max_steps=3,
                limit_val_batches=0,
                precision="bf16-true",
                callbacks=[*callbacks, ZerothOrder(METHOD)],
            )
            trainer.fit(module)
            optimizers.append(trainer.optimizers[0])
        assert found.batch_size == 4 and {p.dtype for p in found.parameters()} == {torch.bfloat16}
        assert_equal(weights(found), weights(plain))
        assert optimizers[0].state_bytes() == optimizers[1].state_bytes() > 0


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
            "MeZO trains 4 of 4 parameter tensors of WithHooks in place of AdamW and StepLR, whose learning rates by "
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

    def test_a_loss_of_gradients_by_parameters(self, make_regression: MakeModule, fit: Fit) -> None:
        class Penalty(type(make_regression())):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                gradients = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
                return loss + sum(gradient.square().sum() for gradient in gradients)

        with pytest.raises(
            MisconfigurationException, match="`training_step` of Penalty differentiates by the module's"
        ):
            fit(Penalty())

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

        with pytest.raises(MisconfigurationException, match=r"`keep_prefix_gib` is 0.5, and `fixed_batches` of the da"):
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
