"""Tasks: one file a data set, which turns rows of the hub into questions."""

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
