"""Where memory runs out, every loop over batches goes on with half as many at once, says so, and gives the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_llava import analysis
from hooked_llava.datasets import StudyRow
from hooked_llava.editing import keep_prompts, key_covariance
from hooked_llava.errors import HookedLLaVAWarning
from hooked_llava.features import FeatureStore
from hooked_llava.machine.devices import in_batches
from hooked_llava.model.components.block import Block
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.replay import Intervention, Replay, reference_means
from hooked_llava.sae import activation_stream, load_sae
from hooked_llava.toy.images import image_path


@contextmanager
def little_memory(fits: int = 2) -> Iterator[list[int]]:
    """A block can take so many rows at once; how many each that failed was given."""
    failed: list[int] = []
    forward = Block.forward

    def short(self: Block, resid: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if len(resid) > fits:
            failed.append(len(resid))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, resid, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", short)
        yield failed


@functools.cache
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


QUESTIONS = ["What color is the star?", "Who made the star?", "What color is the circle?", "Is there a red star?"]


@functools.cache
def prompts() -> Any:
    return model().prepare(QUESTIONS, images=[[image_path("demo")]] * len(QUESTIONS))


def data() -> list[Any]:
    return [(image_path("demo"), question) for question in QUESTIONS]


def rows() -> list[StudyRow]:
    return [StudyRow(id=q, question=q, answer="Red", image=image_path("demo")) for q in QUESTIONS]


def sweep(_: Path) -> Any:
    runs = [[Intervention(("z", 1), positions="last", heads=[head], zero=True)] for head in range(4)]
    return Replay(model(), prompts()[0]).run(runs, batch_size=4, progress=False)


def of_kept_prompts(_: Path) -> Any:
    kept = keep_prompts(model(), prompts(), layers=[2], max_new_tokens=2)
    assert kept.answers is not None
    ids = torch.tensor([[5, 6], [7, -1], [8, 9], [5, 5]])
    return [kept.before, kept.answers, kept.logits(2), kept.answer_logits(ids, 2)]


def stream(_: Path) -> Any:
    batches = activation_stream(
        model(), ("resid_post", 3), data(), batch_size=8, prompts_per_forward=4, prefetch=1, progress=False
    )
    found = torch.cat(list(batches))
    return found[found[:, 0].argsort()]


def store(folder: Path) -> Any:
    built = FeatureStore.build(model(), load_sae("tiny-shapes"), data(), folder, batch_size=4, progress=False)
    return [[score for _, score in built.of_image(i, n=5)] for i in range(len(QUESTIONS))]


LOOPS: dict[str, Callable[[Path], Any]] = {
    "sweep": sweep,
    "study": lambda _: analysis.pope_study(model(), rows(), batch_size=4, progress=False).log_odds,
    "kept prompts": of_kept_prompts,
    "covariance": lambda _: key_covariance(model(), [prompts()], layer=2).moment,
    "reference mean": lambda _: reference_means(model(), prompts(), [(("z", 3), "last"), (("mlp_out", 1), "image")]),
    "patchscope": lambda _: (
        analysis.patchscope(
            model(), prompts()[0], layers=range(4), target=prompts()[1], target_position="last", batch_size=4
        ).probability
    ),
    "probes": lambda _: (
        analysis.probe_linear(model(), data(), ["a", "b", "a", "b"], folds=2, prompts_per_forward=4).result.weight
    ),
    "divergence of a lens": lambda _: analysis.lens_kl(model(), data(), prompts_per_forward=4),
    "stream of activations": stream,
    "feature store": store,
}


def numbers(found: Any) -> list[np.ndarray]:
    parts = found if isinstance(found, list) else [found]
    return [np.asarray(part, dtype=float) for part in parts]


@pytest.mark.parametrize("what", LOOPS)
def test_every_loop_halves_its_batch_and_says_so(what: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = numbers(LOOPS[what](tmp_path / "a"))
    with little_memory() as failed, pytest.warns(HookedLLaVAWarning, match=r"4 at once; going on with 2"):
        found = numbers(LOOPS[what](tmp_path / "b"))
    assert max(failed) == 4
    for own, other in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(own, other, atol=2e-5 * scale, rtol=0)


def test_training_a_lens_goes_on_with_fewer_prompts_a_step() -> None:
    with little_memory() as failed, pytest.warns(HookedLLaVAWarning, match=r"4 at once; going on with 2"):
        tuned = analysis.train_tuned_lens(model(), data(), steps=3, prompts_per_forward=4, progress=False)
    assert failed == [4]
    assert np.isfinite(tuned.training["kl"]).all()


def test_what_does_not_fit_by_itself_is_an_error() -> None:
    with little_memory(fits=0), pytest.warns(HookedLLaVAWarning):  # noqa: SIM117
        with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
            key_covariance(model(), [prompts()], layer=2)


def test_batches_are_asked_for_one_by_one() -> None:
    """What has no end can be read; and halves stay half."""
    asked: list[int] = []

    def batches() -> Iterator[list[int]]:
        for i in count():
            asked.append(i)
            yield [i] * 4

    def work(batch: list[int]) -> int:
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return sum(batch)

    with pytest.warns(HookedLLaVAWarning) as said:
        found = list(islice(in_batches(batches(), work), 4))
    assert found == [([0, 0], 0), ([0, 0], 0), ([1, 1], 2), ([1, 1], 2)]
    assert asked == [0, 1]
    assert len(said) == 1
