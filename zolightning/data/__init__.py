"""Tasks, rows and batches.

In the order of reading:

* A task: ``task``, ``task_files``, ``templates``; kinds of tasks: ``classification``, ``multiple_choice``,
  ``language_modeling``, ``generation``, ``regression``.
* Its rows as text: ``files``, ``source``, ``sampling``, ``row``, ``rows``.
* In tokens: ``examples``, ``chat``; ``encoding`` for decoders, ``bidirectional`` and ``seq2seq`` for other networks.
* In batches: ``batch``, ``answer_index``, ``batching``, ``images``; data modules: ``task_datamodule``,
  ``datamodule``, ``image_datamodule``.
"""

from zolightning.data.batch import Batch
from zolightning.data.classification import Classification, ImageClassification
from zolightning.data.datamodule import PromptDataModule
from zolightning.data.generation import Generation
from zolightning.data.image_datamodule import ImageDataModule
from zolightning.data.language_modeling import Completion, Conversation, PlainText
from zolightning.data.multiple_choice import MultipleChoice
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
