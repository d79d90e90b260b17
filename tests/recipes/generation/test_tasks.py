"""The generated tasks: right answers, parts that do not overlap, one token a word."""

from __future__ import annotations

from collections import Counter

import pytest

from recipes.generation.settings import TASKS
from recipes.generation.tasks import make_task
from recipes.generation.training import text_batch


def test_sums_are_right_and_held_out():
    task = make_task("addition", questions=50)
    for question in (*task.train[:200], *task.test):
        left, right = question.prompt.removesuffix(" =").split(" + ")
        total = int(left.replace(" ", "")) + int(right.replace(" ", ""))
        assert question.answer == f"{' '.join(str(total))} ."
    assert not {q.prompt for q in task.train} & {q.prompt for q in task.test}
    assert len({q.prompt for q in task.test}) == 50


def test_names_have_one_code_each_and_are_stated_often_rarely_or_never():
    task = make_task("recall", questions=200)
    codes = {question.prompt: question.answer for question in task.test}
    assert len(codes) == 200
    assert all(codes[question.prompt] == question.answer for question in task.train)
    stated = Counter(question.prompt for question in task.train)
    assert stated[task.test[0].prompt] > 20 > stated[task.test[100].prompt]
    assert any(stated[question.prompt] == 0 for question in task.test)
    assert {len(code.split()) for code in codes.values()} == {3, 4, 5, 6}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_every_time_and_every_word_a_token(name):
    task = make_task(name, questions=20)
    assert task == make_task(name, questions=20)
    tokenizer = task.tokenizer()
    for question in (*task.train[:50], *task.test):
        ids = tokenizer(f"{question.prompt} {question.answer}")["input_ids"]
        assert len(ids) == len(f"{question.prompt} {question.answer}".split())
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
    batch = text_batch(tokenizer, task.test[:5])
    for row, question in enumerate(task.test[:5]):
        answer = batch["input_ids"][row][batch["answer_mask"][row].bool()].tolist()
        assert answer == tokenizer(question.answer)["input_ids"]
        whole = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        assert whole == tokenizer(question.prompt)["input_ids"] + answer
