"""Multiple-choice data: tasks, prompts and the DataModule."""

from typing import TYPE_CHECKING, Any

from bmoe_lightning.utils.late_import import late_import

if TYPE_CHECKING:
    from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
    from bmoe_lightning.data.files import DataUnavailableError
    from bmoe_lightning.data.hub import load_questions
    from bmoe_lightning.data.prompts import PromptFormat, answer_token_ids, get_prompt_format
    from bmoe_lightning.data.protocols import Protocol, get_protocol, protocol_names, register_protocol
    from bmoe_lightning.data.questions import LETTERS, Question, Splits, split_train
    from bmoe_lightning.data.splits import load_splits
    from bmoe_lightning.data.tasks import Task, get_task, register_task, task_names
    from bmoe_lightning.data.tokenizer import train_word_tokenizer

__all__ = [
    "LETTERS",
    "DataUnavailableError",
    "MultipleChoiceDataModule",
    "PromptFormat",
    "Protocol",
    "Question",
    "Splits",
    "Task",
    "answer_token_ids",
    "get_prompt_format",
    "get_protocol",
    "get_task",
    "load_questions",
    "load_splits",
    "protocol_names",
    "register_protocol",
    "register_task",
    "split_train",
    "task_names",
    "train_word_tokenizer",
]

_MODULES = {
    "datamodule": ("MultipleChoiceDataModule",),
    "files": ("DataUnavailableError",),
    "hub": ("load_questions",),
    "prompts": ("PromptFormat", "answer_token_ids", "get_prompt_format"),
    "protocols": ("Protocol", "get_protocol", "protocol_names", "register_protocol"),
    "questions": ("LETTERS", "Question", "Splits", "split_train"),
    "splits": ("load_splits",),
    "tasks": ("Task", "get_task", "register_task", "task_names"),
    "tokenizer": ("train_word_tokenizer",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> Any:
        # Lazy imports, so that the names of tasks are listed without importing torch.
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(late_import(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
