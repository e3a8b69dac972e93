"""What a stranger's ``training_step`` returns and logs, under ZerothOrder."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, EarlyStopping, LearningRateFinder
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from training import Records, assert_equal, weights
from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]
Fit = Callable[..., L.Trainer]

METHOD = partial(MeZO, lr=1e-2, eps=1e-2)


class TestWhatTrainingStepReturns:
    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    def test_a_loss_in_half_precision(
        self, make_regression: MakeModule, fit: Fit, micro_batch_size: int | None
    ) -> None:
        """As transformers' classifiers return it: it has 8 bits, and the losses of a step differ in later ones."""
        module = make_regression()
        callback = ZerothOrder(METHOD, micro_batch_size=micro_batch_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The loss is in")
            fit(module, zeroth_order=callback, precision="bf16-true")  # computes it in float32
        module.training_step = lambda batch, batch_idx: F.mse_loss(module.net(batch[0]), batch[1])
        with pytest.warns(UserWarning, match=r"The loss is in bfloat16, where neighbouring numbers are 0\.4 to 0\.8 %"):
            fit(module, zeroth_order=callback, precision="bf16-true")

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

    def test_a_part_without_terms_does_not_count(self, make_regression: MakeModule, fit: Fit) -> None:
        """A mean over no terms is NaN: that of the tokens to predict of a part that has none, for example."""
        records = [Records(), Records()]
        for found, micro_batch_size in zip(records, (None, 1), strict=True):
            module = make_regression()

            def training_step(batch: Any, batch_idx: int, net: Any = module.net) -> dict[str, Any]:
                inputs, targets = batch
                counts = targets[:, 0] > 0
                return {"loss": F.mse_loss(net(inputs)[counts], targets[counts]), "num_terms": counts.sum()}

            module.training_step = training_step
            fit(module, found, zeroth_order=ZerothOrder(METHOD, micro_batch_size=micro_batch_size))
        for one, two in zip(*(found.records for found in records), strict=True):
            assert one.losses == pytest.approx(two.losses, rel=1e-4)

    @pytest.mark.parametrize("terms", [0, 0.0, torch.tensor([0])])
    def test_no_terms_skip_the_batch_too(self, make_regression: MakeModule, fit: Fit, terms: Any) -> None:
        module, before = make_regression(), weights(make_regression())
        own_step = module.training_step
        module.training_step = lambda batch, batch_idx: {"loss": own_step(batch, batch_idx) / 0, "num_terms": terms}
        fit(module)
        assert_equal(weights(module), before)

    def test_a_batch_without_rows_is_skipped(self, make_trainer: MakeTrainer, make_regression: MakeModule) -> None:
        """Its mean is NaN. Of several ranks the others' rows count; a tensor that is always empty does not."""
        rows = [[torch.zeros(0), torch.rand(size, 4), torch.rand(size, 1)] for size in (4, 0, 4)]
        module, records = make_regression(), Records()
        module.training_step = lambda batch, batch_idx: F.mse_loss(module.net(batch[1]), batch[2])
        trainer = make_trainer(max_steps=3, callbacks=[ZerothOrder(METHOD), records])
        trainer.fit(module, DataLoader(rows, batch_size=None))
        assert [bool(record.projected_grads) for record in records.records] == [True, False, True]

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
