"""Tasks, which turn rows of data sets into questions; one file for each data set."""

from bmoe_lightning.data.tasks.base import Row, SplitName, Task
from bmoe_lightning.data.tasks.registry import built_in_task_names, get_task, recognise_task, register_task, task_names

__all__ = [
    "Row",
    "SplitName",
    "Task",
    "built_in_task_names",
    "get_task",
    "recognise_task",
    "register_task",
    "task_names",
]
