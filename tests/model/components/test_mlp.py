"""MLPs of both towers."""

from __future__ import annotations

import torch

from hooked_llava.model.components import MLP
from tests.model.components.towers import LANGUAGE, VISION, tower, with_weights
from tests.pairs import off


def test_the_gated_mlp() -> None:
    mlp = with_weights(MLP(tower(LANGUAGE, mlp_bias=True)))
    x = torch.randn(2, 3, LANGUAGE.d_model, dtype=torch.float64)
    gate = x @ mlp.W_gate + mlp.gate.bias
    expected = (gate / (1 + torch.exp(-gate)) * (x @ mlp.W_in + mlp.b_in)) @ mlp.W_out + mlp.b_out
    assert off(mlp(x), expected) < 1e-12


def test_the_mlp_without_a_gate() -> None:
    mlp = with_weights(MLP(VISION))
    x = torch.randn(2, 3, VISION.d_model, dtype=torch.float64)
    pre = x @ mlp.W_in + mlp.b_in
    assert off(mlp(x), (pre * torch.sigmoid(1.702 * pre)) @ mlp.W_out + mlp.b_out) < 1e-12
    assert mlp.W_gate is None
    assert not hasattr(mlp, "hook_pre_linear")


def test_weights_are_views_and_missing_biases_are_zero() -> None:
    mlp = with_weights(MLP(LANGUAGE))
    for view, weight in ((mlp.W_in, mlp.up.weight), (mlp.W_gate, mlp.gate.weight), (mlp.W_out, mlp.down.weight)):
        assert view.data_ptr() == weight.data_ptr()
        assert torch.equal(view, weight.T)
    assert mlp.b_in.eq(0).all()
    assert mlp.b_in.shape == (LANGUAGE.d_mlp,)
    assert mlp.b_out.eq(0).all()
    assert mlp.b_out.shape == (LANGUAGE.d_model,)


def test_one_neuron_writes_its_row_of_the_output_weights() -> None:
    mlp = with_weights(MLP(LANGUAGE))

    def only_neuron_three(post: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(3), LANGUAGE.d_mlp).double().expand_as(post)

    mlp.hook_post.add_hook(only_neuron_three)
    out = mlp(torch.zeros(1, 1, LANGUAGE.d_model, dtype=torch.float64))
    assert off(out[0, 0], mlp.W_out[3]) < 1e-12
