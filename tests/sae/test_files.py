"""Autoencoders as files: what is written is read, by us and by sparsify; what cannot be computed is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hooked_llava.errors import CheckpointError
from hooked_llava.sae.files import load_sae, save_sae
from tests.sae.test_autoencoder import KINDS, activations, make_sae


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_files_come_back_as_they_were(kind, tmp_path):
    sae = make_sae(
        kind, hook="blocks.2.hook_resid_post", model_name="tiny", groups=(5, 20) if kind == "matryoshka" else ()
    )
    save_sae(sae, tmp_path / "new" / "folder", file_format="saelens")
    again = load_sae(tmp_path / "new" / "folder")
    assert (again.cfg, again.cfg.training) == (sae.cfg, {})
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in sae.state_dict().items())


def test_sparsify_files_have_its_names_and_sizes(tmp_path):
    sae = make_sae(hook="blocks.1.hook_resid_post")
    save_sae(sae, tmp_path / "layers.1")
    tensors = load_file(tmp_path / "layers.1" / "sae.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "encoder.weight": [20, 6],
        "encoder.bias": [20],
        "W_dec": [20, 6],
        "b_dec": [6],
    }
    fields = json.loads((tmp_path / "layers.1" / "cfg.json").read_text())
    assert (fields["d_in"], fields["num_latents"], fields["k"]) == (6, 20, 4)
    assert load_sae(tmp_path, "layers.1").cfg == sae.cfg
    assert load_sae(tmp_path, "layers.1", dtype=torch.bfloat16).b_dec.dtype == torch.bfloat16


def test_sparsify_computes_the_same(tmp_path):
    sparsify = pytest.importorskip("sparsify", reason="eai-sparsify is the oracle of its own format; install .[dev]")
    sae, x = make_sae(d_in=16, d_sae=64, k=5), activations(7, 16)
    save_sae(sae, tmp_path)
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path)
    found = theirs(x)
    features = sae.encode(x)
    order, their_order = features.indices.argsort(-1), found.latent_indices.argsort(-1)
    assert torch.equal(features.indices.gather(-1, order), found.latent_indices.gather(-1, their_order))
    torch.testing.assert_close(features.values.gather(-1, order), found.latent_acts.gather(-1, their_order))
    torch.testing.assert_close(sae(x), found.sae_out)
    theirs.save_to_disk(tmp_path / "theirs")
    torch.testing.assert_close(load_sae(tmp_path / "theirs")(x), found.sae_out)


@pytest.mark.parametrize("field", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm"])
def test_what_saelens_does_to_the_input_is_folded_into_the_weights(field, tmp_path):
    sae, x = make_sae(), activations(3, 6)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, 20)[:, None]
    save_sae(sae, tmp_path, file_format="saelens")
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: field.startswith("rescale")}))
    norms = sae.W_dec.norm(dim=1)
    if field == "apply_b_dec_to_input":
        kept = (x @ sae.W_enc + sae.b_enc).relu().topk(4)
        expected = torch.zeros(3, 20).scatter(-1, kept.indices, kept.values) @ sae.W_dec + sae.b_dec
    else:
        kept = (((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu() * norms).topk(4)
        expected = torch.zeros(3, 20).scatter(-1, kept.indices, kept.values) @ (sae.W_dec / norms[:, None]) + sae.b_dec
    torch.testing.assert_close(load_sae(tmp_path)(x), expected)


def test_what_is_not_computed_is_refused_by_field_and_value(tmp_path):
    save_sae(make_sae(), tmp_path)
    path = tmp_path / "cfg.json"
    fields = json.loads(path.read_text())
    for field, value in (("transcode", True), ("activation", "groupmax"), ("skip_connection", True)):
        path.write_text(json.dumps({**fields, field: value}))
        with pytest.raises(CheckpointError, match=f"{field}={value!r}"):
            load_sae(tmp_path)
    save_sae(make_sae(), tmp_path / "lens", file_format="saelens")
    path = tmp_path / "lens" / "cfg.json"
    fields = json.loads(path.read_text())
    for field, value in (("normalize_activations", "layer_norm"), ("architecture", "gated")):
        path.write_text(json.dumps({**fields, field: value}))
        with pytest.raises(CheckpointError, match=f"{field}='{value}'"):
            load_sae(tmp_path / "lens")


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cfg.json.*sae.safetensors.*sae_weights"):
        load_sae(tmp_path)
    save_sae(make_sae(), tmp_path / "layers.3")
    with pytest.raises(CheckpointError, match=r"layers.3.*hookpoint="):
        load_sae(tmp_path)
    weights = tmp_path / "layers.3" / "sae.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "b_dec": torch.zeros(7)}, weights)
    with pytest.raises(CheckpointError, match=r"b_dec.*\[7\].*\[6\]"):
        load_sae(tmp_path, "layers.3")
    save_file({**tensors, "b_dec": torch.full((6,), float("nan"))}, weights)
    with pytest.raises(CheckpointError, match=r"b_dec.*NaN"):
        load_sae(tmp_path, "layers.3")
    save_file({name: t for name, t in tensors.items() if name != "W_dec"}, weights)
    with pytest.raises(CheckpointError, match=r"W_dec"):
        load_sae(tmp_path, "layers.3")
    with pytest.raises(CheckpointError, match=r"kind 'relu'.*saelens"):
        save_sae(make_sae("relu"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_holds_what_was_saved_last(tmp_path):
    first, second = make_sae(seed=0), make_sae(seed=5)
    save_sae(first, tmp_path)
    for file_format in ("saelens", "sparsify"):
        save_sae(second, tmp_path, file_format=file_format)
        assert torch.equal(load_sae(tmp_path).W_dec, second.W_dec)
