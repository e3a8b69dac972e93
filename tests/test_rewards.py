"""Rewards of texts, alone, in processes, and as what a method descends."""

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.training import Records
from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.micro_batches import micro_batches
from zolightning.data import PromptDataModule
from zolightning.models import CausalLM
from zolightning.optim import MeZO
from zolightning.rewards import InProcesses, Pattern

TASK = {"name": "letters", "prompt": "{{ text }}", "references": "answer", "max_new_tokens": 4, "stop": "\n"}


def letters(text: str, references: Sequence[str]) -> float:
    return sum(map(ord, text)) / 1000


def unruly(text: str, references: Sequence[str]) -> float:
    if text == "raise":
        raise KeyError(text)
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    return len(text)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"is {reference}\b", "it is 42.", 1),
        (r"is {reference}\b", "it is 420", 0),
        (r"is {reference}\b", "it is a+b", 1),  # a reference is no pattern
        (r"^\d+$", "17", 1),
        (r"^\d+$", "17 or so", 0),
    ],
)
def test_a_pattern(pattern: str, text: str, expected: int) -> None:
    assert Pattern(pattern)(text, ["42", "a+b"]) == expected


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"`pattern` is no regular expression: .*unterminated"):
        Pattern("(a|b")


def test_a_reward_that_fails_is_zero_and_counted() -> None:
    reward = InProcesses(unruly, processes=2, timeout=2.0)
    texts = ["four", "raise", "hang", "die", "sixsix", "raise"]
    assert reward.all_of([(text, []) for text in texts]) == [4, 0, 0, 0, 6, 0]
    assert reward.failures == {"KeyError": 2, "timeout": 1, "ProcessExpired": 1}
    assert reward("seven77", []) == 7  # in a new process


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
    with pytest.raises(MisconfigurationException, match=r"`model\.reward` has no gradient: name a zeroth-order"):
        make_trainer(max_steps=1).fit(CausalLM(str(folder), reward=letters), data)
    method = ZerothOrder(partial(MeZO, lr=0.1))
    with pytest.raises(MisconfigurationException, match=r"`model\.reward` is of generated texts, and the task"):
        make_trainer(max_steps=1, callbacks=[method]).fit(
            CausalLM(str(folder), reward=letters), PromptDataModule("sentiment")
        )
