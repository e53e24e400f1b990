"""`hooked-llava sae explain`: from images to a page, again from where it stopped, and refused before anything is loaded."""

from __future__ import annotations

import re

import numpy as np

from hooked_llava.cli import sae_explain, sae_explainers
from hooked_llava.features import FeatureStore
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.explainers import EXPLAINERS
from hooked_llava.results import load
from hooked_llava.sae import SAEConfig, SparseAutoencoder, save_sae
from tests.cli.running import refused, run
from tests.registries import put_back

FEATURES = (32, 60, 106)
FEW = (*(part for n in FEATURES for part in ("--feature", str(n))), "--n-images", "12", "--max-new-tokens", "2")


def test_the_embedded_model_is_explained_without_a_word_and_again_from_its_files(tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = run("sae", "explain", *FEW, "--out", str(out))
    assert result.exit_code == 0, result.stderr
    store, scores, steered = (
        FeatureStore.open(out / "store"),
        load(out / "scores.safetensors"),
        load(out / "steered.safetensors"),
    )
    assert store.n_images == 12
    assert scores.feature.values.tolist() == list(FEATURES)
    assert set(scores) == {"iou", "iou_random", "detection"}
    assert steered.sizes == {"feature": 3, "question": 3}
    header, *lines = [re.split(r" {2,}", line.strip()) for line in result.stdout.splitlines()[1:]]
    assert header == ["feature", "phrase", "concept", "IoU", "Detection", "answer when set"]
    best = int(lines[0][0])
    above = scores.iou - scores.iou_random.mean("run")
    assert above.sel(feature=best) == above.max()
    assert f"IoU: {float(scores.iou.mean()):.2f}" in result.stdout
    page = (out / "gallery.html").read_text()
    assert page.index(f'id="feature-{best}"') == page.index('id="feature-')
    monkeypatch.setattr("hooked_llava.features.score_features", None)
    monkeypatch.setattr("hooked_llava.features.steered_answers", None)
    again = run("sae", "explain", *FEW, "--out", str(out))
    assert again.stdout == result.stdout, again.stderr


def test_a_folder_of_images_is_explained_by_whoever_is_named(checkpoint, images, tmp_path, monkeypatch):
    width = HookedLLaVA.from_pretrained(checkpoint).cfg.d_model
    cfg = SAEConfig(d_in=width, d_sae=24, k=4, hook="hook_embed", model_name=checkpoint)
    save_sae(SparseAutoencoder(cfg).reset(seed=0), tmp_path / "sae")
    prompts: list[str] = []

    class Says:
        def __call__(self, images, prompt):
            prompts.append(prompt)
            return "[EXPLANATION]: noise" if images else "[ANSWER] noise texture"

    made = []
    monkeypatch.setattr(
        "hooked_llava.features.ServerExplainer", lambda *given, **options: made.append((given, options)) or Says()
    )
    out = tmp_path / "out"
    typed = ("--images", str(images), "--sae", str(tmp_path / "sae"), "-m", checkpoint, "--out", str(out))
    who = ("--explainer", "server:a/b:c", "--base-url", "http://localhost:1/v1", "--max-requests", "99")
    asked = ("--top", "2", "--scores", "none", "--max-new-tokens", "1")
    result = run("sae", "explain", *typed, *who, *asked)
    assert result.exit_code == 0, result.stderr
    assert made == [(("a/b:c", "http://localhost:1/v1"), {"max_requests": 99})]
    assert "noise texture" in result.stdout
    assert not (out / "scores.safetensors").exists()
    store = FeatureStore.open(out / "store")
    often = np.argsort(-store.frequency, kind="stable")[:2].tolist()
    assert store.prompt(0) == "<image>"
    steered = load(out / "steered.safetensors")
    assert steered.question.values.tolist() == [sae_explain.PAPER_QUESTION]
    assert steered.feature.values.tolist() == often
    assert all(f'id="feature-{feature}"' in (out / "gallery.html").read_text() for feature in often)
    assert len(prompts) == 2 * 3  # an explanation, a phrase and a concept
    prompts.clear()
    again = run("sae", "explain", *typed, *who, *asked)
    assert again.exit_code == 0, again.stderr
    assert prompts == []  # nobody was asked again


def test_what_cannot_be_is_refused_before_anything_is_loaded(checkpoint, images, tmp_path, monkeypatch):
    monkeypatch.setattr("hooked_llava.cli.common.load_model", None)
    there = ("--out", str(tmp_path / "out"))
    folder = ("--images", str(images), *there)
    said = refused("sae", "explain", *folder, "-m", checkpoint)
    assert all(choice.written in said for name, choice in EXPLAINERS.items() if name != "oracle")
    assert "tiny-shapes draws" in refused("sae", "explain", *folder, "--explainer", "oracle")
    assert "transformers:NAME" in refused("sae", "explain", *there, "--explainer", "transformers")
    assert "expected oracle." in refused("sae", "explain", *there, "--explainer", "oracle:x")
    assert "gpt" in refused("sae", "explain", *there, "--explainer", "gpt")
    assert "server:NAME" in refused("sae", "explain", *there, "--max-requests", "3")
    assert "bleu" in refused("sae", "explain", *there, "--scores", "iou,bleu")
    assert "'nowhere'" in refused("sae", "explain", *there, "--about", "nowhere")
    assert "--images FOLDER" in refused("sae", "explain", "-m", checkpoint, *there)
    assert "nowhere" in refused("sae", "explain", "--out", str(tmp_path / "nowhere" / "out"))
    assert not (tmp_path / "out").exists()


def test_help_says_who_may_explain():
    told = " ".join(run("sae", "explain", "--help").stdout.replace("│", " ").split())
    assert all(choice.written in told for choice in EXPLAINERS.values())
    with put_back(EXPLAINERS) as table:
        table["friend"] = EXPLAINERS["server"]._replace(written="friend:NAME")
        assert "friend:NAME" in refused("sae", "explain", "--explainer", "friend")
    assert sae_explainers.ORACLE in EXPLAINERS
