import pytest
import torch

from bmoe_lightning.experts import grouped_matmul as grouped
from bmoe_lightning.experts.grouped_matmul import ExpertGroups

# (slots, experts that get some, num_experts): even, uneven, empty first / last experts, one expert, none at all.
LAYOUTS = [(50, (0, 1, 2, 3), 4), (97, (1, 3), 6), (33, (5,), 6), (64, (0,), 3), (1, (2,), 4), (0, (0,), 3)]


def setting(num_slots, used, num_experts, d, k, dtype):
    generator = torch.Generator().manual_seed(num_slots)
    experts = torch.tensor(used)[torch.randint(len(used), (num_slots,), generator=generator)]
    x = torch.randn(num_slots, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(num_experts, d, k, generator=generator, dtype=torch.float64).to(dtype)
    return experts, x, weight


def test_order_and_counts():
    groups = ExpertGroups(torch.tensor([2, 0, 2, 3, 0, 2]), 5)
    assert groups.experts.tolist() == [0, 0, 2, 2, 2, 3]
    assert groups.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert groups.counts.tolist() == [2, 0, 3, 1, 0]


@pytest.fixture
def paths(monkeypatch):
    """Which path each product took."""
    taken = []
    kernel_fits = grouped._kernel_fits

    def spy(x, other):
        taken.append(kernel_fits(x, other))
        return taken[-1]

    monkeypatch.setattr(grouped, "_kernel_fits", spy)
    return taken


@pytest.mark.parametrize(
    ("d", "k", "dtype", "kernel"),
    [(16, 8, torch.float32, True), (7, 5, torch.float64, False), (7, 5, torch.float32, False)],
)
@pytest.mark.parametrize(("num_slots", "used", "num_experts"), LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_is_a_loop(num_slots, used, num_experts, d, k, dtype, kernel, transposed, paths):
    experts, x, weight = setting(num_slots, used, num_experts, d, k, dtype)
    if transposed:
        weight = weight.mT.contiguous().mT
    groups = ExpertGroups(experts, num_experts)
    product = groups.matmul(x[groups.order], weight)
    assert product.shape == (num_slots, k)
    if num_slots:
        expected = torch.stack([x[s].double() @ weight[e].double() for s, e in enumerate(experts.tolist())])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(product.double(), expected[groups.order], rtol=tolerance, atol=tolerance)
        if hasattr(torch.nn.functional, "grouped_mm"):
            assert paths == [kernel]


@pytest.mark.parametrize(("d", "k", "dtype"), [(16, 8, torch.float32), (7, 5, torch.float64), (7, 5, torch.float32)])
@pytest.mark.parametrize(("num_slots", "used", "num_experts"), LAYOUTS)
def test_outer_sum_is_a_loop(num_slots, used, num_experts, d, k, dtype):
    experts, x, _ = setting(num_slots, used, num_experts, d, k, dtype)
    z = torch.randn(num_slots, k, dtype=torch.float64).to(dtype)
    groups = ExpertGroups(experts, num_experts)
    sums = groups.outer_sum(x[groups.order], z[groups.order])
    expected = torch.zeros(num_experts, d, k, dtype=torch.float64)
    for s, e in enumerate(experts.tolist()):
        expected[e] += torch.outer(x[s].double(), z[s].double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=tolerance)
    for expert in set(range(num_experts)) - set(used):
        assert bool((sums[expert] == 0).all())
    total = torch.ones_like(sums)
    address = total.data_ptr()
    groups.add_outer_sum_(total, x[groups.order], z[groups.order])
    torch.testing.assert_close(total.double(), expected + 1, rtol=tolerance, atol=tolerance)
    assert total.data_ptr() == address


def test_sum_is_a_loop():
    experts, x, _ = setting(97, (1, 3), 6, 4, 4, torch.float64)
    groups = ExpertGroups(experts, 6)
    expected = torch.stack([x[experts == e].sum(0) for e in range(6)])
    torch.testing.assert_close(groups.sum(x[groups.order]), expected)
    assert groups.sum(x[groups.order][:, 0]).shape == (6,)


def test_gradients_of_the_block_path():
    experts, x, weight = setting(37, (0, 2), 4, 3, 2, torch.float64)
    groups = ExpertGroups(experts, 4)
    x, weight = x[groups.order].requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(groups.matmul, (x, weight))
    z = torch.randn(37, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(groups.outer_sum, (x, z))


def test_gradients_of_the_kernel_path(paths):
    experts, x, weight = setting(37, (0, 2), 4, 8, 4, torch.float32)
    groups = ExpertGroups(experts, 4)
    leaves = [x[groups.order].requires_grad_(), weight.requires_grad_()]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    direction = torch.randn(37, 4)
    found = torch.autograd.grad((groups.matmul(*leaves) * direction).sum(), leaves)
    expected = torch.autograd.grad((groups.matmul(*doubles) * direction).sum(), doubles)
    if hasattr(torch.nn.functional, "grouped_mm"):
        assert paths[:2] == [True, False]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-5)
    assert bool((found[1][1] == 0).all())  # an expert without slots


def test_unaligned_view_takes_the_other_path(paths):
    """A slice that starts off a 16-byte boundary must not reach the kernel."""
    experts, x, weight = setting(20, (0, 1), 2, 8, 8, torch.float32)
    groups = ExpertGroups(experts, 2)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view_as(x)
    torch.testing.assert_close(groups.matmul(shifted[groups.order], weight), groups.matmul(x[groups.order], weight))
    torch.testing.assert_close(groups.matmul(shifted, weight), groups.matmul(x, weight))
    assert paths[2] is False


def test_products_with_rows_that_the_kernel_cannot_take_back():
    """The kernel makes 10 floats a row, but its gradient wants rows of a multiple of 16 bytes."""
    experts, x, weight = setting(37, (0, 2), 4, 16, 10, torch.float32)
    groups = ExpertGroups(experts, 4)
    x = x[groups.order].requires_grad_()
    (found,) = torch.autograd.grad(groups.matmul(x, weight).sum(), x)
    torch.testing.assert_close(found, weight[groups.experts].sum(-1))


def test_blocks_keep_no_copies_of_matrices(monkeypatch):
    """A product by blocks copies matrices a few at a time, and keeps its arguments alone for the backward pass."""
    experts, x, weight = setting(97, (1, 3), 6, 7, 5, torch.float64)
    groups = ExpertGroups(experts, 6)
    x, weight = x[groups.order].requires_grad_(), weight.requires_grad_()
    expected = groups.matmul(x, weight)
    monkeypatch.setattr(grouped, "_COPIED_FLOATS", 2 * 7 * 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product = groups.matmul(x, weight)
    assert torch.equal(product, expected)
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), weight.numel()])
    found = torch.autograd.grad(product.square().sum(), (x, weight))
    loop = torch.stack([x[s] @ weight[e] for s, e in enumerate(groups.experts.tolist())])
    for a, b in zip(found, torch.autograd.grad(loop.square().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
