"""Prompts and answers for a Trainer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from zolightning.checks import require_choice, require_integer
from zolightning.data.batch import Batch, collate
from zolightning.data.classification import ImageClassification
from zolightning.data.encoding import Example, check_tokens
from zolightning.data.examples import Calibration, example_of, warn_of_cuts
from zolightning.data.generation import Generation
from zolightning.data.row import Row
from zolightning.data.task import PromptTask
from zolightning.data.task_datamodule import TaskDataModule
from zolightning.data.task_files import TaskFields, chosen_task
from zolightning.messages import counted


class PromptDataModule(TaskDataModule):
    """Batches of prompts with candidate answers, tokenized for the model that the Trainer runs.

    The LightningModule must have a `tokenizer` and a `context_length`. It may have a method `encode`, which is called
    instead of :func:`~zolightning.data.examples.example_of`, with the same arguments except the tokenizer; a method
    `check_references`, which is called with the references of each row if texts are generated; and a `padding_side`
    for prompts, which is "left" otherwise.

    Args:
        task: name of a task of ``configs/tasks``, the path of a YAML file like those there, or the fields of a
            :class:`~zolightning.data.Task` themselves.
        path: folder with the files ``train``, ``test`` and optionally ``validation``, each as JSON lines (``.jsonl``,
            or compressed), ``.csv``, ``.tsv`` or ``.parquet``, instead of the hub.
        max_length: tokens of a prompt with its answer, at most; longer prompts lose their beginning. The
            model's context length is a limit in any case.
        pad_to_multiple_of: pad training batches to a length that is a multiple of this, so that there are few lengths,
            for `cuda_graphs` of the ZerothOrder callback.
        num_demonstrations: number of in-context examples: training rows that stand with their right answers before
            every prompt, as many of them as fit, and are then not trained on. MeZO shows 32. With `examples_per_class`
            equally many of each class are shown.
        demonstrations_per_row: draw different ones for every row, as MeZO does without ``--train_set_seed``; all rows
            are trained on then. With `examples_per_class` they are drawn from the sampled rows, as in LM-BFF.
        calibration: compare candidates by how much the prompt raises their likelihood over the task's
            `content_free_prompt`, which stands alone (`zero_shot`, MeZO's ``--sfc``) or after the demonstrations
            (`in_context`, ``--icl_sfc``). For accuracies and predictions; losses stay as they are.
        chat: whether to write prompts as the user's turn in the tokenizer's chat template.
        prompt: Jinja2 template instead of the task's.
        answers: Jinja2 templates of the candidates instead of the task's, in the same order.
        **settings: how many rows are sampled, and how they make batches, see :class:`TaskDataModule`.

    Example:
        >>> data = PromptDataModule("sst2", num_train=512)
        >>> trainer.fit(model, datamodule=data)  # doctest: +SKIP

    Raises:
        ValueError: if an argument is not what it should be.
    """

    def __init__(
        self,
        task: str | TaskFields,
        path: str | None = None,
        *,
        max_length: int = 2048,
        pad_to_multiple_of: int = 1,
        num_demonstrations: int = 0,
        demonstrations_per_row: bool = False,
        calibration: Calibration | None = None,
        chat: bool = False,
        prompt: str | None = None,
        answers: list[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(chosen_task(task, prompt, answers), path, **settings)
        if isinstance(self.task, ImageClassification):
            raise ValueError(f"Task {self.task.name} classifies images: `data.class_path` must be ImageDataModule.")
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.num_demonstrations = num_demonstrations
        self.calibration = calibration
        self.chat = chat

        require_integer("data.max_length", max_length)
        require_integer("data.pad_to_multiple_of", pad_to_multiple_of)
        require_integer("data.num_demonstrations", num_demonstrations, least=0)
        if num_demonstrations and not isinstance(self.task, PromptTask):
            raise ValueError(f"`data.num_demonstrations` needs prompts and answers; task {self.task.name} has none.")
        self._num_sampled = self.num_train
        if self.examples_per_class is not None:
            classes = self.num_classes or 1
            self._num_sampled = classes * self.examples_per_class
            if num_demonstrations % classes:
                raise ValueError(
                    f"`data.num_demonstrations` {num_demonstrations} must be a multiple of the {classes} classes: with "
                    "`data.examples_per_class` as many of each are shown."
                )
        if num_demonstrations > self._num_sampled:
            raise ValueError(
                f"`data.num_demonstrations` is {num_demonstrations}, but only "
                f"{counted(self._num_sampled, 'training row is', 'training rows are')} sampled."
            )
        if demonstrations_per_row and not num_demonstrations:
            raise ValueError("`data.demonstrations_per_row` is True, but `data.num_demonstrations` is 0.")
        if calibration is not None:
            require_choice("data.calibration", calibration, get_args(Calibration))
        if calibration is not None and getattr(self.task, "content_free_prompt", None) is None:
            raise ValueError(
                f"`data.calibration` needs a `content_free_prompt`, of which task {self.task.name} has none."
            )
        self._rows.num_demonstrations = num_demonstrations
        self._rows.demonstrations_per_row = demonstrations_per_row

    def check_training(self) -> None:
        """Raises ValueError where all training rows are shown as demonstrations, as they may be for a test."""
        if self.num_demonstrations == self._num_sampled:
            raise self._nothing_left("raise `data.num_train`, or `data.examples_per_class`")

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self.check_training()
        super().setup(stage)
        if stage == "fit" and not self._examples["train"]:
            raise self._nothing_left("there are no more")

    def _nothing_left(self, why: str) -> ValueError:
        number = self.num_demonstrations
        return ValueError(
            f"`data.num_demonstrations` {number} leaves nothing of the {number} training rows to train on: {why}."
        )

    @property
    def generation(self) -> Generation | None:
        """How answers are generated, if the task says so."""
        return self.task if isinstance(self.task, Generation) else None

    def largest_batch(self, num_examples: int | None = None) -> tuple[int, int, int]:
        """The largest input of a forward pass over `num_examples` training examples, or over a whole batch.

        Returns:
            The number of rows, the tokens per row, and the positions per row at which logits are read: 1 if all answers
            are single tokens, otherwise one more than the tokens of the longest answer; with a decoder the tokens of
            all answers of a row, each as long as the longest one.
        """
        examples = self._examples["train"]
        rows = min(self.batch_size if num_examples is None else num_examples, self.batch_size, len(examples))
        longest_answer = max(len(answer) for example in examples for answer in example.answer_ids)
        is_gold_only = self.task.objective == "language_modeling"
        choices = 1 if is_gold_only else max(len(example.answer_ids) for example in examples)
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

    def encode(self, name: str, rows: Sequence[Row]) -> list[Example]:
        module = self.module()
        for attribute in ("tokenizer", "context_length"):
            if not hasattr(module, attribute):
                raise TypeError(
                    f"PromptDataModule tokenizes for the model: {type(module).__name__} must have a `tokenizer` "
                    f"and a `context_length` (the most tokens it can read, or None); `{attribute}` is missing."
                )
        max_length = min(self.max_length, module.context_length or self.max_length)
        num_embeddings = getattr(module, "num_embeddings", None)
        encode, check_references = (getattr(module, name, None) for name in ("encode", "check_references"))
        if encode is None:
            calibration = None if name == "train" else self.calibration
            encode = partial(example_of, tokenizer=module.tokenizer, calibration=calibration)
        elif self.calibration is not None:
            raise ValueError(
                f"`data.calibration` does not work with {type(module).__name__}, which encodes rows itself."
            )
        examples = []
        for row in rows:
            try:
                example: Example = encode(task=self.task, row=row, max_length=max_length, chat=self.chat)
                if num_embeddings is not None:
                    check_tokens(example, num_embeddings, module.tokenizer)
                if check_references is not None and self.generation is not None and row.right:
                    check_references(row.references)
            except ValueError as error:
                raise ValueError(f"Task {self.task.name}, {row.where}: {error}.") from None
            examples.append(replace(example, right=row.right, references=row.references))
        limit = "`data.max_length`" if max_length == self.max_length else "the model's context length"
        warn_of_cuts(examples, name, f"{max_length} tokens ({limit})", self.num_demonstrations)
        return examples

    def collate(self, for_training: bool) -> partial[Batch]:
        module = self.module()
        # A padding token that the tokenizer has and the model has not is replaced by another one: it is masked out.
        num_embeddings = getattr(module, "num_embeddings", None) or math.inf
        pad_ids = (module.tokenizer.pad_token_id, module.tokenizer.eos_token_id, 0)
        pad_id = next(id for id in pad_ids if id is not None and id < num_embeddings)
        return partial(
            collate,
            pad_id=pad_id,
            objective=self.task.objective,
            gold_only=for_training and self.task.objective == "language_modeling",
            multiple=self.pad_to_multiple_of if for_training else 1,
            with_prompts=self.generation is not None,  # rewards are of generated texts
            padding_side=getattr(module, "padding_side", "left"),
        )
