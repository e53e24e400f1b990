"""A tuned lens is h + A h + b, and comes back from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.readout.lens import lens as read
from hooked_llava.readout.tuned_lens import CONFIG, WEIGHTS, TunedLens
from tests.oracles.plain_lens import PlainTunedLens
from tests.pairs import off, pair


def drawn(n_layers: int = 3, d_model: int = 48) -> TunedLens:
    made = torch.Generator().manual_seed(1)
    weight = torch.randn(n_layers, d_model, d_model, generator=made, dtype=torch.float64) / 10
    return TunedLens(weight, torch.randn(n_layers, d_model, generator=made, dtype=torch.float64), "tiny", {"steps": 3})


def test_what_is_read_is_the_formula_of_the_tuned_lens_package() -> None:
    models = pair("grouped", torch.float64)
    lens = drawn(models.ours.cfg.n_layers, models.ours.cfg.d_model)
    norm, n_layers = models.hf.model.language_model.norm, len(lens.bias)
    plain = PlainTunedLens(n_layers, norm.weight, models.ours.cfg.eps, models.hf.lm_head.weight)
    plain.set(lens.weight, lens.bias)
    hidden = torch.randn(2, 5, lens.bias.shape[1], dtype=torch.float64) * 3
    for layer in range(n_layers + 1):
        assert off(read(models.ours, lens.translate(hidden, layer)), plain(hidden, layer).detach()) < 1e-12


def test_it_comes_back_from_its_files_and_their_names_are_those_of_the_package(tmp_path: Path) -> None:
    lens = drawn()
    lens.save(tmp_path / "new")
    found = TunedLens.load(tmp_path / "new")
    assert torch.equal(found.weight, lens.weight)
    assert torch.equal(found.bias, lens.bias)
    assert (found.model_name, found.training) == ("tiny", {"steps": 3})
    assert sorted(load_file(tmp_path / "new" / WEIGHTS)) == sorted(
        f"{i}.{n}" for i in range(3) for n in ("weight", "bias")
    )
    fields = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert fields.items() >= {"d_model": 48, "num_hidden_layers": 3, "lens_type": "linear_tuned_lens"}.items()


def test_a_lens_without_biases_is_read_and_others_are_refused(tmp_path: Path) -> None:
    lens = drawn()
    lens.save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if "weight" in name}, tmp_path / WEIGHTS)
    assert not TunedLens.load(tmp_path).bias.any()
    save_file({name: t for name, t in tensors.items() if not name.startswith("1")}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"48 x 48.*\[1\] of 3"):
        TunedLens.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "params.pt").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"params\.pt.*pickle.*params\.safetensors"):
        TunedLens.load(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere"):
        TunedLens.load(tmp_path / "nowhere")


def test_another_kind_of_lens_and_another_model_are_refused(tmp_path: Path) -> None:
    lens = drawn()
    lens.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text()) | {"lens_type": "mlp"}
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"'mlp'.*'linear_tuned_lens'"):
        TunedLens.load(tmp_path)
    with pytest.raises(InputError, match=r"2 layers of width 48.*this model has 3"):
        drawn(2).check(pair("grouped").ours)
    with pytest.raises(InputError, match=r"layer=4.*3"):
        lens.translate(torch.zeros(48), 4)
