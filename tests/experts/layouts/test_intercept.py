"""What is attached to a module while its slots are tapped or dropped."""

import pytest
import torch
from torch import nn

from bmoe_lightning.experts.grouped_matmul import ExpertGroups
from bmoe_lightning.experts.layouts.intercept import attached_state, combine, down_proj_product, expert_state


def test_state_is_stacked_and_taken_away():
    module = nn.Linear(2, 2)
    tap, dropout = object(), object()
    with attached_state(module, dropout=dropout):
        with attached_state(module, tap=tap):
            assert expert_state(module).tap is tap
            assert expert_state(module).dropout is dropout
        assert expert_state(module).tap is None
        with pytest.raises(ZeroDivisionError), attached_state(module, tap=tap):
            raise ZeroDivisionError
        assert expert_state(module).dropout is dropout
    assert expert_state(module) is None
    assert "_bmoe_state" not in module.__dict__


class Recorder:
    """A tap that doubles the outputs."""

    def record(self, inputs, experts, outputs, tokens, num_tokens):
        self.seen = inputs, experts, outputs, tokens, num_tokens
        return 2 * outputs


def test_product_of_sorted_slots():
    module, weight = nn.Linear(1, 1), torch.randn(3, 4, 5, dtype=torch.float64)
    experts, hidden = torch.tensor([2, 0, 2]), torch.randn(3, 4, dtype=torch.float64)
    groups, tokens = ExpertGroups(experts, 3), torch.arange(3)
    plain = down_proj_product(module, groups, hidden, weight, tokens, 3)
    for slot, expert in enumerate(groups.experts.tolist()):
        torch.testing.assert_close(plain[slot], hidden[slot] @ weight[expert])
    tap = Recorder()
    with attached_state(module, tap, lambda x, training: x * (3 if training else 5)):
        found = down_proj_product(module, groups, hidden, weight, tokens, 3)
    torch.testing.assert_close(found, 2 * 3 * plain)  # the tap is behind the dropout
    torch.testing.assert_close(tap.seen[0], 3 * hidden)
    assert torch.equal(tap.seen[1], groups.experts)
    assert (tap.seen[3] is tokens, tap.seen[4]) == (True, 3)


def test_combination_over_experts():
    index, weights = torch.tensor([[2, 0], [1, 2]]), torch.rand(2, 2, dtype=torch.float64)
    groups = ExpertGroups(index.reshape(-1), 3)
    outputs = torch.randn(4, 5, dtype=torch.float64)  # in the order of the flattened index
    found = combine(groups, outputs[groups.order], weights)
    torch.testing.assert_close(found, (outputs.view(2, 2, 5) * weights.unsqueeze(2)).sum(1))
