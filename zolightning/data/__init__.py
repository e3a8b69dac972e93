"""Tasks, rows and batches."""

from zolightning.data.classification import Classification
from zolightning.data.datamodule import PromptDataModule
from zolightning.data.encoding import Batch
from zolightning.data.generation import Generation
from zolightning.data.multiple_choice import MultipleChoice
from zolightning.data.task import Task
from zolightning.data.task_files import load_task

__all__ = ["Batch", "Classification", "Generation", "MultipleChoice", "PromptDataModule", "Task", "load_task"]
