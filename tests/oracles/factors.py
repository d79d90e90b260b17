"""Factors of a curvature pass against the matrices that they stand for."""

import torch

from oracles.dense import dense_kfac, observe, softmax_hessian


def matrices(layer):
    """`A [E, d_in, d_in]` and `G [E, d_out, d_out]` written out."""
    a = layer.a_basis @ torch.diag_embed(layer.a_eigenvalues) @ layer.a_basis.mT
    g = layer.g_basis @ torch.diag_embed(layer.g_eigenvalues) @ layer.g_basis.mT
    return a.double(), g.double()


def assert_same(found, expected, tolerance=1e-10):
    """Two sets of factors stand for the same matrices."""
    for f, e in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(f.slots, e.slots, rtol=1e-12, atol=0)
        torch.testing.assert_close(f.a_trace, e.a_trace, rtol=1e3 * tolerance, atol=tolerance)
        torch.testing.assert_close(f.g_trace, e.g_trace, rtol=1e3 * tolerance, atol=tolerance)
        for x, y in zip(matrices(f), matrices(e), strict=True):
            assert float((x - y).abs().max()) <= tolerance * float(y.abs().max())


def assert_dense(factors, dense, tolerance=1e-10):
    for layer, wanted in zip(factors.layers, dense, strict=True):
        assert torch.equal(layer.slots, wanted.slots)
        a, g = matrices(layer)
        assert float((a - wanted.a).abs().max()) <= tolerance * float(wanted.a.abs().max())
        assert float((g - wanted.g).abs().max()) <= tolerance * float(wanted.g.abs().max())
        torch.testing.assert_close(layer.a_trace, wanted.a.diagonal(dim1=1, dim2=2).sum(1), rtol=10 * tolerance, atol=0)
        torch.testing.assert_close(layer.g_trace, wanted.g.diagonal(dim1=1, dim2=2).sum(1), rtol=10 * tolerance, atol=0)


def dense_of(model, class_logits, batch, approximation, hessian=softmax_hessian):
    logits, observed = observe(model, class_logits, batch)
    return [dense_kfac(seen, hessian(logits), seen.owners, 4, approximation) for seen in observed]
