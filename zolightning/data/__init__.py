"""Tasks, rows and batches."""

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
