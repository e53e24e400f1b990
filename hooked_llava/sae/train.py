"""Training a sparse autoencoder on a stream of activations: one process or several, with exact resume."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.errors import InputError
from hooked_llava.machine.processes import Processes
from hooked_llava.replay.progress import progress_bar
from hooked_llava.sae.autoencoder import Kind, SAEConfig, SparseAutoencoder
from hooked_llava.sae.stream import ActivationStream
from hooked_llava.sae.trainer import SAETrainer, StepRecord, TrainingConfig
from hooked_llava.sae.training_files import Checkpoints


def train_sae(
    stream: Iterator[Any],
    width: int,
    k: int,
    *,
    steps: int,
    kind: Kind = "topk",
    groups: tuple[int, ...] = (),
    device: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: bool = True,
    **options: Any,
) -> SparseAutoencoder:
    """A sparse autoencoder with `width` features, k of them active, trained on batches of activations [batch, d_in].

    Args:
        stream: an `activation_stream` of one hook, or any iterator of tensors. Under `accelerate launch` or torchrun each process
            gives its part of every batch, and the result is that of one process with whole batches.
        width: number of features.
        k: active features: of every vector for "topk", on average for other kinds.
        steps: steps of the optimiser.
        kind: "topk", "batch_topk", "matryoshka" or "jump_relu".
        groups: nested widths of "matryoshka", the last of them `width`.
        device: where it is trained; the stream's by default.
        checkpoint_dir: folder for the state of the run. Called again with it, a run that was stopped goes on, to the same result
            bit for bit; an iterator other than an `activation_stream` must then begin anew, and is read up to there.
        save_every: steps between checkpoints.
        on_step: called with the record of every step.
        progress: show a progress bar with FVU, L0 and the share of dead features on anything longer than two seconds.
        options: further fields of `TrainingConfig`: lr, warmup, accumulate, aux_weight, dead_after, seed and others.

    How it was trained stands in `sae.cfg.training`, and in its file.
    Raises `ConfigError` for kinds that are not trained, and `InputError` for a stream that ends early, activations that are not
    finite or change their width, and a checkpoint of another run.

    >>> batches = (torch.randn(64, 8, generator=torch.Generator().manual_seed(i)) for i in range(20))
    >>> sae = train_sae(batches, width=32, k=4, steps=20)
    >>> sae.cfg.d_in, bool(sae.W_dec.norm(dim=1).allclose(torch.ones(32)))
    (8, True)
    """
    config = TrainingConfig(steps=steps, **options)
    whole_number(save_every, "save_every", least=1)
    device = torch.device(device or getattr(stream, "device", "cpu"))
    stream, about = _opened(stream)
    trainer = SAETrainer(_new(about, width, k, kind, groups, config.seed).to(device), config, Processes.current(device))
    run = _Run(stream, trainer, checkpoint_dir)
    run.train(save_every, on_step, progress=progress)
    trainer.sae.cfg = replace(trainer.sae.cfg, training=run.described())
    return trainer.sae.requires_grad_(False)


def _opened(stream: Iterator[Any]) -> tuple[Iterator[Any], dict[str, Any]]:
    """The stream, and what an `SAEConfig` says of its activations; raises `InputError` for one of several hooks."""
    if isinstance(stream, ActivationStream):
        if len(stream.widths) != 1:
            raise InputError(f"The stream has the hooks {', '.join(stream.hooks)}; an autoencoder is trained on one.")
        about = {"d_in": stream.d_in, "hook": stream.hooks[0], "model_name": stream.model_name}
        return stream, about
    stream = iter(stream)
    first = next(stream, None)
    if not isinstance(first, Tensor) or first.ndim != 2:
        given = f"a tensor {list(first.shape)}" if isinstance(first, Tensor) else repr(type(first).__name__)
        raise InputError(f"The stream gave {given}; expected batches of activations [batch, d_in].")
    return chain([first], stream), {"d_in": first.shape[1]}


def _new(
    about: dict[str, Any], width: int, k: int, kind: Kind, groups: tuple[int, ...], seed: int
) -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_sae=width, k=k, kind=kind, groups=groups, **about)).reset(seed)


class _Run:
    """A trainer, the stream that it is fed from, and the checkpoints of both."""

    def __init__(self, stream: Iterator[Any], trainer: SAETrainer, folder: str | os.PathLike[str] | None) -> None:
        self.stream, self.trainer, self.config = stream, trainer, trainer.config
        self.last: StepRecord | None = None
        about = {**asdict(trainer.sae.cfg), **asdict(trainer.config)}
        del about["training"]
        self.checkpoints = None if folder is None else Checkpoints(folder, about, trainer.processes)
        found = None if self.checkpoints is None else self.checkpoints.load()
        if found is None:
            return
        of_trainer, of_stream = found
        trainer.load_state_dict(of_trainer)
        if of_stream is not None and isinstance(stream, ActivationStream):
            stream.load_state_dict(of_stream)
        else:
            for _ in range(trainer.steps_done):
                self._batches()

    def train(self, save_every: int, on_step: Callable[[StepRecord], None] | None, *, progress: bool) -> None:
        """The steps that are left."""
        shown, done = progress and self.trainer.processes.index == 0, self.trainer.steps_done
        with progress_bar(self.config.steps, "step", shown=shown, done=done) as bar:
            for step in range(done, self.config.steps):
                batches = self._batches()
                if step == 0:
                    self.trainer.start(batches)
                self.last = record = self.trainer.step(batches)
                if on_step is not None:
                    on_step(record)
                bar.set_postfix_str(f"FVU {record.fvu:.3f}, L0 {record.l0:.1f}, dead {record.dead:.1%}", refresh=False)
                bar.update()
                if self.checkpoints is not None and ((step + 1) % save_every == 0 or step + 1 == self.config.steps):
                    of_stream = self.stream.state_dict() if isinstance(self.stream, ActivationStream) else None
                    self.checkpoints.save(step + 1, self.trainer.state_dict(), of_stream)

    def described(self) -> dict[str, Any]:
        """How the autoencoder was trained, for its file; with the numbers of the last step, if this call has made it."""
        found = asdict(self.config) | {"processes": self.trainer.processes.n}
        if isinstance(self.stream, ActivationStream):
            found["stream"] = dict(self.stream.about)
        if self.last is not None:
            found |= {name: round(getattr(self.last, name), 4) for name in ("fvu", "l0", "dead")}
        return found

    def _batches(self) -> list[Tensor]:
        """The batches of one step; raises `InputError` if the stream has too few, in this process or in another."""
        batches = list(islice(self.stream, self.config.accumulate))
        if not self.trainer.processes.all(len(batches) == self.config.accumulate, self.trainer.sae.b_dec.device):
            raise InputError(
                f"The stream ended after {self.trainer.steps_done} of steps={self.config.steps} steps; give it more epochs "
                "(epochs=None is without end), or train for fewer steps."
            )
        return batches
