import pytest
import torch
from oracles.dense import low_rank_blocks
from oracles.models import answer_logits, toy_batch, toy_model

from bmoe_lightning.curvature import KroneckerFactors, LayerFactors, collect_factors
from bmoe_lightning.curvature.factors import orthonormal


@pytest.fixture(scope="module")
def factors():
    return collect_factors(toy_model(num_layers=3, idle=[1]), answer_logits, [toy_batch()], rank=3, num_examples=9)


def test_shapes(factors):
    layer = factors.layers[1]
    assert (layer.num_experts, layer.d_in, layer.d_out) == (4, 5, 6)
    assert layer.curvature().shape == (4, 3, 3)
    assert layer.curvature().dtype == torch.float64


def test_curvature_holds_the_eigenvalues_of_the_block(factors):
    for layer in factors.layers:
        for expert, block in enumerate(low_rank_blocks(layer)):
            expected = torch.linalg.eigvalsh(block).flip(0)[:9]
            found = layer.curvature()[expert].flatten().sort(descending=True).values
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_rows_of_the_curvature_belong_to_gradients(factors):
    """Entry (q, p) goes with the q-th gradient direction and the p-th input direction."""
    layer = factors.layers[0]
    block = low_rank_blocks(layer)[0]
    direction = torch.outer(layer.g_basis[0, :, 1], layer.a_basis[0, :, 2]).flatten()
    torch.testing.assert_close(direction @ block @ direction, layer.curvature()[0, 1, 2])


def test_idle_expert(factors):
    for layer in factors.layers:
        assert float(layer.slots[1]) == 0
        assert float(layer.curvature()[1].abs().max()) == 0
        assert float(layer.discarded_energy()[1]) == 0


def test_discarded_energy_by_hand():
    layer = LayerFactors(
        "x", 0,
        slots=torch.tensor([4.0, 0.0]),
        a_basis=torch.eye(3)[:, :1].expand(2, 3, 1), a_eigenvalues=torch.tensor([[3.0], [0.0]]),
        g_basis=torch.eye(2)[:, :1].expand(2, 2, 1), g_eigenvalues=torch.tensor([[1.0], [0.0]]),
        a_trace=torch.tensor([4.0, 0.0], dtype=torch.float64), g_trace=torch.tensor([2.0, 0.0], dtype=torch.float64),
    )  # fmt: skip
    assert layer.discarded_energy().tolist() == [1 - 3 / 8, 0]


def test_without(factors):
    kept = factors.without([1])
    assert [layer.index for layer in kept.layers] == [0, 2]
    assert kept.description() == factors.description()
    with pytest.raises(ValueError, match=r"no expert layer has the index \[7\]; use .* \(0 is .*, 1 is .*, 2 is \S+\)"):
        factors.without([7])
    with pytest.raises(ValueError, match="leaves no posterior"):
        factors.without([0, 1, 2])


def test_to_moves_every_tensor(factors):
    moved = factors.to("meta")
    assert isinstance(moved, KroneckerFactors)
    for layer, original in zip(moved.layers, factors.layers, strict=True):
        assert {tensor.device.type for tensor in layer.tensors().values()} == {"meta"}
        assert (layer.name, layer.index) == (original.name, original.index)
        assert set(layer.tensors()) == set(original.tensors())
        assert len(layer.tensors()) == 7
    assert moved.description() == factors.description()


def test_other_dtypes_and_devices(factors):
    half = factors.to(dtype=torch.bfloat16)
    assert half.description() == factors.description()
    for layer, wanted in zip(half.layers, factors.layers, strict=True):
        for name, tensor in layer.tensors().items():
            if name.endswith("basis"):
                assert torch.equal(tensor, getattr(wanted, name).bfloat16())
            else:
                assert tensor.dtype == torch.float64
                assert torch.equal(tensor, getattr(wanted, name))
        assert torch.equal(layer.curvature(), wanted.curvature())
    assert factors.to("meta").layers[0].g_basis.device.type == "meta"
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*not in torch\.int8"):
        factors.to(dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_in_half_precision_are_orthonormal_again(dtype):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(5, 40, 8, generator=generator, dtype=torch.float64)).Q
    rounded = basis.to(dtype)
    found = orthonormal(rounded, torch.float64)
    identity = torch.eye(8, dtype=torch.float64).expand(5, 8, 8)
    assert float((rounded.double().mT @ rounded.double() - identity).abs().max()) > 1e-5
    torch.testing.assert_close(found.mT @ found, identity, rtol=0, atol=1e-13)
    # The same space, and nearly the same columns.
    assert float((rounded.double() - found @ (found.mT @ rounded.double())).abs().max()) < 1e-13
    torch.testing.assert_close(found, basis, rtol=0, atol=0.02)
    wide = orthonormal(rounded, torch.float32)
    assert wide.dtype == torch.float32
    assert orthonormal(basis, torch.float64) is basis
