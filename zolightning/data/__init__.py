"""Tasks, rows and batches.

In the order of reading:

* A task: ``task``, ``task_files``, ``templates``; kinds of tasks: ``labelled`` and ``candidates`` (``classification``,
  ``multiple_choice``, ``image_classification``), ``single_answer`` (``completion``, ``conversation``, ``plain_text``),
  ``generation``, ``regression``.
* Its rows as text: ``files``, ``source``, ``sampling``, ``row``, ``rows``.
* In tokens: ``examples``, ``chat``; ``encoding`` for decoders, ``bidirectional`` and ``seq2seq`` for other networks;
  ``refusals``.
* In batches: ``batch``, ``batching``, ``images``; data modules: ``task_datamodule``, ``datamodule``,
  ``image_datamodule``.
"""

from zolightning.data.batch import Batch
from zolightning.data.classification import Classification
from zolightning.data.completion import Completion
from zolightning.data.conversation import Conversation
from zolightning.data.datamodule import PromptDataModule
from zolightning.data.generation import Generation
from zolightning.data.image_classification import ImageClassification
from zolightning.data.image_datamodule import ImageDataModule
from zolightning.data.multiple_choice import MultipleChoice
from zolightning.data.plain_text import PlainText
from zolightning.data.regression import Regression
from zolightning.data.task import Task
from zolightning.data.task_files import load_task

__all__ = [
    "Batch",
    "Classification",
    "Completion",
    "Conversation",
    "Generation",
    "ImageClassification",
    "ImageDataModule",
    "MultipleChoice",
    "PlainText",
    "PromptDataModule",
    "Regression",
    "Task",
    "load_task",
]
