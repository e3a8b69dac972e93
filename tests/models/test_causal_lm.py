"""CausalLM under a real Trainer, by backpropagation."""

from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from zolightning.callbacks import ZerothOrder
from zolightning.models import CausalLM, answer_log_probs, candidate_scores, classification_loss
from zolightning.optim import MeZO

EXAMPLES = [([5, 9, 3], [[6], [11]]), ([2, 4], [[6], [11]]), ([7, 7, 8, 2], [[6], [11]]), ([12], [[6], [11]])]
SGD = partial(torch.optim.SGD, lr=0.1)


class Batches(L.LightningDataModule):
    """The same batches for every stage."""

    def __init__(self, batches: list[dict], num_classes: int = 2) -> None:
        super().__init__()
        self.batches = batches
        self.num_classes = num_classes

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Recorder(L.Callback):
    """Keeps what training looked like from outside."""

    def __init__(self) -> None:
        self.outputs, self.logged, self.lrs, self.training = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.outputs.append(outputs)
        self.logged.append({name: value.item() for name, value in trainer.logged_metrics.items()})
        self.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.training.append(all(module.training for module in pl_module.modules()))


@pytest.fixture
def make_trainer(make_trainer):
    return partial(make_trainer, log_every_n_steps=1)


@pytest.fixture
def batches(make_batch):
    return [
        make_batch(EXAMPLES[:3], [1, 0, 1], prompt_only=True),
        make_batch(EXAMPLES[3:], [1], prompt_only=True),
    ]


@pytest.fixture
def answers_batch(make_batch):
    """Long answers, of which only the right ones are trained."""
    examples = [([5, 9, 3], [[6, 2, 8]]), ([2, 4], [[6]])]
    return make_batch(examples, [0, 0], objective="language_modeling")


def scores_of(module: CausalLM, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return candidate_scores(*answer_log_probs(module.model, batch))


def test_two_steps_of_backpropagation_lower_the_loss(tiny_folder, batches, make_trainer):
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    before = classification_loss(scores_of(module, batches[0]), batches[0]["label"])
    recorder = Recorder()
    make_trainer(max_steps=2, callbacks=recorder, limit_val_batches=0).fit(module, datamodule=Batches(batches[:1] * 2))

    first, second = recorder.outputs
    torch.testing.assert_close(first["loss"], before)
    assert first["num_terms"].item() == 3.0
    assert second["loss"] < first["loss"]
    assert recorder.training == [True, True]
    assert recorder.logged[0]["train/loss"] == pytest.approx(before.item())
    assert recorder.logged[0]["train/accuracy"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)


def test_more_examples_than_bfloat16_can_count(tiny_folder, make_batch):
    """In whose steps tensors are bfloat16 by default under bf16-true."""
    batch = make_batch(EXAMPLES[:1] * 257, [1] * 257, prompt_only=True)
    with HalfPrecision("bf16-true").forward_context(), torch.no_grad():
        assert CausalLM(str(tiny_folder)).evaluate(batch).num_terms.item() == 257


def test_the_bar_shows_what_the_host_knows(tiny_folder, batches, make_trainer):
    """Lightning reads what it shows at every step, and would wait for a GPU to have it."""
    trainer = make_trainer(max_steps=1, callbacks=ZerothOrder(partial(MeZO, lr=1e-3)), limit_val_batches=0)
    trainer.fit(CausalLM(str(tiny_folder)), datamodule=Batches(batches[:1]))
    assert "train/accuracy" in trainer.logged_metrics
    assert set(trainer.progress_bar_metrics) == {"train/loss"}  # a mean of the losses that the step has read


def test_train_mode_outlives_a_validation(tiny_folder, batches, make_trainer):
    recorder = Recorder()
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    make_trainer(max_epochs=2, callbacks=recorder).fit(module, datamodule=Batches(batches))
    assert recorder.training == [True] * 4


def test_without_backpropagation_the_caller_logs_the_loss(tiny_folder, batches, make_trainer):
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    module.automatic_optimization = False
    recorder = Recorder()
    trainer = make_trainer(max_epochs=1, limit_train_batches=1, callbacks=recorder, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(batches))
    assert set(recorder.logged[0]) == {"train/accuracy"}


def test_the_objective_accuracy_is_the_share_of_wrong_choices(tiny_folder, make_batch, make_trainer):
    module = CausalLM(str(tiny_folder))
    batch = make_batch(EXAMPLES, [0] * 4, objective="accuracy", prompt_only=True)
    choice = scores_of(module, batch).argmax(dim=-1)
    batch["label"] = torch.stack([choice[0], 1 - choice[1], choice[2], choice[3]])
    recorder = Recorder()
    callbacks = [ZerothOrder(partial(MeZO, lr=1e-9, eps=1e-9)), recorder]  # eps moves no choice
    make_trainer(max_steps=1, callbacks=callbacks, limit_val_batches=0).fit(module, datamodule=Batches([batch]))
    assert recorder.outputs[0]["loss"].item() == recorder.logged[0]["train/loss"] == 0.25
    assert recorder.outputs[0]["num_terms"].item() == 4.0 and recorder.logged[0]["train/accuracy"] == 0.75
    (metrics,) = make_trainer().validate(module, datamodule=Batches([batch]), verbose=False)
    assert metrics["val/loss"] == pytest.approx(classification_loss(scores_of(module, batch), batch["label"]).item())


def test_the_objective_accuracy_counts_any_right_choice(tiny_folder, make_batch):
    module = CausalLM(str(tiny_folder))
    batch = make_batch([([5, 9], [[6, 2], [4], [8]]), ([2, 4], [[6, 3], [9], [7]])], [0, 0], objective="accuracy")
    batch["right"] = torch.arange(3) == scores_of(module, batch).argmax(dim=-1, keepdim=True)
    batch["right"][1] = ~batch["right"][1]  # two right ones, neither chosen
    module.log = lambda *args, **options: None
    assert module.training_step(batch, 0)["loss"].item() == 0.5


def test_the_objective_accuracy_has_no_gradient(tiny_folder, batches, make_trainer):
    data = Batches(batches)
    data.task = SimpleNamespace(objective="accuracy")
    with pytest.raises(MisconfigurationException, match="`objective` is 'accuracy', which has no gradient: name a zer"):
        make_trainer(max_steps=1).fit(CausalLM(str(tiny_folder)), datamodule=data)


def test_answers_are_trained_by_their_tokens(tiny_folder, answers_batch, make_trainer):
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    with torch.no_grad():
        log_probs, _ = answer_log_probs(module.model, answers_batch)
    recorder = Recorder()
    data = Batches([answers_batch], num_classes=2)
    make_trainer(max_steps=1, callbacks=recorder, limit_val_batches=0).fit(module, datamodule=data)
    assert recorder.outputs[0]["num_terms"].item() == 4.0
    torch.testing.assert_close(recorder.outputs[0]["loss"], -log_probs.sum() / 4)
    assert set(recorder.logged[0]) == {"train/loss"}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_logs_loss_accuracy_and_f1_over_all_examples(tiny_folder, batches, make_trainer, stage):
    module = CausalLM(str(tiny_folder))
    trainer = make_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    (metrics,) = run(module, datamodule=Batches(batches), verbose=False)

    scores = torch.cat([scores_of(module, batch) for batch in batches])
    label = torch.tensor([1, 0, 1, 1])
    prediction = scores.argmax(dim=-1)
    expected = {
        f"{stage}/loss": classification_loss(scores, label).item(),
        f"{stage}/accuracy": (prediction == label).float().mean().item(),
        f"{stage}/f1": multiclass_f1_score(prediction, label, num_classes=2, average="macro").item(),
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_calibration_decides_the_choice_and_leaves_the_loss(tiny_folder, batches, make_batch, make_trainer):
    module = CausalLM(str(tiny_folder))
    (plain,) = make_trainer().test(module, datamodule=Batches(batches[:1]), verbose=False)
    free = make_batch([([4], [[6], [11]])], [0], prompt_only=True)
    batch = batches[0] | {"content_free": free, "content_free_place": torch.zeros(3, dtype=torch.long)}
    scores = scores_of(module, batches[0]) - scores_of(module, free)
    batch["label"] = scores.argmax(dim=-1)
    data = Batches([batch])
    (calibrated,) = make_trainer().test(module, datamodule=data, verbose=False)
    assert calibrated["test/accuracy"] == 1.0
    (predicted,) = make_trainer().predict(module, datamodule=data)
    torch.testing.assert_close(predicted["scores"], scores)
    assert torch.equal(predicted["prediction"], batch["label"])
    # the answers' prior is what tips the balance, or this test would say nothing
    assert not torch.equal(scores_of(module, batches[0]).argmax(dim=-1), batch["label"])
    batch["label"] = batches[0]["label"]
    (calibrated,) = make_trainer().test(module, datamodule=data, verbose=False)
    assert calibrated["test/loss"] == plain["test/loss"]


def test_evaluation_loss_of_answers_is_the_mean_over_all_tokens(tiny_folder, make_batch, make_trainer):
    batches = [
        make_batch([([5, 9], [[6, 2, 8], [4]])], [0], objective="language_modeling"),
        make_batch([([2, 4], [[6, 3], [9]])], [1], objective="language_modeling"),
    ]
    module = CausalLM(str(tiny_folder))
    (metrics,) = make_trainer().validate(module, datamodule=Batches(batches), verbose=False)
    with torch.no_grad():
        total = sum(answer_log_probs(module.model, batch)[0][0, i].sum() for i, batch in enumerate(batches))
    assert metrics["val/loss"] == pytest.approx(-total.item() / 4)
    assert set(metrics) == {"val/loss", "val/accuracy", "val/f1"}


def test_a_single_candidate_has_a_loss_but_no_accuracy(tiny_folder, batches, answers_batch, make_trainer):
    module = CausalLM(str(tiny_folder))
    (two,) = make_trainer().validate(module, datamodule=Batches(batches), verbose=False)
    (one,) = make_trainer().validate(module, datamodule=Batches([answers_batch], num_classes=1), verbose=False)
    assert set(two) == {"val/loss", "val/accuracy", "val/f1"}
    assert set(one) == {"val/loss"}


def test_one_module_is_fitted_and_tested_and_its_state_is_the_models(tiny_folder, batches, make_trainer):
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    names = set(module.state_dict())
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=Batches(batches))
    trainer.test(module, datamodule=Batches(batches), verbose=False)
    assert set(module.state_dict()) == names == {f"model.{name}" for name in module.model.state_dict()}


def test_predictions_tell_example_scores_and_choice(tiny_folder, batches, make_trainer):
    module = CausalLM(str(tiny_folder))
    first, _ = make_trainer().predict(module, datamodule=Batches(batches))
    assert first["id"].tolist() == [100, 101, 102]
    torch.testing.assert_close(first["scores"], scores_of(module, batches[0]))
    assert torch.equal(first["prediction"], first["scores"].argmax(dim=-1))


def test_the_scheduler_is_stepped_after_every_batch(tiny_folder, batches, make_trainer):
    module = CausalLM(
        str(tiny_folder),
        optimizer=SGD,
        lr_scheduler=partial(LinearLR, start_factor=1.0, end_factor=0.0, total_iters=4),
    )
    recorder = Recorder()
    trainer = make_trainer(max_epochs=1, callbacks=recorder, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(batches * 2))
    assert recorder.lrs == pytest.approx([0.075, 0.05, 0.025, 0.0])


def test_the_precision_of_the_trainer_converts_the_weights(tiny_folder, batches, make_trainer):
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    recorder = Recorder()
    trainer = make_trainer(max_steps=1, precision="bf16-true", callbacks=recorder, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(batches))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert recorder.outputs[0]["loss"].dtype == torch.float32


def test_an_exported_model_scores_the_same_elsewhere(tiny_folder, batches, make_trainer, tmp_path):
    module = CausalLM(str(tiny_folder), optimizer=SGD)
    make_trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=Batches(batches))
    module.export(tmp_path / "export")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        scores = candidate_scores(*answer_log_probs(model, batches[0]))
    assert torch.equal(scores, scores_of(module, batches[0]))
    text = "a plain story"
    assert AutoTokenizer.from_pretrained(tmp_path / "export")(text) == module.tokenizer(text)
    assert list((tmp_path / "export").glob("*.safetensors"))


def test_context_length_is_the_shorter_of_model_and_tokenizer(tiny_folder):
    module = CausalLM(str(tiny_folder))
    assert module.context_length == 64
    module.tokenizer.model_max_length = 32
    assert module.context_length == 32


def test_a_frozen_model_is_refused(tiny_folder, batches, make_trainer):
    module = CausalLM(str(tiny_folder))
    module.model.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="Nothing to train"):
        make_trainer(max_steps=1).fit(module, datamodule=Batches(batches))


def test_dataloaders_without_a_datamodule_are_refused(tiny_folder, batches, make_trainer):
    with pytest.raises(MisconfigurationException, match=r"datamodule with `num_classes`.*NoneType"):
        make_trainer().validate(CausalLM(str(tiny_folder)), DataLoader(batches, batch_size=None))
