"""The losses and the constraints, against the formulas written out and against sparsify; JumpReLU's own rule."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.machine.processes import Processes
from hooked_llava.sae import losses
from hooked_llava.sae.files import save_sae
from tests.oracles.plain_sae import auxiliary_by_hand, fvu_by_hand, median_by_hand, topk_by_hand
from tests.sae.test_autoencoder import activations, make_sae

ALONE = Processes(0, 1)


def test_the_variance_is_around_the_mean_of_all_batches_together():
    x = activations(12, 6) + 40
    found = losses.variance_around_mean([x[:5], x[5:]], ALONE)
    error = activations(12, 6, seed=5)
    torch.testing.assert_close(error.pow(2).sum() / found, fvu_by_hand(x.double(), x.double() - error).float())


@pytest.mark.parametrize("dead", [[], [3], [1, 4, 5, 9, 12, 17]], ids=["none", "one", "many"])
def test_the_auxiliary_loss_and_its_gradient_are_the_formulas(dead):
    sae, x = make_sae().double().requires_grad_(), activations(5, 6).double()
    mask = torch.zeros(20, dtype=torch.bool)
    mask[dead] = True
    pre_acts, reconstruction = topk_by_hand(x, sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec, 4)
    expected = auxiliary_by_hand(x, reconstruction, pre_acts, sae.W_dec, dead)
    variance = losses.variance_around_mean([x], ALONE)
    found = losses.auxiliary_loss(sae, sae.pre_acts(x), x - sae(x), mask, variance)
    torch.testing.assert_close(found, expected)
    if dead:
        by_hand = torch.autograd.grad(expected, [sae.W_dec, sae.encoder.weight, sae.b_dec])
        for one, other in zip(
            torch.autograd.grad(found, [sae.W_dec, sae.encoder.weight, sae.b_dec]), by_hand, strict=True
        ):
            torch.testing.assert_close(one, other)
        assert not by_hand[0][[i for i in range(20) if i not in dead]].any()


def test_a_step_against_the_auxiliary_losss_gradient_makes_dead_features_predict_the_error_better():
    sae, x = make_sae().requires_grad_(), activations(64, 6)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[10:] = True
    variance = losses.variance_around_mean([x], ALONE)
    error = (x - sae(x)).detach()
    before = losses.auxiliary_loss(sae, sae.pre_acts(x), error, mask, variance)
    (gradient,) = torch.autograd.grad(before, sae.W_dec)
    with torch.no_grad():
        sae.W_dec -= 0.5 * gradient
    assert losses.auxiliary_loss(sae, sae.pre_acts(x), error, mask, variance) < before


def test_sparsify_computes_the_same_losses(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is an oracle of the loss; install .[dev]")
    sae, x = make_sae(d_in=16, d_sae=64, k=5), activations(32, 16)
    save_sae(sae, tmp_path)
    dead = torch.arange(64) % 3 == 0
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)(x, dead_mask=dead)
    variance = losses.variance_around_mean([x], ALONE)
    error = x - sae(x)
    torch.testing.assert_close(error.pow(2).sum() / variance, theirs.fvu)
    torch.testing.assert_close(losses.auxiliary_loss(sae, sae.pre_acts(x), error, dead, variance), theirs.auxk_loss)


def test_the_geometric_median_is_the_point_of_least_distance():
    x = torch.cat([activations(30, 3), activations(5, 3, seed=9) + 50])
    torch.testing.assert_close(losses.geometric_median(x, ALONE), median_by_hand(x), atol=1e-4, rtol=0)


def test_what_would_change_the_length_of_the_decoders_rows_is_taken_from_its_gradient():
    sae, gradient = make_sae().requires_grad_(), activations(20, 6)
    sae.W_dec.grad = gradient.clone()
    losses.remove_parallel_gradient(sae)
    for row, before, after in zip(sae.W_dec, gradient, sae.W_dec.grad, strict=True):
        assert abs((row @ after).item()) < 1e-5
        torch.testing.assert_close(after, before - (before @ row) * row)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, 20)[:, None]
    losses.normalize_decoder(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20))


def test_jump_relus_gradients_are_the_papers():
    pre_acts = torch.tensor([[0.5, 0.9, 1.1, 2.0], [1.04, 0.0, 1.0, 0.96]], dtype=torch.float64, requires_grad=True)
    threshold = torch.ones(4, dtype=torch.float64, requires_grad=True)
    above = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.float64)
    near = torch.tensor([[0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.float64)
    weights = activations(2, 4).double()
    acts = losses.JumpReLU.apply(pre_acts, threshold, 0.1)
    torch.testing.assert_close(acts, pre_acts * above)
    to_acts, to_threshold = torch.autograd.grad((acts * weights).sum(), [pre_acts, threshold])
    torch.testing.assert_close(to_acts, above * weights)
    torch.testing.assert_close(to_threshold, -(1.0 / 0.1) * (near * weights).sum(0))  # theta / epsilon, theta = 1
    step = losses.Step.apply(pre_acts, threshold, 0.1)
    torch.testing.assert_close(step, above)
    to_acts, to_threshold = torch.autograd.grad((step * weights).sum(), [pre_acts, threshold], allow_unused=True)
    assert to_acts is None
    torch.testing.assert_close(to_threshold, -(1 / 0.1) * (near * weights).sum(0))


def test_the_thresholds_gradient_is_that_of_the_expected_loss():
    """Averaged over many activations, the estimate is the derivative of the mean of JumpReLU."""
    pre_acts = torch.rand(400_000, 1, dtype=torch.float64) * 2
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(losses.JumpReLU.apply(pre_acts, threshold, 0.1).mean(), threshold)
    assert float(found) == pytest.approx(-0.7 / 2, rel=0.05)  # d/dt of the integral of z / 2 from t to 2
    (found,) = torch.autograd.grad(losses.Step.apply(pre_acts, threshold, 0.1).mean(), threshold)
    assert float(found) == pytest.approx(-1 / 2, rel=0.05)


def test_the_errors_of_nested_autoencoders_are_those_of_each_alone():
    sae, x = make_sae("matryoshka", groups=(5, 12, 20)), activations(4, 6)
    acts = activations(4, 20, seed=8).relu()
    for width, error in zip((5, 12, 20), losses.nested_errors(sae, x, acts), strict=True):
        torch.testing.assert_close(error, x - acts[:, :width] @ sae.W_dec[:width] - sae.b_dec)
