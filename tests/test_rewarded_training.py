"""Rewards as what a method descends, and what validations report of them."""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from training import Records
from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.micro_batches import micro_batches
from zolightning.data import PromptDataModule
from zolightning.models import CausalLM
from zolightning.models.generation import Decoding
from zolightning.optim import MeZO
from zolightning.optim.estimators import ZScores
from zolightning.rewards import Countdown, InProcesses

TASK = {"name": "letters", "prompt": "{{ text }}", "references": "answer", "max_new_tokens": 4, "stop": "\n"}


def letters(text: str, references: Sequence[str]) -> float:
    return sum(map(ord, text)) / 1000


def fails(text: str, references: Sequence[str]) -> float:
    raise KeyError("a reason")


@pytest.fixture
def rewarded(write_tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, PromptDataModule]:
    rows = [{"text": f"a{index}", "answer": "e"} for index in range(6)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_tiny_model(tmp_path / "model", "llama"), PromptDataModule(TASK, str(tmp_path), batch_size=3)


def test_the_loss_is_minus_the_mean_reward_of_what_moved_weights_write(
    rewarded: tuple[Path, PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    """The texts of both evaluations are those of a copy whose weights are moved along the direction of the update."""
    folder, data = rewarded
    module, lr, eps = CausalLM(str(folder), reward=letters), 0.1, 0.3
    written: list[list[str]] = []
    generate = module.generate
    module.generate = lambda *args: written.append(generate(*args)) or written[-1]
    steps: list[tuple[dict, list[list[str]], dict, dict]] = []

    class Steps(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: CausalLM, batch: dict, batch_idx: int) -> None:
            self.before = copy.deepcopy(pl_module.model.state_dict())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            assert outputs["num_terms"] == len(batch["id"]) == 3
            # the first step evaluates more often, to find where weights are read
            steps.append((batch, written[-2:], self.before, copy.deepcopy(pl_module.model.state_dict())))

    records = Records()
    method = ZerothOrder(partial(MeZO, lr=lr, eps=eps))
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[method, Steps(), records])
    trainer.fit(module, data)

    copied, moved = CausalLM(str(folder)), 0
    for number, (batch, of_both_signs, before, after) in enumerate(steps):
        (projected_grad,) = records.records[number].projected_grads
        losses = []
        for sign, texts in zip((1, -1), of_both_signs, strict=True):
            if projected_grad:
                direction = {name: (before[name] - after[name]) / (lr * projected_grad) for name in before}
                copied.model.load_state_dict({name: before[name] + sign * eps * direction[name] for name in before})
                assert texts == copied.generate(batch, data.generation)
                moved += 1
            losses.append(-sum(letters(text, ()) for text in texts) / len(texts))
        assert projected_grad == pytest.approx((losses[0] - losses[1]) / (2 * eps))
    assert moved
    assert "train/reward" in trainer.logged_metrics


def test_failed_rewards_of_a_step_are_logged(
    rewarded: tuple[Path, PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    """Of its first evaluation, so that a resumed run has the same curve."""
    folder, data = rewarded
    module = CausalLM(str(folder), reward=InProcesses(fails, processes=1))
    trainer = make_trainer(max_steps=2, limit_val_batches=0, callbacks=[ZerothOrder(partial(MeZO, lr=0.1))])
    with pytest.warns(UserWarning, match="A reward failed and counts as 0: KeyError: 'a reason'"):
        trainer.fit(module, data)
    assert trainer.logged_metrics["train/failed_rewards"] == 3
    assert module.reward.failures["KeyError"] > 2 * 2 * 3


@pytest.mark.filterwarnings("error:.*evaluations_per_forward")
@pytest.mark.parametrize("micro_batch_size", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_members_that_share_forwards_train_the_same_weights(
    rewarded: tuple[Path, PromptDataModule], make_trainer: Callable[..., L.Trainer], micro_batch_size: int | None
) -> None:
    """To the bit: rewards of equal texts are equal."""
    folder, data = rewarded

    def fit(size: int) -> tuple[dict[str, torch.Tensor], list[int], list[float]]:
        module, rows, records = CausalLM(str(folder), reward=letters), [], Records()
        method = partial(MeZO, lr=0.05, eps=0.2, num_queries=5, estimator=ZScores())
        callback = ZerothOrder(method, evaluations_per_forward=size, micro_batch_size=micro_batch_size)
        layer = module.model.model.layers[0]
        layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        make_trainer(max_steps=3, limit_val_batches=0, callbacks=[callback, records]).fit(module, data)
        return module.state_dict(), rows, [loss for record in records.records for loss in record.losses]

    (alone, few, losses), (together, many, same_losses) = fit(1), fit(5)
    assert losses == same_losses and len(set(losses)) > 5
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    assert len(many) < len(few) and max(many) == 5 * max(few)


def sampled_run(
    folder: Path, data: PromptDataModule, make_trainer: Callable[..., L.Trainer], steps: int, **options: Any
) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """The texts of each evaluation of the last step, and the weights after it."""
    decoding = options.pop("decoding", Decoding(do_sample=True, top_k=20, temperature=2.0))
    module = CausalLM(str(folder), reward=letters, decoding=decoding)
    written: list[list[str]] = []
    generate = module.generate
    module.generate = lambda *args: written.append(generate(*args)) or written[-1]
    callbacks = [ZerothOrder(partial(MeZO, lr=0.1, eps=options.pop("eps", 0.1)))]
    trainer = make_trainer(max_steps=steps, limit_val_batches=0, callbacks=callbacks)
    trainer.fit(module, data, ckpt_path=options.get("resume"))
    if "save" in options:
        trainer.save_checkpoint(options["save"])
    return written[-2:], module.state_dict()


def test_sampled_texts_are_a_function_of_seed_and_step(
    rewarded: tuple[Path, PromptDataModule], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """Both evaluations draw the same numbers, the next step others, and a resumed run those of one that went on."""
    run = partial(sampled_run, *rewarded, make_trainer)
    (plus, minus), _ = run(1, eps=1e-9)
    assert plus == minus and len(set(plus)) > 1
    assert run(2, eps=1e-9)[0] != [plus, minus] != run(1, eps=1e-9, decoding=None)[0]
    torch.rand(5)  # whatever was drawn before
    texts, weights = run(3)
    run(2, save=tmp_path / "saved.ckpt")
    torch.rand(3)
    resumed_texts, resumed = run(3, resume=tmp_path / "saved.ckpt")
    assert resumed_texts == texts
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_validation_reports_the_reward(
    rewarded: tuple[Path, PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    folder, data = rewarded
    module = CausalLM(str(folder), reward=letters)
    (metrics,) = make_trainer().validate(module, data, verbose=False)
    texts = [text for batch in data.val_dataloader() for text in module.generate(batch, data.generation)]
    assert metrics["val/reward"] == pytest.approx(sum(letters(text, ()) for text in texts) / 6)
    assert set(metrics) == set(module.validation_metrics(data))


def test_micro_batches_keep_each_text_with_its_references() -> None:
    references = np.empty(5, dtype=object)
    references[:] = [(str(index),) for index in range(5)]
    parts = micro_batches({"label": torch.arange(5), "references": references}, 2)
    assert [part["references"].tolist() for part in parts] == [[("0",), ("1",)], [("2",), ("3",)], [("4",)]]


def test_what_a_reward_needs(rewarded: tuple[Path, PromptDataModule], make_trainer: Callable[..., L.Trainer]) -> None:
    folder, data = rewarded
    with pytest.raises(ValueError, match=r"Task letters, .*train.jsonl, line \d: a reference of Countdown must be"):
        make_trainer(max_steps=1).fit(CausalLM(str(folder), reward=Countdown()), data)
    with pytest.raises(MisconfigurationException, match=r"`model\.reward` has no gradient: name a zeroth-order"):
        make_trainer(max_steps=1).fit(CausalLM(str(folder), reward=letters), data)
    method = ZerothOrder(partial(MeZO, lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"`model\.reward` is for generated texts, but the task"):
        make_trainer(max_steps=1, callbacks=[method]).fit(
            CausalLM(str(folder), reward=letters), PromptDataModule("sentiment")
        )
