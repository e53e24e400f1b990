"""A whole run finds the directions that data are made of, and is the same after a stop, and in two processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hooked_llava.errors import InputError
from hooked_llava.sae.autoencoder import SparseAutoencoder
from hooked_llava.sae.files import load_sae, save_sae
from hooked_llava.sae.stream import ActivationStream, activation_stream
from hooked_llava.sae.train import train_sae
from hooked_llava.sae.trainer import StepRecord
from hooked_llava.toy.feature_tables import ANSWERED_KINDS, HELD_OUT_SEED, feature_rows
from tests.launched import launch

HOOK = "blocks.1.hook_resid_post"
GROUPS = {"matryoshka": (8, 24)}
QUESTIONS = [f"Is there a {color} {shape}?" for color in ("red", "blue", "green") for shape in ("star", "ring", "moon")]


def made_of(directions: torch.Tensor, n: int, size: int, seed: int = 1) -> Iterator[torch.Tensor]:
    """Batches of sums of three directions each, around a point that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        chosen = torch.rand(size, len(directions), generator=generator).topk(3, dim=1).indices
        strengths = 1 + torch.rand(size, 3, 1, generator=generator)
        yield (directions[chosen] * strengths).sum(1) + 2.0


def texts(model: Any, **options: Any) -> ActivationStream:
    """Activations of questions without images."""
    data = [(None, question) for question in QUESTIONS]
    settings = {"batch_size": 16, "buffer": 50, "prompts_per_forward": 2, "epochs": None, "prefetch": 1}
    return activation_stream(model, HOOK, data, **settings | options)


def weights(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in sae.state_dict().items()}


def identical(first: SparseAutoencoder, second: SparseAutoencoder) -> bool:
    return all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def killed_at(step: int) -> Any:
    def stop(record: StepRecord) -> None:
        if record.step == step:
            raise KeyboardInterrupt

    return stop


def test_the_directions_that_data_are_made_of_are_found():
    directions = F.normalize(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    sae = train_sae(made_of(directions, 300, 128), 48, 3, steps=300, lr=5e-3, progress=False)
    found = (F.normalize(sae.W_dec, dim=1) @ directions.T).max(0).values
    assert float((found > 0.9).float().mean()) >= 0.9
    assert not any(parameter.requires_grad for parameter in sae.parameters())


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "jump_relu"])
def test_a_run_that_was_killed_goes_on_to_the_same_result_bit_for_bit(tiny_shapes, tmp_path, kind):
    options = {"steps": 9, "kind": kind, "groups": GROUPS.get(kind, ()), "lr": 0.01, "dead_after": 60, "accumulate": 2}
    records: list[StepRecord] = []
    whole = train_sae(texts(tiny_shapes), 24, 4, on_step=records.append, progress=False, **options)
    resumable = {"checkpoint_dir": tmp_path / "run", "save_every": 2, "progress": False, **options}
    with pytest.raises(KeyboardInterrupt):
        train_sae(texts(tiny_shapes), 24, 4, on_step=killed_at(6), **resumable)
    assert json.loads((tmp_path / "run" / "latest.json").read_text())["step"] == 4
    assert len(list((tmp_path / "run").iterdir())) == 3
    again: list[StepRecord] = []
    resumed = train_sae(texts(tiny_shapes), 24, 4, on_step=again.append, **resumable)
    assert again == records[4:]
    assert identical(whole, resumed)
    finished = train_sae(texts(tiny_shapes), 24, 4, on_step=killed_at(9), **resumable)
    assert identical(whole, finished)
    assert (whole.cfg.hook, whole.cfg.model_name, whole.cfg.d_in) == (HOOK, "tiny-shapes", 128)
    with pytest.raises(InputError, match=r"checkpoint_dir.*k=4.*5"):
        train_sae(texts(tiny_shapes), 24, 5, **resumable)


def test_a_killed_run_over_a_plain_iterator_goes_on_too(tmp_path):
    directions = F.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    options = {"steps": 7, "checkpoint_dir": tmp_path / "run", "save_every": 3, "progress": False}
    whole = train_sae(made_of(directions, 7, 16), 16, 3, steps=7, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_sae(made_of(directions, 7, 16), 16, 3, on_step=killed_at(5), **options)
    assert identical(whole, train_sae(made_of(directions, 7, 16), 16, 3, **options))


def test_streams_that_do_not_fit_are_refused(tiny_shapes):
    with pytest.raises(InputError, match=r"ended after 3 of steps=5.*epochs"):
        train_sae(iter(torch.randn(3, 10, 8)), 16, 2, steps=5, progress=False)
    with pytest.raises(InputError, match=r"\[10, 7\].*\[batch, 8\]"):
        train_sae(iter([torch.randn(10, 8), torch.randn(10, 7)]), 16, 2, steps=2, progress=False)
    with pytest.raises(InputError, match=r"Step 2.*NaN"):
        train_sae(iter([torch.randn(10, 8), torch.full((10, 8), torch.nan)]), 16, 2, steps=2, progress=False)
    with pytest.raises(InputError, match=r"'NoneType'.*\[batch, d_in\]"):
        train_sae(iter([]), 16, 2, steps=2)
    several = activation_stream(tiny_shapes, [("resid_post", 0), ("resid_post", 1)], [(None, QUESTIONS[0])])
    with pytest.raises(InputError, match=r"blocks.0.*blocks.1.*one"):
        train_sae(several, 16, 2, steps=2)


PARALLEL: dict[str, Any] = {"width": 24, "k": 4, "steps": 8, "lr": 0.01, "dead_after": 100, "progress": False}


def one_of_two(model: Any, folder: Path, index: int) -> None:
    """What each of two processes does."""
    for kind in ("topk", "batch_topk"):
        resumable = {"checkpoint_dir": folder / f"{kind}-run", "save_every": 3}
        with pytest.raises(KeyboardInterrupt):
            train_sae(texts(model), kind=kind, on_step=killed_at(5), **PARALLEL, **resumable)
        sae = train_sae(texts(model), kind=kind, **PARALLEL, **resumable)
        save_sae(sae, folder / f"{kind}-{index}", file_format="saelens")


def test_two_processes_train_as_one_with_whole_batches(tiny_shapes, tmp_path):
    assert launch(one_of_two, tiny_shapes, tmp_path) == [0, 0]
    for kind in ("topk", "batch_topk"):
        parts = zip(texts(tiny_shapes, part=(0, 2)), texts(tiny_shapes, part=(1, 2)), strict=False)
        alone = train_sae((torch.cat(both) for both in parts), kind=kind, **PARALLEL)
        first, second = (load_sae(tmp_path / f"{kind}-{i}") for i in range(2))
        assert identical(first, second)
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(weights(first)[name], tensor, atol=2e-4, rtol=1e-3)
        files = sorted(path.name for path in (tmp_path / f"{kind}-run").iterdir())
        expected = [f"step-00000008.{what}.safetensors" for what in ("stream-0", "stream-1", "trainer")]
        assert files == ["latest.json", *expected]


def test_checkpoints_come_after_one_step_at_least():
    with pytest.raises(InputError, match="save_every=0"):
        train_sae(iter([torch.randn(8, 6)] * 3), 12, 2, steps=3, save_every=0)


def test_the_file_says_how_it_was_trained(tiny_shapes, tmp_path):
    records: list[StepRecord] = []
    options = {"steps": 4, "lr": 0.01, "seed": 3, "progress": False}
    sae = train_sae(texts(tiny_shapes), 24, 4, on_step=records.append, **options)
    for file_format in ("sparsify", "saelens"):
        save_sae(sae, tmp_path / file_format, file_format=file_format)
        said = load_sae(tmp_path / file_format).cfg.training
        assert said == sae.cfg.training
        assert (said["steps"], said["lr"], said["seed"], said["stream"]["hooks"]) == (4, 0.01, 3, [HOOK])
        assert said["fvu"] == pytest.approx(records[-1].fvu, abs=1e-4)
    plain = train_sae(iter(torch.randn(4, 16, 8)), 16, 2, **options).cfg.training
    assert "stream" not in plain
    assert plain["dead"] == 0


def test_the_autoencoder_of_the_package_has_few_dead_features(tiny_shapes):
    sae = load_sae("tiny-shapes")
    assert sae.cfg.training["dead"] <= 0.1
    assert sae.cfg.training["fvu"] <= 0.04
    rows = feature_rows(280, seed=HELD_OUT_SEED, kinds=ANSWERED_KINDS)
    stream = activation_stream(tiny_shapes, str(sae.cfg.hook), rows, tokens="image")
    acts = torch.cat([batch for batch in stream if isinstance(batch, torch.Tensor)])
    fired = sae.dense(sae.encode(acts)).gt(0).any(0)
    assert float(fired.float().mean()) >= 0.66  # on other images, a tenth of the activations in which one is alive
    left = (acts - sae(acts)).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum()
    assert float(left) <= 0.04
