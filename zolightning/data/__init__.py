"""Tasks, rows and batches."""

from zolightning.data.datamodule import PromptDataModule
from zolightning.data.encoding import Batch
from zolightning.data.task import Task

__all__ = ["Batch", "PromptDataModule", "Task"]
