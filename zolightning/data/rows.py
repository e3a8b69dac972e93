"""The rows of a task: read, checked, sampled, and written as prompts and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from zolightning.data.conversation import Conversation, Message
from zolightning.data.files import find_rows
from zolightning.data.labelled import LabelledTask
from zolightning.data.sampling import sample, sample_per_class, sample_train_and_validation
from zolightning.data.source import NO_LABEL, Split, read_folder, read_hub
from zolightning.data.task import Task


@dataclass(frozen=True)
class Row:
    """A row in words.

    Args:
        id: Where the row stands in its source, counted from 0.
        where: The same for messages, with the source.
        prompt: The prompt.
        answers: The candidates.
        right: Indices of those that are right, the one to train on first; none if that is not known.
        references: What a generated text is compared with.
        turns: The same for a chat template: the user's turn, or all turns of a conversation.
    """

    id: int
    where: str
    prompt: str
    answers: list[str]
    right: tuple[int, ...]
    references: tuple[str, ...]
    turns: list[Message]


class Rows:
    """Samples rows as MeZO does: for training and validation from the official training split, unless a folder has a
    file for the latter, and for the test from the official validation split.

    Args:
        task: What a row is made into.
        folder: Where files of rows are; the task's data set on the hub if None.
        num_train, num_validation, num_test: How many rows to sample.
        examples_per_class: How many rows of each class to sample for training, and again for validation, instead.
        num_demonstrations: How many of the sampled training rows are not trained on, but stand before the prompt of
            every other row, each with its right answer and an empty line after it.
        seed: Decides which.
    """

    def __init__(
        self,
        task: Task,
        folder: Path | None,
        num_train: int,
        num_validation: int,
        num_test: int,
        examples_per_class: int | None,
        num_demonstrations: int,
        seed: int,
    ) -> None:
        self.task = task
        self.folder = folder
        self.num_train = num_train
        self.num_validation = num_validation
        self.num_test = num_test
        self.examples_per_class = examples_per_class
        self.num_demonstrations = num_demonstrations
        self.seed = seed
        self._fewer: set[str] = set()  # origins of splits of which it was said that they have fewer rows than asked for

    def train_and_validation(self) -> dict[str, list[Row]]:
        """The sampled rows by the name of their split."""
        (train, chosen), (validation, validated) = self._sampled()
        shown = self._write(train, chosen[: self.num_demonstrations])
        return {
            "train": self._write(train, chosen[self.num_demonstrations :], shown),
            "validation": self._write(validation, validated, shown),
        }

    def test(self, labelled: bool) -> list[Row]:
        """The sampled rows to test on, or to predict, where a row need not be `labelled`."""
        split = self.read("test", labelled)
        shown = []
        if self.num_demonstrations:
            (train, chosen), _ = self._sampled()
            shown = self._write(train, chosen[: self.num_demonstrations])
        return self._write(split, self._sample(split, self.num_test), shown)

    def check(self, name: str) -> None:
        """Writes every row of a split, and raises ValueError where one does not fit."""
        split = self.read(name)
        self._write(split, range(len(split)))

    def read(self, name: str, labelled: bool = True) -> Split:
        """Reads "train", "validation" or "test"."""
        if self.folder is not None:
            return read_folder(self.folder, name, self.task, labelled)
        hub = self.task.hub
        assert hub is not None, "a task has a folder or a hub data set"
        return read_hub(hub, hub.test if name == "test" else hub.train, self.task)

    def _sampled(self) -> tuple[tuple[Split, list[int]], tuple[Split, list[int]]]:
        """The splits to train and to validate on, and which rows of them."""
        train = self.read("train")
        if self.folder is not None and find_rows(self.folder, "validation") is not None:
            validation = self.read("validation")
            if self.examples_per_class is None:
                chosen = [self._sample(train, self.num_train), self._sample(validation, self.num_validation)]
            else:
                chosen = [self._per_class(split, self.examples_per_class, 1)[0] for split in (train, validation)]
            return (train, chosen[0]), (validation, chosen[1])
        if self.examples_per_class is not None:
            chosen = self._per_class(train, self.examples_per_class, 2)
        else:
            self._say_if_fewer(train, self.num_train + self.num_validation)
            chosen = list(sample_train_and_validation(train, self.num_train, self.num_validation, self.seed))
        return (train, chosen[0]), (train, chosen[1])

    def _per_class(self, split: Split, count: int, num_parts: int) -> list[list[int]]:
        assert isinstance(self.task, LabelledTask), "other tasks have no classes"
        return sample_per_class(split, count, self.task.labels, num_parts, self.seed)

    def _sample(self, split: Split, count: int) -> list[int]:
        self._say_if_fewer(split, count)
        return sample(split, count, self.seed)

    def _say_if_fewer(self, split: Split, count: int) -> None:
        """Once, and not of the rows that come with a task, whose number anybody can know."""
        if len(split) < count and self.folder != self.task.folder and split.origin not in self._fewer:
            self._fewer.add(split.origin)
            rank_zero_info(f"{split.origin}: {len(split)} rows, fewer than the {count} asked for; all are used.")

    def _write(self, split: Split, chosen: Sequence[int], shown: Sequence[Row] = ()) -> list[Row]:
        """Rows in words, those that are `shown` before each of them."""
        before = "".join(f"{row.prompt}{row.answers[row.right[0]]}\n\n" for row in shown)
        turns = [
            turn
            for row in shown
            for turn in (*row.turns, Message(role="assistant", content=row.answers[row.right[0]].strip()))
        ]
        rows = []
        for index in chosen:
            row = self._row(split, index)
            rows.append(replace(row, prompt=before + row.prompt, turns=[*turns, *row.turns]))
        return rows

    def _row(self, split: Split, index: int) -> Row:
        row, where = split.row(index), split.where(index)
        try:
            prompt, answers = self.task.render(row)
            labelled = split.candidates[index] != NO_LABEL
            right = (self.task.right(row) or ()) if labelled else ()
            references = self.task.reference_texts(row) if labelled else ()
            turns = self.task.turns(row) if isinstance(self.task, Conversation) else []
        except ValueError as error:
            raise ValueError(f"Task {self.task.name}, {where}: {error}.") from None
        turns = turns or [Message(role="user", content=prompt)]
        return Row(split.ids[index], where, prompt, answers, right, references, turns)
