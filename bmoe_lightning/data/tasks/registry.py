"""The registry of tasks, and the recognition of the task of a data set.

Other packages register tasks with an entry point of the group `bmoe_lightning.tasks`; see
`bmoe_lightning.utils.registry`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from bmoe_lightning.data.tasks.base import Task
from bmoe_lightning.utils.messages import shown
from bmoe_lightning.utils.registry import Registry

ENTRY_POINT_GROUP = "bmoe_lightning.tasks"

_TASKS: Registry[Task] = Registry(
    kind="task",
    base=lambda: Task,
    group=ENTRY_POINT_GROUP,
    package="bmoe_lightning.data.tasks",
    built_in={
        "openbookqa": "openbookqa:OpenBookQA",
        "arc": "arc:ARC",
        "winogrande": "winogrande:Winogrande",
        "boolq": "boolq:BoolQ",
        "mmlu": "mmlu:MMLU",
        "medmcqa": "medmcqa:MedMCQA",
        "sciq": "sciq:SciQ",
    },
)

T = TypeVar("T", bound="type[Task]")


def register_task(task: T) -> T:
    """Register a task under the default of its `name`; a decorator for a frozen dataclass.

    Args:
        task: Subclass of `Task` whose fields all have defaults.

    Raises:
        TypeError: If it is no such class.
        ValueError: If its name is taken.
    """
    return _TASKS.register(task)


def get_task(task: str | Task) -> Task:
    """Look up a task.

    Args:
        task: Registered name, `package.module:Class`, or an instance, which is returned as it is.

    Raises:
        ValueError: If there is no task of that name, or no such module or class.
        TypeError: If what is found is no task.
    """
    return _TASKS.get(task)


def task_names() -> tuple[str, ...]:
    """The names of all tasks: built-in ones, then those of other packages, then those registered in this process."""
    return _TASKS.names()


def built_in_task_names() -> tuple[str, ...]:
    """The names of the built-in tasks."""
    return _TASKS.built_in_names()


def task_of_hub_id(hub_id: str) -> Task | None:
    """The registered task with this id on the hub, or None.

    Args:
        hub_id: `owner/name`.
    """
    return next((task for task in map(get_task, task_names()) if task.hub_id == hub_id), None)


def recognise_task(columns: Collection[str]) -> Task:
    """The registered task whose columns are all present; if several, the one with the most columns.

    Args:
        columns: Columns of the data.

    Raises:
        ValueError: If no task, or more than one, fits.
    """
    fitting = [task for task in map(get_task, task_names()) if set(task.columns) <= set(columns)]
    most = max((len(task.columns) for task in fitting), default=0)
    best = [task for task in fitting if len(task.columns) == most]
    if len(best) == 1:
        return best[0]
    fit = f"the tasks {', '.join(task.name for task in best)}" if best else f"none of {_nearest(columns)}"
    raise ValueError(f"the columns {shown(sorted(columns))} fit {fit}; name the task (task=)")


def _nearest(columns: Collection[str]) -> str:
    """The names of all tasks, and which columns those that lack fewest expect besides."""
    lacking = {
        task.name: [name for name in task.columns if name not in columns]
        for task in map(get_task, task_names())
        if set(task.columns) & set(columns)
    }
    fewest = min(map(len, lacking.values()), default=0)
    hints = [f"{name} needs {' and '.join(names)} too" for name, names in lacking.items() if len(names) == fewest]
    return ", ".join(task_names()) + (f" ({', '.join(hints)})" if hints else "")
