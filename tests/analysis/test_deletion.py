"""Deletion and insertion curves, against forward passes on images that are blanked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava.analysis import deletion_curves
from hooked_llava.errors import InputError
from tests.pairs import as_users_run, pair


def exact() -> Any:
    return pair("odd", torch.float64)


def test_patches_go_and_come_in_the_maps_order() -> None:
    models, prompt = exact(), exact().prompt()
    (grid, _), size = models.ours.config.vision.patch_grid, models.ours.config.vision.patch_size
    values = np.random.default_rng(0).permutation(grid * grid).reshape(grid, grid)
    shares = (0, 1 / 9, 4 / 9, 1)
    curves = deletion_curves(models.ours, prompt, {"a": values, "b": -values}, 7, shares=shares)
    for name, sign in (("a", -1), ("b", 1)):
        order = np.argsort(sign * values.ravel())
        for way in ("deletion", "insertion"):
            expected = []
            for n in (0, 1, 4, 9):
                gone = order[:n] if way == "deletion" else order[n:]
                pixels = prompt["pixel_values"].clone()
                for row, column in (divmod(int(i), grid) for i in gone):
                    pixels[..., row * size : (row + 1) * size, column * size : (column + 1) * size] = 0
                logits = models.ours(**(prompt | {"pixel_values": pixels}))[0, -1]
                expected.append(logits.softmax(-1)[7].item())
            np.testing.assert_allclose(curves.probability.sel(map=name, direction=way), expected, atol=1e-6)
            area = sum(
                (a + b) / 2 * (y - x) for a, b, x, y in zip(expected, expected[1:], shares, shares[1:], strict=False)
            )
            assert curves.area.sel(map=name, direction=way).item() == pytest.approx(area, abs=1e-6)


def test_tokens_are_taken_away_after_the_vision_tower() -> None:
    models, prompt = exact(), exact().prompt()
    image = list(models.ours.as_inputs(prompt).token_map["image"])
    curves = deletion_curves(models.ours, prompt, {"a": np.eye(3)}, 7, where="tokens", shares=(0, 1))

    def mean(x: torch.Tensor, hook: Any) -> None:
        x[:, image] = x[:, image].mean(1, keepdim=True)

    without = models.ours.run_with_hooks(prompt, fwd_hooks=[("hook_embed", mean)])[0, -1].softmax(-1)[7].item()
    base = models.ours(prompt)[0, -1].softmax(-1)[7].item()
    np.testing.assert_allclose(curves.probability[:, 0], [[base, without], [without, base]], atol=1e-6)


def test_a_single_direction_and_what_it_cost() -> None:
    models, prompt = exact(), exact().prompt()
    both = deletion_curves(models.ours, prompt, {"a": np.eye(3)}, 7, shares=(0, 1 / 3, 1))
    one = deletion_curves(models.ours, prompt, {"a": np.eye(3)}, 7, directions="insertion", shares=(0, 1 / 3, 1))
    assert one.direction.values.tolist() == ["insertion"]
    np.testing.assert_allclose(one.probability[0], both.probability.sel(direction="insertion"), atol=1e-9)
    # Runs with patches taken away: all, none, and a third or two thirds. The one without any is the kept run; another
    # runs again from the first image's position on.
    assert (one.runs, both.runs) == (3, 4)
    assert 2 < one.n_forward < 1 + 2
    assert (both.n_forward - 1) / (one.n_forward - 1) == pytest.approx(3 / 2)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models, prompt = exact(), exact().prompt()
    monkeypatch.setattr(models.ours.language, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    monkeypatch.setattr(models.ours.vision, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with as_users_run(), pytest.raises(InputError, match="directions='both'; expected 'deletion' or 'insertion', or a"):
        deletion_curves(models.ours, prompt, {"a": np.eye(3)}, directions="both")
    with as_users_run(), pytest.raises(InputError, match="where='pixels'; expected 'image' or 'tokens'"):
        deletion_curves(models.ours, prompt, {"a": np.eye(3)}, where="pixels")
    with pytest.raises(InputError, match=r"'a'.*shape \(2, 2\).*patch, \(3, 3\)"):
        deletion_curves(models.ours, prompt, {"a": np.eye(2)})
    with pytest.raises(InputError, match="from 0 to 1"):
        deletion_curves(models.ours, prompt, {"a": np.eye(3)}, shares=(0.5, 0.2))
    with pytest.raises(InputError, match="got 0 maps, and image=0 of 1"):
        deletion_curves(models.ours, prompt, {})
    with pytest.raises(InputError, match="deletion_curves.*images.*0"):
        deletion_curves(models.ours, models.prompt(n_images=0), {"a": np.eye(3)})
