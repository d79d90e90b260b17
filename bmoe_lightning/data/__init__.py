"""Multiple-choice data: tasks, prompts and the DataModule."""

from bmoe_lightning.data.datamodule import MultipleChoiceDataModule
from bmoe_lightning.data.hub import DataUnavailableError, load_questions
from bmoe_lightning.data.prompts import PromptFormat, answer_token_ids, get_prompt_format
from bmoe_lightning.data.questions import LETTERS, Question, Splits, split_train
from bmoe_lightning.data.tokenizer import train_word_tokenizer

__all__ = [
    "LETTERS",
    "DataUnavailableError",
    "MultipleChoiceDataModule",
    "PromptFormat",
    "Question",
    "Splits",
    "answer_token_ids",
    "get_prompt_format",
    "load_questions",
    "split_train",
    "train_word_tokenizer",
]
