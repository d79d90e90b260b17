import torch

from bmoe_lightning.data.batches import Collate, EncodedQuestion, EncodedQuestions, SeededShuffle

ITEMS = [EncodedQuestion((5, 6, 7), 2, 1, 0), EncodedQuestion((8,), 3, 2, 1)]


def test_the_order_of_an_epoch_follows_seed_and_number():
    def order(seed, epoch):
        sampler = SeededShuffle(50, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 3) == order(1, 3)
    assert sorted(order(1, 3)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_a_loop_that_does_not_name_its_epochs_gets_the_next_one():
    sampler, named = SeededShuffle(50, 4), SeededShuffle(50, 4)
    first, second = list(sampler), list(sampler)
    named.set_epoch(1)
    assert list(named) == second != first
    assert len(sampler) == 50


def test_padding_is_on_the_left_and_masked():
    batch = Collate(pad_id=9, num_choices=4)(ITEMS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_absent_choices_are_masked():
    batch = Collate(pad_id=9, num_choices=4)(ITEMS)
    assert batch["choice_mask"].tolist() == [[True, True, False, False], [True, True, True, False]]
    assert batch["choice_mask"].dtype == torch.bool
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([1, 2], [0, 1])


def test_the_data_set_is_the_items_in_order():
    data = EncodedQuestions(ITEMS, ())
    assert [data[i] for i in range(len(data))] == ITEMS


def test_padding_on_the_right():
    batch = Collate(pad_id=9, num_choices=4, side="right")(ITEMS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
