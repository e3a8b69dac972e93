"""Prompts and answers for a Trainer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import lightning as L
from torch.utils.data import DataLoader

from zolightning.data.batching import Batches, BatchNumbers, LengthBuckets, TrainLoader, even_batches
from zolightning.data.encoding import Batch, Example, check_tokens, collate
from zolightning.data.examples import Calibration, example_of, warn_of_cuts
from zolightning.data.generation import Generation
from zolightning.data.labelled import LabelledTask
from zolightning.data.rows import Row, Rows
from zolightning.data.task import PromptTask
from zolightning.data.task_files import chosen_task
from zolightning.packaged import packaged


class PromptDataModule(L.LightningDataModule):
    """Batches of prompts with candidate answers, tokenized for the model that the Trainer runs.

    Rows come from the Hugging Face hub or from a folder of files, and are sampled as in MeZO: training
    and validation rows from the official training split, test rows from the official validation split. A
    folder may have a file ``validation`` of its own.

    The LightningModule must have a `tokenizer` and a `context_length`. It may have a method `encode`, which is called
    with what :func:`~zolightning.data.examples.example_of` is, but for the tokenizer, and in its place; and a
    `padding_side`, of prompts, which is "left" otherwise.

    Args:
        task: Name of a task of ``configs/tasks``, the path of a YAML file like those there, or the fields of a
            :class:`~zolightning.data.Task` themselves.
        path: Folder with the files ``train``, ``test`` and optionally ``validation``, each as JSON lines (``.jsonl``,
            or compressed), ``.csv``, ``.tsv`` or ``.parquet``, instead of the hub.
        batch_size: Training examples a batch, on each rank.
        eval_batch_size: Examples a batch otherwise; `batch_size` if not given.
        num_train: Training rows to sample; the task's number, mostly 1000, if not given.
        num_validation: Validation rows to sample; the task's number, mostly 500, if not given.
        num_test: Test rows to sample; the task's number, mostly 1000, if not given.
        examples_per_class: Sample this many rows of each class for training, and again for validation,
            instead of `num_train` and `num_validation` rows.
        seed: Decides which rows are sampled and the order of the training batches.
        max_length: Tokens of a prompt with its answer, at most; longer prompts lose their beginning. The
            model's context length is a limit in any case.
        fixed_batches: Whether every epoch has the same training batches, in an order of its own, for
            `keep_prefix_gib` of the ZerothOrder callback.
        pad_to_multiple_of: What the length of a training batch is a multiple of, so that there are few lengths, for
            `cuda_graphs` of the ZerothOrder callback.
        num_workers: Processes that build batches. The rows are in memory, so 0 is mostly the fastest.
        num_demonstrations: In-context examples: training rows, which are not trained on then, that stand with their
            right answers before every prompt, as many of them as fit. MeZO shows 32.
        demonstrations_per_row: Draw others for every row, as MeZO does without ``--train_set_seed``.
        calibration: Compare candidates by how much the prompt raises their likelihood over the task's
            `content_free_prompt`, which stands alone (`zero_shot`, MeZO's ``--sfc``) or after the demonstrations
            (`in_context`, ``--icl_sfc``). For accuracies and predictions; losses stay as they are.
        chat: Whether to write prompts as the user's turn in the tokenizer's chat template.
        prompt: Jinja2 template instead of the task's.
        answers: Jinja2 templates of the candidates instead of the task's, in the same order.

    Example:
        >>> data = PromptDataModule("sst2", num_train=512)
        >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP

    Raises:
        ValueError: An argument is not what it should be.
    """

    def __init__(
        self,
        task: str | dict[str, Any],
        path: str | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_train: int | None = None,
        num_validation: int | None = None,
        num_test: int | None = None,
        examples_per_class: int | None = None,
        seed: int = 0,
        max_length: int = 2048,
        fixed_batches: bool = False,
        pad_to_multiple_of: int = 1,
        num_workers: int = 0,
        num_demonstrations: int = 0,
        demonstrations_per_row: bool = False,
        calibration: Calibration | None = None,
        chat: bool = False,
        prompt: str | None = None,
        answers: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.task = chosen_task(task, prompt, answers)
        self.folder = packaged(path) if path is not None else self.task.folder
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_train = self.task.num_train if num_train is None else num_train
        self.num_validation = self.task.num_validation if num_validation is None else num_validation
        self.num_test = self.task.num_test if num_test is None else num_test
        self.examples_per_class = examples_per_class
        self.seed = seed
        self.max_length = max_length
        self.fixed_batches = fixed_batches
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_workers = num_workers
        self.calibration = calibration
        self.chat = chat
        self._examples: dict[str, list[Example]] = {}

        counts = ("batch_size", "eval_batch_size", "num_train", "num_validation", "num_test", "max_length")
        for name in (*counts, "pad_to_multiple_of"):
            _check_at_least(1, name, getattr(self, name))
        if examples_per_class is not None:
            _check_at_least(1, "examples_per_class", examples_per_class)
            if not isinstance(self.task, LabelledTask):
                raise ValueError(f"`data.examples_per_class` needs classes, of which task {self.task.name} has none.")
        _check_at_least(0, "num_workers", num_workers)
        _check_at_least(0, "num_demonstrations", num_demonstrations)
        if num_demonstrations and not isinstance(self.task, PromptTask):
            raise ValueError(f"`data.num_demonstrations` needs prompts and answers; task {self.task.name} has none.")
        if num_demonstrations and examples_per_class is not None:
            raise ValueError("`data.num_demonstrations` and `data.examples_per_class` exclude each other.")
        if num_demonstrations >= self.num_train:
            raise ValueError(
                f"`data.num_demonstrations` {num_demonstrations} leaves nothing of `data.num_train` {self.num_train}."
            )
        if demonstrations_per_row and not num_demonstrations:
            raise ValueError("`data.demonstrations_per_row` is True, and `data.num_demonstrations` is 0.")
        if calibration is not None and calibration not in get_args(Calibration):
            raise ValueError(f"`data.calibration` must be one of {get_args(Calibration)}, got {calibration!r}.")
        if calibration is not None and getattr(self.task, "content_free_prompt", None) is None:
            raise ValueError(
                f"`data.calibration` needs a `content_free_prompt`, of which task {self.task.name} has none."
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"`data.seed` must be at least 0 and below 2**32, got {seed}.")
        if self.folder is None and self.task.hub is None:
            raise ValueError(f"`data.path` must be a folder of rows, because task {self.task.name} names no source.")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"`data.path` must be a folder of files, got {str(self.folder)!r}, which is none.")
        self._rows = Rows(
            self.task,
            self.folder,
            self.num_train,
            self.num_validation,
            self.num_test,
            examples_per_class,
            num_demonstrations,
            demonstrations_per_row,
            seed,
        )

    @property
    def num_classes(self) -> int | None:
        """How many candidates there are, if they are the same for all rows; 1 if none are compared."""
        return self.task.num_classes

    @property
    def generation(self) -> Generation | None:
        """How answers are generated, if the task says so."""
        return self.task if isinstance(self.task, Generation) else None

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """What a validation reports of this task, beside the loss."""
        return self.task.validation_metrics

    def prepare_data(self) -> None:
        if self.folder is None:
            self._rows.read("train")

    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", "validate", None):
            for name, rows in self._rows.train_and_validation().items():
                if name == "validation" or stage != "validate":
                    self._examples[name] = self._encode(name, rows)
        if stage in ("test", "predict", None):
            self._examples["test"] = self._encode("test", self._rows.test(labelled=stage != "predict"))

    def check_rows(self, *names: str) -> None:
        """Reads splits and fills in the templates of all their rows, which needs no model and takes a moment.

        So what is wrong with the rows of a test is known before training, for one.

        Args:
            names: Of "train", "validation" and "test".

        Raises:
            ValueError: A row does not fit the task, or a file is missing; says which line or file.
        """
        for name in names:
            self._rows.check(name)

    def train_dataloader(self) -> DataLoader[Batch]:
        examples = self._examples["train"]
        lengths = [example.length for example in examples]
        order = LengthBuckets(lengths, self.batch_size, self.seed, fixed=self.fixed_batches, **self._replicas())
        only_gold = self.task.objective == "language_modeling"
        with_prompts = self.generation is not None  # rewards are of generated texts
        collate = self._collate(only_gold, self.pad_to_multiple_of, with_prompts)
        batches = Batches(examples, order, collate)
        sampler = BatchNumbers(batches, start=self._batches_trained)
        return TrainLoader(batches, batch_size=None, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._eval_dataloader("test")

    def largest_batch(self, num_examples: int | None = None) -> tuple[int, int, int]:
        """What a forward pass over `num_examples` training examples, or a whole batch, reads at most.

        Returns:
            Rows, tokens a row, and at how many places of it logits are read: 1 where all answers are single tokens,
            else one more than the longest answer has, or with a decoder as many as all of its answers have.
        """
        examples = self._examples["train"]
        rows = min(self.batch_size if num_examples is None else num_examples, self.batch_size, len(examples))
        longest_answer = max(len(answer) for example in examples for answer in example.answer_ids)
        choices = 1 if self.task.objective == "language_modeling" else self.num_classes or 1
        if examples[0].has_decoder:
            tokens = max(len(example.prompt_ids) for example in examples)
            return rows, tokens + -tokens % self.pad_to_multiple_of, choices * longest_answer
        is_single = longest_answer == 1
        tokens = max(example.length for example in examples) - is_single
        tokens += -tokens % self.pad_to_multiple_of
        return rows * (1 if is_single else choices), tokens, 1 if is_single else longest_answer + 1

    def sample_text(self) -> str:
        """Returns an example to look at: the prompt, then the right answer in double brackets."""
        examples = next(iter(self._examples.values()), None)
        if examples is None:
            raise RuntimeError("There is no example before `setup`.")
        return examples[0].text

    def _encode(self, name: str, rows: Sequence[Row]) -> list[Example]:
        module = self._module()
        for attribute in ("tokenizer", "context_length"):
            if not hasattr(module, attribute):
                raise TypeError(
                    f"PromptDataModule tokenizes for the model: {type(module).__name__} must have a `tokenizer` "
                    f"and a `context_length` (the most tokens it can read, or None); `{attribute}` is missing."
                )
        max_length = min(self.max_length, module.context_length or self.max_length)
        num_embeddings = getattr(module, "num_embeddings", None)
        encode = getattr(module, "encode", None)
        if encode is None:
            calibration = None if name == "train" else self.calibration
            encode = partial(example_of, tokenizer=module.tokenizer, calibration=calibration)
        elif self.calibration is not None:
            raise ValueError(f"`data.calibration` does not go with {type(module).__name__}, which encodes rows itself.")
        examples = []
        for row in rows:
            try:
                example: Example = encode(task=self.task, row=row, max_length=max_length, chat=self.chat)
                if num_embeddings is not None:
                    check_tokens(example, num_embeddings, module.tokenizer)
            except ValueError as error:
                raise ValueError(f"Task {self.task.name}, {row.where}: {error}.") from None
            examples.append(replace(example, right=row.right, references=row.references))
        limit = "`data.max_length`" if max_length == self.max_length else "the model's context length"
        warn_of_cuts(examples, name, f"{max_length} tokens ({limit})", self._rows.num_demonstrations)
        return examples

    def _eval_dataloader(self, name: str) -> DataLoader[Batch]:
        examples = self._examples[name]
        lengths = [example.length for example in examples]
        order = even_batches(lengths, self.eval_batch_size, **self._replicas())
        batches = Batches(examples, order, self._collate(gold_only=False, with_prompts=self.generation is not None))
        sampler = BatchNumbers(batches)
        return DataLoader(batches, batch_size=None, sampler=sampler, num_workers=self.num_workers)

    def _collate(self, gold_only: bool, multiple: int = 1, with_prompts: bool = False) -> partial[Batch]:
        module = self._module()
        # A token for padding that was added to the tokenizer and not to the model can be any other: it is masked out.
        num_embeddings = getattr(module, "num_embeddings", None) or math.inf
        pad_ids = (module.tokenizer.pad_token_id, module.tokenizer.eos_token_id, 0)
        pad_id = next(id for id in pad_ids if id is not None and id < num_embeddings)
        return partial(
            collate,
            pad_id=pad_id,
            objective=self.task.objective,
            gold_only=gold_only,
            multiple=multiple,
            with_prompts=with_prompts,
            padding_side=getattr(module, "padding_side", "left"),
        )

    def _replicas(self) -> dict[str, int]:
        """How many ranks share a global batch, and which this is; a strategy may say that all read the same."""
        return self._trainer().distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}

    def _batches_trained(self) -> int:
        return self._trainer().fit_loop.epoch_loop.batch_progress.total.processed

    def _module(self) -> Any:
        """The LightningModule that runs, whatever attributes it has."""
        return self._trainer().lightning_module

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("PromptDataModule tokenizes for a model: give both to `Trainer.fit` or the like.")
        return self.trainer


def _check_at_least(minimum: int, name: str, value: int) -> None:
    if value < minimum:
        raise ValueError(f"`data.{name}` must be at least {minimum}, got {value}.")
