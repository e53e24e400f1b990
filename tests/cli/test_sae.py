"""`hooked-llava sae`: what it prints agrees with the library, a killed run goes on, and wrong input is answered."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from hooked_llava.cli.options import EMBEDDED_MODEL
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae import SAEConfig, SparseAutoencoder, feature_attribution, load_sae, pooled, save_sae
from tests.cli.running import QUESTION, refused, run

SIZES = ("--width", "32", "--k", "4", "--batch-size", "16", "--buffer", "32", "--hook", "blocks.0.hook_resid_pre")


@pytest.fixture
def sae(checkpoint, tmp_path) -> str:
    width = HookedLLaVA.from_pretrained(checkpoint).cfg.d_model
    cfg = SAEConfig(d_in=width, d_sae=24, k=4, hook="hook_embed", model_name=checkpoint)
    save_sae(SparseAutoencoder(cfg).reset(seed=0), tmp_path / "sae")
    return str(tmp_path / "sae")


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_train_on_a_folder_of_images(checkpoint, images, tmp_path):
    out = tmp_path / "trained"
    typed = ("--images", str(images), "--question", QUESTION, "--steps", "6", "--out", str(out), "-m", checkpoint)
    result = run("sae", "train", *typed, *SIZES)
    assert result.exit_code == 0, result.stderr
    cfg = load_sae(out).cfg
    assert (cfg.d_sae, cfg.k, cfg.hook, cfg.model_name) == (32, 4, "blocks.0.hook_resid_pre", checkpoint)
    assert number(r"L0 ([\d.]+)", result.stdout) <= 4
    assert number(r"FVU ([\d.]+)", result.stdout) > 0
    assert "held-out prompts, replaced by" in result.stdout
    assert re.search(r"Cross-entropy recovered: (-?[\d.]+|nan), against the mean", result.stdout)


def test_a_run_that_is_given_again_goes_on_from_its_state(checkpoint, images, tmp_path):
    common = ("--images", str(images), "--question", QUESTION, "-m", checkpoint, "--resume", str(tmp_path / "state"))
    first = run("sae", "train", *common, *SIZES, "--steps", "5", "--out", str(tmp_path / "one"))
    again = run("sae", "train", *common, *SIZES, "--steps", "5", "--out", str(tmp_path / "two"))
    assert first.exit_code == again.exit_code == 0, again.stderr
    assert "nothing was trained" in again.stdout
    assert torch.equal(load_sae(tmp_path / "one").W_dec, load_sae(tmp_path / "two").W_dec)
    result = run("sae", "train", *common, *SIZES, "--steps", "6", "--out", str(tmp_path / "three"))
    assert result.exit_code == 2
    assert re.search(r"steps=5.*6", result.stderr)


def test_train_on_a_table_with_another_kind(checkpoint, images, tmp_path):
    table = images / "table.csv"
    table.write_text(f"image,question\na.png,{QUESTION}\nb.png,Is it red?\n")
    typed = ("--dataset", str(table), "--kind", "matryoshka", "--steps", "2", "--out", str(tmp_path / "out"))
    result = run("sae", "train", *typed, *SIZES, "-m", checkpoint)
    assert result.exit_code == 0, result.stderr
    assert load_sae(tmp_path / "out").cfg.groups == (4, 8, 16, 32)
    table.write_text("picture,question\na.png,what\n")
    said = refused("sae", "train", "--dataset", str(table), *SIZES, "-m", checkpoint, "--out", str(tmp_path / "no"))
    assert "picture, question; expected image and question, and image is not there" in said
    assert not (tmp_path / "no").exists()


def test_attribute_prints_the_largest_features(checkpoint, image, sae, tmp_path):
    page = tmp_path / "page.html"
    typed = ("--sae", sae, "--top", "3", "-o", str(page), "-m", checkpoint, "--max-new-tokens", "1")
    result = run("sae", "attribute", image, QUESTION, *typed)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained(checkpoint)
    found = feature_attribution(model, load_sae(sae), model.prepare(QUESTION, image))
    lines = [line.split() for line in result.stdout.splitlines()]
    start = lines.index(["feature", "image", "text"])
    by_feature = pooled(found, "sum")
    assert [int(line[0]) for line in lines[start + 1 : start + 4]] == by_feature.sae_feature.values[:3].tolist()
    assert float(lines[start + 1][1]) == pytest.approx(float(by_feature.image[0]), rel=5e-3)
    entries = lines[lines.index(["feature", "at", "activation", "attribution"]) + 1 :][:6]
    np.testing.assert_allclose([float(line[-1]) for line in entries], found.attribution.values[:6], rtol=5e-3)
    assert page.read_text().startswith("<!doctype html>")
    assert page.read_text().count("<img") == 2  # the image, and the overlay


def test_steer_prints_answers_by_strength_beside_the_controls(checkpoint, image, sae, tmp_path):
    page = tmp_path / "page.html"
    typed = ("--sae", sae, "--feature", "3=50", "--feature", "7=2", "--strengths", "0,1", "-o", str(page))
    result = run("sae", "steer", image, QUESTION, *typed, "-m", checkpoint, "--positions", "image")
    assert result.exit_code == 0, result.stderr
    (header,) = [line for line in result.stdout.splitlines() if line.lstrip().startswith("strength")]
    assert re.sub(r" {2,}", "|", header.strip()) == "strength|steered|reconstruction|random feature|random direction"
    assert "3 = 50, 7 = 2" in page.read_text()
    assert "features drawn at random" in page.read_text()


def test_the_autoencoder_of_the_package_explains_the_demo(tmp_path):
    page = str(tmp_path / "page.html")
    result = run("sae", "attribute", "demo", QUESTION, "--answer", "Orange", "--versus", "Blue", "-o", page)
    assert result.exit_code == 0, result.stderr
    assert "What argues for Orange rather than Blue" in result.stdout
    assert load_sae(EMBEDDED_MODEL).cfg.model_name == EMBEDDED_MODEL


def test_an_answer_that_is_sure_is_to_be_compared_with_another(tmp_path):
    page = tmp_path / "page.html"
    result = run("sae", "attribute", "demo", QUESTION, "-o", str(page))
    assert result.exit_code == 0, result.stderr
    assert "--versus" in result.stdout
    assert "--versus" in page.read_text()


def test_a_model_of_ones_own_needs_images_and_a_hook(checkpoint, tmp_path):
    out = ("--out", str(tmp_path / "out"), "-m", checkpoint)
    assert "--hook blocks.3.hook_resid_post" in refused("sae", "train", *out)
    assert "--images FOLDER with --question" in refused("sae", "train", "--hook", "hook_embed", *out)


def test_help_lists_the_commands():
    told = run("sae", "--help").stdout
    assert all(name in told for name in ("train", "steer", "attribute", "hooked-llava sae train"))
    for name in ("train", "steer", "attribute"):
        assert f"hooked-llava sae {name}" in run("sae", name, "--help").stdout
