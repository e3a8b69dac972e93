"""The rows of a task: read, checked, sampled, and given demonstrations."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zolightning.data.classification import CandidatesTask, LabelledTask
from zolightning.data.files import find_rows
from zolightning.data.language_modeling import Conversation, Message
from zolightning.data.row import Row
from zolightning.data.sampling import sample, sample_per_class, sample_train_and_validation
from zolightning.data.source import NO_LABEL, Split, read_folder, read_hub
from zolightning.data.task import Task
from zolightning.messages import counted
from zolightning.rank_zero import rank_zero_info, rank_zero_warn


class Sampled(NamedTuple):
    """Some rows of a split, by their indices."""

    split: Split
    indices: list[int]


@dataclass
class Rows:
    """Samples rows as MeZO does: for training and validation from the official training split, unless a folder has a
    file for the latter, and for the test from the official validation split.

    Its fields are arguments of :class:`~zolightning.data.PromptDataModule`, except `folder`, the folder of the files of
    rows, or None for the task's data set on the hub. Demonstrations of each row are drawn from the training split as in
    MeZO, or with `examples_per_class` from the sampled rows, as in LM-BFF (Gao et al., 2021, arXiv:2012.15723).
    """

    task: Task
    folder: Path | None
    num_train: int
    num_validation: int
    num_test: int
    examples_per_class: int | None
    seed: int
    num_demonstrations: int = 0
    demonstrations_per_row: bool = False

    # Origins of splits whose number of used rows has been reported
    _counted: set[str] = field(default_factory=set, init=False)
    # Origins of splits, each with a number of rows, whose blank rows have been reported
    _warned: set[tuple[str, int]] = field(default_factory=set, init=False)

    def train_and_validation(self) -> dict[str, list[Row]]:
        """The sampled rows by the name of their split."""
        train, validation = self._sampled()
        split, trained = train.split, train.indices[0 if self.demonstrations_per_row else self.num_demonstrations :]
        if isinstance(self.task, LabelledTask) and len(trained) > 1 == len({split.labels[i] for i in trained}):
            label = self.task.labels[split.labels[trained[0]]]
            rank_zero_warn(f"{split.origin}: all {len(trained)} training rows have the label {label!r}.")
        return {"train": self._write(Sampled(split, trained), train), "validation": self._write(validation, train)}

    def test(self, labelled: bool) -> list[Row]:
        """The sampled rows to test on, or to predict for, in which case they need not be `labelled`."""
        test = self._sample(self.read("test", labelled), self.num_test)
        return self._write(test, self._sampled()[0] if self.num_demonstrations else test)

    def all_of(self, name: str) -> Iterator[Row]:
        """All rows of a split; raises ValueError for one that does not fit the task."""
        split = self.read(name)
        return (self._row(split, index) for index in range(len(split)))

    def read(self, name: str, labelled: bool = True) -> Split:
        """Reads "train", "validation" or "test"."""
        if self.folder is not None:
            return read_folder(self.folder, name, self.task, labelled)
        hub = self.task.hub
        assert hub is not None, "a task has a folder or a hub data set"
        return read_hub(hub, hub.test if name == "test" else hub.train, self.task)

    def _sampled(self) -> tuple[Sampled, Sampled]:
        """The rows to train and to validate on."""
        train = self.read("train")
        if self.folder is not None and find_rows(self.folder, "validation") is not None:
            validation = self.read("validation")
            if self.examples_per_class is None:
                return self._sample(train, self.num_train), self._sample(validation, self.num_validation)
            ((chosen,), (validated,)) = (self._per_class(s, self.examples_per_class, 1) for s in (train, validation))
            return Sampled(train, self._classes_in_turn(chosen)), Sampled(validation, validated)
        if self.examples_per_class is not None:
            chosen, validated = self._per_class(train, self.examples_per_class, 2)
            return Sampled(train, self._classes_in_turn(chosen)), Sampled(train, validated)
        self._say_how_many(train, self.num_train + self.num_validation)
        chosen, validated = sample_train_and_validation(train, self.num_train, self.num_validation, self.seed)
        return Sampled(train, chosen), Sampled(train, validated)

    def _per_class(self, split: Split, count: int, num_parts: int) -> list[list[int]]:
        assert isinstance(self.task, LabelledTask), "other tasks have no classes"
        return sample_per_class(split, count, self.task.labels, num_parts, self.seed)

    def _classes_in_turn(self, chosen: list[int]) -> list[int]:
        """Reorders training rows so that the first ones, used as demonstrations, have equally many of each class."""
        if self.examples_per_class is None or not self.num_demonstrations:
            return chosen
        return [
            index for number in range(self.examples_per_class) for index in chosen[number :: self.examples_per_class]
        ]

    def _sample(self, split: Split, count: int) -> Sampled:
        self._say_how_many(split, count)
        return Sampled(split, sample(split, count, self.seed))

    def _say_how_many(self, split: Split, count: int) -> None:
        """Says once if a split has more rows than asked for, or fewer, unless these come with a task."""
        if split.origin in self._counted:
            return
        self._counted.add(split.origin)
        if len(split) > count:
            rank_zero_info(
                f"{split.origin}: {count} of {counted(len(split), 'row')} are drawn (`data.num_train`, ...)."
            )
        elif len(split) < count and self.folder != self.task.folder:
            rank_zero_info(
                f"{split.origin}: {counted(len(split), 'row')}, fewer than the {count} asked for; all are used."
            )

    def _write(self, chosen: Sampled, train: Sampled) -> list[Row]:
        """The chosen rows as text, each with demonstrations from the sampled training rows."""
        rows = [self._row(chosen.split, index) for index in chosen.indices]
        self._warn_of_blanks(chosen.split, rows)
        if not self.num_demonstrations:
            return rows
        there = len(train.split if self.demonstrations_per_row else train.indices)
        if there < self.num_demonstrations:
            rows_are = counted(there, "training row is", "training rows are")
            raise ValueError(f"`data.num_demonstrations` is {self.num_demonstrations}, but only {rows_are} there.")
        if not self.demonstrations_per_row:
            shown = [self._row(train.split, index) for index in train.indices[: self.num_demonstrations]]
            return [row.after(shown) for row in rows]
        # the seeds of MeZO's `sample_train_sets`
        seeds = np.random.RandomState(self.seed).randint(0, 10_000, len(rows)).tolist()
        written: dict[int, Row] = {}
        for place, (index, seed) in enumerate(zip(chosen.indices, seeds, strict=True)):
            others = self._drawn(train, seed, index if chosen.split is train.split else None)
            written |= {other: self._row(train.split, other) for other in others if other not in written}
            rows[place] = rows[place].after([written[other] for other in others])
        return rows

    def _warn_of_blanks(self, split: Split, rows: list[Row]) -> None:
        """Warns of rows whose fields are all blank, such as those of a CSV file with an empty cell."""
        names = sorted(self.task.template_fields)
        blank = [row.id for row in rows if names and not "".join(str(row.fields[name]) for name in names).strip()]
        if blank and (split.origin, len(rows)) not in self._warned:
            self._warned.add((split.origin, len(rows)))
            rank_zero_warn(
                f"{split.origin}: {len(blank)} of {counted(len(rows), 'row')} are blank in "
                f"{', '.join(f'`{name}`' for name in names)}, the first of them {split.unit} "
                f"{min(blank) + (split.unit == 'line')}: remove them if that is not intended."
            )

    def _drawn(self, train: Sampled, seed: int, own: int | None) -> list[int]:
        """The training rows to show before a row; `own` is its own index, left out, if it is a training row."""
        if self.examples_per_class is None:
            drawn = sample(train.split, self.num_demonstrations + 1, seed)
            return [other for other in drawn if other != own][: self.num_demonstrations]
        by_class: dict[int, list[int]] = {candidate: [] for candidate in range(self.task.num_classes or 0)}
        for other in np.random.RandomState(seed).permutation(train.indices).tolist():
            if other != own:
                by_class[train.split.labels[other]].append(other)
        return [other for members in by_class.values() for other in members[: self.num_demonstrations // len(by_class)]]

    def _row(self, split: Split, index: int) -> Row:
        row, where = split.row(index), split.where(index)
        try:
            prompt, answers = self.task.render(row)
            labelled = split.labels[index] != NO_LABEL
            right = (self.task.right(row) or ()) if labelled else ()
            references = self.task.reference_texts(row) if labelled else ()
            turns = self.task.turns(row) if isinstance(self.task, Conversation) else []
            content_free = self.task.render_content_free(row) if isinstance(self.task, CandidatesTask) else None
        except ValueError as error:
            raise ValueError(f"Task {self.task.name}, {where}: {error}.") from None
        turns = turns or [Message(role="user", content=prompt)]
        return Row(split.ids[index], where, prompt, answers, right, references, turns, row, (), content_free)
