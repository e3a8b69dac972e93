"""Rows that bring their own candidates: any number of them, of any length, of which several may be right."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from zolightning.data import MultipleChoice, PromptDataModule

ROWS = [
    {"text": "it was", "options": ["good", "bad", "a plain story told with care", "good"], "right": ["bad", "good"]},
    {"text": "a story told it was", "options": ["plain", "with care"], "right": "with care"},
]
TASK = {
    "name": "own",
    "prompt": "{{ text }}",
    "choices": "options",
    "right_choices": "right",
    "answer": " {{ choice }} told",
}


def test_candidates_of_a_row() -> None:
    task = MultipleChoice(**TASK)
    assert task.render(ROWS[0]) == ("it was", [" good told", " bad told", " a plain story told with care told"])
    assert [task.right(row) for row in ROWS] == [(1, 0), (1,)]
    assert task.fields == {"text", "options", "right"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": "good"}, "field `options` must be a list of texts or numbers, got 'good'"),
        ({"options": ["good", ["bad"]]}, "field `options` must be a list of texts or numbers"),
        ({"options": ["good", "good"]}, "field `options` must have two choices or more"),
        ({"right": ["worse"]}, r"field `right` is \['worse'\], which is not in `options`"),
        ({"right": [["bad"]]}, r"field `right` is \[\['bad'\]\], which is not in `options`"),
        ({"right": {"text": "bad"}}, r"field `right` is \[\{'text': 'bad'\}\], which is not in `options`"),
        ({"right": None}, "field `right` is missing or null"),
    ],
)
def test_a_row_that_does_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[1]) + "\n" + json.dumps(ROWS[0] | change))
    with pytest.raises(ValueError, match=f"train.jsonl, line 2: {message}"):
        PromptDataModule(TASK, str(tmp_path)).check_rows("train")


def test_classes_are_needed_where_classes_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`data\.examples_per_class` needs classes, of which task own has none"):
        PromptDataModule(TASK, str(tmp_path), examples_per_class=2)
    with pytest.raises(ValueError, match=r"`data\.answers` is for tasks with classes; task own makes its own"):
        PromptDataModule(TASK, str(tmp_path), answers=["a", "b"])


def test_any_right_choice_counts_and_the_first_is_trained(
    tmp_path: Path, spectator: L.LightningModule, make_trainer
) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = PromptDataModule(TASK, str(tmp_path), batch_size=2)
    trainer = make_trainer(max_steps=1)
    trainer.fit(spectator, data)
    assert data.largest_batch()[0] == 2
    (training,), (validation,) = list(data.train_dataloader()), list(data.val_dataloader())
    assert training["answer_ids"].shape[1] == 1  # of each row the first right one alone
    order = validation["id"].argsort()
    assert validation["right"][order].tolist() == [[True, True, False], [False, True, False]]
    assert validation["label"][order].tolist() == [1, 1]
    absent = (validation["answer_ids"] >= 0).any(dim=-1)[order]
    assert torch.equal(absent, torch.tensor([[True, True, True], [True, True, False]]))

    data = PromptDataModule(TASK | {"objective": "accuracy"}, str(tmp_path), batch_size=2)
    make_trainer(max_steps=1).fit(spectator, data)
    (training,) = list(data.train_dataloader())
    assert data.largest_batch()[0] == len(training["input_ids"].flatten(0, 1)) == 6  # as many as the most choices
