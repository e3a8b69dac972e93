"""What the data module refuses, replaces and says."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from pathlib import Path

import lightning as L
import pytest

from zolightning.data import PromptDataModule


@pytest.mark.parametrize(
    ("max_length", "context_length", "limit"),
    [(30, 128, "30 tokens (`data.max_length`)"), (300, 20, "20 tokens (the model's context length)")],
)
def test_cut_prompts_are_counted(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
    max_length: int,
    context_length: int,
    limit: str,
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20)), num_validation=5, max_length=max_length, batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(max_steps=1).fit(make_spectator(context_length=context_length), datamodule=data)
    batch = next(iter(data.train_dataloader()))
    num_cut = sum(example.truncated for example in data._examples["train"])
    expected = f"{num_cut} of 15 prompts of the train split were cut to {limit}."
    assert [str(warning.message) for warning in caught].count(expected) == 1
    assert 0 < num_cut < 15
    assert batch["input_ids"].shape[-1] <= int(limit.split()[0])


def test_a_model_without_a_limit(
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    make_spectator: Callable[..., L.LightningModule],
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20)), num_validation=5)
    make_trainer(max_steps=1).fit(make_spectator(context_length=None), datamodule=data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`data.batch_size` must be an integer, at least 1, got 0"),
        ({"eval_batch_size": -1}, "`data.eval_batch_size` must be an integer, at least 1, got -1"),
        ({"num_train": 0}, "`data.num_train` must be an integer, at least 1"),
        ({"num_validation": 0}, "`data.num_validation` must be an integer, at least 1"),
        ({"num_test": 0}, "`data.num_test` must be an integer, at least 1"),
        ({"examples_per_class": 0}, "`data.examples_per_class` must be an integer, at least 1"),
        ({"max_length": 0}, "`data.max_length` must be an integer, at least 1"),
        ({"pad_to_multiple_of": 0}, "`data.pad_to_multiple_of` must be an integer, at least 1"),
        ({"num_workers": -1}, "`data.num_workers` must be an integer, at least 0"),
        ({"seed": -1}, r"`data.seed` must be at least 0 and below 2\*\*32, got -1"),
        ({"task": "sst-2"}, "`data.task` must be one of"),
        ({"task": {"prompt": "x"}}, "`data.task`: a task needs the key `name`, `labels`, `answers`"),
        ({"task": {"promt": "x"}}, "`data.task`: a task has no key `promt`"),
        ({"task": {"name": "own", "text": "body"}}, r"`data.task`: `text` must name a field, such as {{ text }}, got"),
        ({"path": "no/such/folder"}, "`data.path` must be a folder of files, got 'no/such/folder'"),
        ({"prompt": "{{"}, "`data.prompt`: `prompt` is not a Jinja2 template"),
        ({"answers": ["a", "b", "c"]}, "`data.answers`: `labels` must name one label for each of the 3 `answers`"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{"task": "sentiment", **arguments})


def test_sizes_are_the_tasks_unless_given(tmp_path: Path) -> None:
    task = {"name": "mine", "prompt": "{{ x }}", "answers": ["a", "b"], "labels": [0, 1], "folder": str(tmp_path)}
    data = PromptDataModule(task | {"num_train": 7, "num_test": 5}, num_test=3)
    assert (data.num_train, data.num_validation, data.num_test) == (7, 500, 3)
    assert data.folder == tmp_path


def test_a_task_without_a_source(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("name: mine\nprompt: '{{ x }}'\nanswers: [a, b]\nlabels: [0, 1]\n")
    with pytest.raises(ValueError, match=r"`data.path` must be a folder of rows, because task mine names no source"):
        PromptDataModule(str(task))


def test_a_row_that_cannot_be_encoded_is_named(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    folder = write_rows(test=[{"sentence": "soup", "label": 0}])
    data = PromptDataModule("sst2", str(folder), answers=[" great", " great"])
    with pytest.raises(ValueError, match=r"Task sst2, .*test.jsonl, line 1: the tokenizer tiny gives two"):
        make_trainer().test(spectator, data, verbose=False)


def test_the_module_must_say_how_to_tokenize(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(test=3)))
    with pytest.raises(RuntimeError, match=r"PromptDataModule makes batches for a model: give both to `Trainer.fit`"):
        data.setup("test")
    del spectator.context_length
    with pytest.raises(TypeError, match=r"Spectator must have .*`context_length` is missing"):
        make_trainer().test(spectator, data, verbose=False)


def test_a_validation_file_under_another_name_is_not_passed_over(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = PromptDataModule("sst2", str(write_rows(train=20, val=5)), num_validation=5)
    with pytest.raises(
        ValueError,
        match=r"no file validation\.jsonl, .csv or .parquet, but found val\.jsonl: rename it to validation\.jsonl",
    ):
        make_trainer(max_epochs=1).fit(spectator, datamodule=data)


def test_rows_without_labels_can_be_predicted(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    folder = write_rows(test=[{"sentence": f"dish {index}"} for index in range(5)])
    data = PromptDataModule("sst2", str(folder))
    assert sorted(chain.from_iterable(make_trainer().predict(spectator, data))) == list(range(5))
    assert data.sample_text().endswith("It was")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: field `label` is missing"):
        make_trainer().test(spectator, data)


def test_files_are_checked_without_a_model(write_rows: Callable[..., Path]) -> None:
    folder = write_rows(train=3, test=[{"sentence": "soup", "label": 1}, {"sentence": ["rain"], "label": 0}])
    data = PromptDataModule("sst2", str(folder))
    data.check_rows("train")
    with pytest.raises(ValueError, match=r"Task sst2, .*test\.jsonl, line 2: .*field `sentence` is \['rain'\]"):
        data.check_rows("train", "test")
    with pytest.raises(ValueError, match=r"validation\.jsonl, .csv or .parquet does not exist"):
        data.check_rows("validation")


@pytest.mark.parametrize(
    ("num_train", "message"),
    [
        (1000, "20 rows, fewer than the 1005 asked for; all are used."),
        (8, "13 of 20 rows are drawn (`data.num_train`, ...)."),
    ],
)
def test_how_many_rows_are_used_is_said_once(
    num_train: int,
    message: str,
    write_rows: Callable[..., Path],
    make_trainer: Callable[..., L.Trainer],
    spectator: L.LightningModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("zolightning.data.rows.rank_zero_info", messages.append)
    folder = write_rows(train=20)
    data = PromptDataModule("sst2", str(folder), num_train=num_train, num_validation=5, batch_size=4)
    make_trainer().validate(spectator, data, verbose=False)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    assert messages == [f"{folder / 'train.jsonl'}: {message}"]
    spectator.context_length = None
    make_trainer().validate(spectator, PromptDataModule("sentiment"), verbose=False)
    assert not any("fewer" in later for later in messages[1:])


def test_that_rows_say_nothing_is_said_once(
    tmp_path: Path,
    make_trainer: Callable[..., L.Trainer],
    spectator: L.LightningModule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("zolightning.data.rows.rank_zero_warn", messages.append)
    (tmp_path / "train.csv").write_text('text,label\nrain,0\n"",1\nsun,1\n" ",0\n')
    (tmp_path / "validation.csv").write_text("text,label\nrain,0\n")
    task = {"name": "own", "prompt": "{{ text }} It was", "answers": [" bad", " good"], "labels": [0, 1]}
    data = PromptDataModule(task, str(tmp_path), batch_size=1)
    for _ in range(2):
        make_trainer(max_steps=1, limit_val_batches=0).fit(spectator, data)
    (message,) = messages
    assert "train.csv: 2 of 4 rows are blank in `text`, the first of them row 1: remove" in message


def test_a_token_for_padding_that_the_model_lacks_is_replaced(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    spectator.tokenizer = deepcopy(spectator.tokenizer)
    spectator.num_embeddings = len(spectator.tokenizer)
    spectator.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    data = PromptDataModule("sst2", str(write_rows(train=20, test=5)), num_validation=5, batch_size=4)
    make_trainer(max_epochs=1).fit(spectator, datamodule=data)
    assert max(batch["input_ids"].max() for batch in data.train_dataloader()) < spectator.num_embeddings

    spectator.num_embeddings = 3
    with pytest.raises(ValueError, match=r"test\.jsonl, line 3: the token '.*' has the id"):
        make_trainer().test(spectator, data)
