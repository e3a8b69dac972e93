"""The base class of data modules of tasks: reads and samples rows, and makes batches on each rank."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from zolightning.checks import require_integer
from zolightning.data.batching import Batches, BatchNumbers, LengthBuckets, TrainLoader, even_batches
from zolightning.data.classification import LabelledTask
from zolightning.data.row import Row
from zolightning.data.rows import Rows
from zolightning.data.task import Task
from zolightning.packaged import packaged


class TaskDataModule(L.LightningDataModule):
    """Abstract base of data modules: batches of a task's examples, on each rank.

    Rows come from the Hugging Face hub or from a folder of files, and are sampled as in MeZO: training and validation
    rows from the official training split, test rows from the official validation split. A folder may have a
    ``validation`` of its own.

    Args:
        task: the task.
        path: folder of rows, instead of the hub.
        batch_size: training examples a batch, on each rank.
        eval_batch_size: examples a batch in evaluations; `batch_size` if not given.
        num_train: training rows to sample; the task's number, usually 1000, if not given.
        num_validation: validation rows to sample; the task's number, usually 500, if not given.
        num_test: test rows to sample; the task's number, usually 1000, if not given.
        examples_per_class: sample this many rows of each class for training, and again for validation,
            instead of `num_train` and `num_validation` rows.
        seed: decides which rows are sampled and the order of the training batches.
        fixed_batches: whether every epoch has the same training batches, in an order of its own, for
            `keep_prefix_gib` of the ZerothOrder callback.
        num_workers: processes that build batches. Texts are in memory, so 0 is usually the fastest for them.

    Raises:
        ValueError: if an argument is not what it should be.
    """

    def __init__(
        self,
        task: Task,
        path: str | None,
        *,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_train: int | None = None,
        num_validation: int | None = None,
        num_test: int | None = None,
        examples_per_class: int | None = None,
        seed: int = 0,
        fixed_batches: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.task = task
        self.folder = packaged(path) if path is not None else task.folder
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_train = task.num_train if num_train is None else num_train
        self.num_validation = task.num_validation if num_validation is None else num_validation
        self.num_test = task.num_test if num_test is None else num_test
        self.examples_per_class = examples_per_class
        self.seed = seed
        self.fixed_batches = fixed_batches
        self.num_workers = num_workers
        self._examples: dict[str, list[Any]] = {}  # by the name of their split

        for name in ("batch_size", "eval_batch_size", "num_train", "num_validation", "num_test"):
            require_integer(f"data.{name}", getattr(self, name))
        require_integer("data.num_workers", num_workers, least=0)
        if examples_per_class is not None:
            require_integer("data.examples_per_class", examples_per_class)
            if not isinstance(task, LabelledTask):
                raise ValueError(f"`data.examples_per_class` needs classes, of which task {task.name} has none.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"`data.seed` must be at least 0 and below 2**32, got {seed}.")
        if self.folder is None and task.hub is None:
            raise ValueError(f"`data.path` must be a folder of rows, because task {task.name} names no source.")
        if self.folder is not None and not self.folder.is_dir():
            where = "" if self.folder.is_absolute() else f" in {Path.cwd()}"
            name = "data.path" if self.folder != task.folder else "data.task.folder"
            raise ValueError(f"`{name}` must be a folder of files, got {str(self.folder)!r}, which is not one{where}.")
        self._rows = Rows(
            task,
            self.folder,
            num_train=self.num_train,
            num_validation=self.num_validation,
            num_test=self.num_test,
            examples_per_class=examples_per_class,
            seed=seed,
        )

    @abstractmethod
    def encode(self, name: str, rows: Sequence[Row]) -> list[Any]:
        """Makes examples of the rows of a split, each with a `length`; a ValueError names one that does not fit."""

    @abstractmethod
    def collate(self, for_training: bool) -> Callable[[Sequence[Any]], Any]:
        """The function that makes a batch of examples."""

    @property
    def num_classes(self) -> int | None:
        """How many classes or candidates there are, if they are the same for all rows; 1 if none are compared."""
        return self.task.num_classes

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """What a validation reports of this task, besides the loss."""
        return self.task.validation_metrics

    def prepare_data(self) -> None:
        if self.folder is None:
            self._rows.read("train")

    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", "validate", None):
            for name, rows in self._rows.train_and_validation().items():
                if name == "validation" or stage != "validate":
                    self._examples[name] = self.encode(name, rows)
        if stage in ("test", "predict", None):
            self._examples["test"] = self.encode("test", self._rows.test(labelled=stage != "predict"))

    def check_rows(self, *names: str) -> None:
        """Reads splits ("train", "validation", "test"), and checks their rows as far as is possible without a model.

        So a bad row of the test split, for example, is found before training.

        Raises:
            ValueError: if a row does not fit the task, or a file is missing; says which line or file.
        """
        for name in names:
            for row in self._rows.all_of(name):
                self.check_row(row)

    def check_row(self, row: Row) -> None:
        """Raises ValueError for a row that fits its task but names something, such as an image, that cannot be read."""

    def train_dataloader(self) -> DataLoader[Any]:
        examples = self._examples["train"]
        lengths = [example.length for example in examples]
        order = LengthBuckets(lengths, self.batch_size, self.seed, fixed=self.fixed_batches, **self._replicas())
        batches = Batches(examples, order, self.collate(for_training=True))
        sampler = BatchNumbers(batches, start=self._batches_trained)
        return TrainLoader(batches, batch_size=None, sampler=sampler, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_dataloader("test")

    predict_dataloader = test_dataloader

    def module(self) -> Any:
        """The LightningModule that runs, whatever attributes it has."""
        return self._trainer().lightning_module

    def _eval_dataloader(self, name: str) -> DataLoader[Any]:
        examples = self._examples[name]
        lengths = [example.length for example in examples]
        order = even_batches(lengths, self.eval_batch_size, **self._replicas())
        batches = Batches(examples, order, self.collate(for_training=False))
        return DataLoader(batches, batch_size=None, sampler=BatchNumbers(batches), **self._loading())

    def _loading(self) -> dict[str, Any]:
        """How batches are loaded: for a GPU into pinned memory, so that no copy to it has to be waited for."""
        is_gpu = self._trainer().strategy.root_device.type == "cuda"
        return {"num_workers": self.num_workers, "pin_memory": is_gpu}

    def _replicas(self) -> dict[str, int]:
        """How many ranks share a global batch, and which this is; a strategy may say that all read the same."""
        return self._trainer().distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

    def _batches_trained(self) -> int:
        return self._trainer().fit_loop.epoch_loop.batch_progress.total.processed

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} makes batches for a model: give both to `Trainer.fit` or the like."
            )
        return self.trainer
