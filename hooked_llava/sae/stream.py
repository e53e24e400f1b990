"""Shuffled activations of a model over images and prompts, in bounded memory: what sparse autoencoders are trained on."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.checks import check_same_work, one_of, whole_number
from hooked_llava.datasets.forwards import ALL, PLACES, Chunk, ModelSource, Rows, checked_hooks
from hooked_llava.datasets.places import PLACE_COLUMNS
from hooked_llava.datasets.prompts import DataOptions, Progress, PromptSource
from hooked_llava.errors import InputError
from hooked_llava.machine.processes import launched_as
from hooked_llava.model.attached_sae import vector_width
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import weights_hash
from hooked_llava.sae.shards import ShardCache
from hooked_llava.sae.shuffle import ShuffleBuffer, n_rows, on_device
from hooked_llava.sae.statistics import ActivationStatistics

Acts: TypeAlias = Tensor | dict[str, Tensor]
"""Activations [batch, d_in] of one hook; of several by their names."""
HookNames: TypeAlias = str | tuple | Sequence["str | tuple"]
"""One hook, or a list of hooks, each by any of its names."""


@dataclass(frozen=True)
class ActivationBatch:
    """Activations, and where each comes from.

    Attributes:
        acts (Acts): The activations [batch, d_in]; of several hooks by their names.
        places (Int[Tensor, "batch column"]): For each activation its place, as `PLACE_COLUMNS` says.
    """

    acts: Acts
    places: Int[Tensor, "batch column"]

    def place(self, column: str) -> Int[Tensor, " batch"]:
        """One column of the places; raises `InputError` for what is none of `PLACE_COLUMNS`."""
        return self.places[:, PLACE_COLUMNS.index(one_of(column, PLACE_COLUMNS, "column"))]


@dataclass(frozen=True)
class StreamConfig:
    """What decides which activations come, and in which order.

    Attributes:
        tokens (str): The span whose activations are taken, or "all".
        batch_size (int): Activations in a batch.
        buffer (int): Activations that are mixed.
        seed (int): Of the order.
        epochs (int | None): How often the data are read; None for without end.
        prompts_per_forward (int): Prompts in one forward pass.
    """

    tokens: str
    batch_size: int
    buffer: int
    seed: int
    epochs: int | None
    prompts_per_forward: int

    def __post_init__(self) -> None:
        for name in ("batch_size", "buffer", "prompts_per_forward", "epochs"):
            if name != "epochs" or self.epochs is not None:
                whole_number(getattr(self, name), name, least=1)
        whole_number(self.seed, "seed", least=0)
        if self.buffer < self.batch_size:
            raise InputError(
                f"buffer={self.buffer} holds less than batch_size={self.batch_size}; expected at least as many."
            )
        if not isinstance(self.tokens, str):
            raise InputError(f"tokens={self.tokens!r}; expected 'all', or the name of a span such as 'image'.")


class ActivationStream(Iterator[Acts]):
    """An iterator of shuffled activations; `activation_stream` makes it.

    Args:
        model: the model.
        hooks: full names of the hooks.
        chunks: where activations come from, from some progress on.
        config: how they are batched and mixed.
        about: what they are of, in plain values.
        one_hook: whether batches are tensors; otherwise dicts.
        device: where the buffer and the batches are.
    """

    def __init__(
        self,
        model: HookedLLaVA,
        hooks: list[str],
        chunks: Callable[[Progress], Generator[Chunk]],
        config: StreamConfig,
        about: dict[str, Any],
        *,
        one_hook: bool,
        device: torch.device,
    ) -> None:
        self.hooks, self.config, self.device = tuple(hooks), config, device
        self.about = {**about, **asdict(config)}
        self.model_name = model.config.model_name
        self.widths = {name: vector_width(model.hooks_table, name) for name in hooks}
        self._source, self._one_hook = chunks, one_hook
        self._buffer = ShuffleBuffer(config.buffer, config.seed)
        self._chunks: Generator[Chunk] | None = None
        self._ending: weakref.finalize | None = None
        self._progress = Progress(0, 0)
        self._waiting: Rows | None = None  # drawn, and not yet in the buffer
        self._statistics = {name: ActivationStatistics.empty(width, device) for name, width in self.widths.items()}

    @property
    def d_in(self) -> int:
        """Width of the activations; raises `InputError` where hooks of different widths are streamed."""
        if len(found := set(self.widths.values())) != 1:
            raise InputError(f"The stream has hooks of the widths {self.widths}; read stream.widths.")
        return found.pop()

    @property
    def statistics(self) -> ActivationStatistics | dict[str, ActivationStatistics]:
        """Mean and mean squared norm of all activations that have entered the buffer; of several hooks by their names."""
        return self._statistics[self.hooks[0]] if self._one_hook else self._statistics

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> Acts:
        return self._next().acts

    def with_places(self) -> Iterator[ActivationBatch]:
        """The same batches, each activation with its place; both iterators go on where the other stopped."""
        while True:
            try:
                batch = self._next()
            except StopIteration:
                return
            yield batch

    def _next(self) -> ActivationBatch:
        self._fill()
        if not self._buffer.size:
            raise StopIteration
        rows = self._buffer.take(self.config.batch_size)
        places = rows.pop(PLACES)
        return ActivationBatch(rows[self.hooks[0]] if self._one_hook else rows, places)

    def _fill(self) -> None:
        """Draw activations until the buffer is full, or the source is at its end."""
        while self._buffer.room:
            if self._waiting is None and not self._draw():
                return
            assert self._waiting is not None
            self._waiting = self._buffer.add(self._waiting)

    def _draw(self) -> bool:
        """Take the next activations from the source; whether there were any."""
        if self._chunks is None:
            self._chunks = self._source(self._progress)
            # Its thread ends before the interpreter does, or when nobody holds the stream any more.
            self._ending = weakref.finalize(self, self._chunks.close)
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        self._progress = chunk.after
        self._waiting = on_device({name: chunk.rows[name] for name in (*self.hooks, PLACES)}, self.device)
        for name in self.hooks:
            self._statistics[name].add(self._waiting[name])
        return True

    def close(self) -> None:
        """Stop preparing images in the background; the stream can still be read on."""
        if self._ending is not None:
            self._ending()
        self._chunks = self._ending = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the batches to come: progress, buffer and generator; tensors, numbers and text."""
        return {
            "about": self.about,
            "progress": list(self._progress),
            "buffer": self._buffer.state_dict(),
            "waiting": self._waiting or {},
            "statistics": {
                name: {"n": one.n, "total": one.total.clone(), "squares": one.squares.clone()}
                for name, one in self._statistics.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same data and settings was; raises `InputError` for one of others.

        Data without numbered entries are read again from their start, up to there.
        """
        check_same_work(state["about"], self.about, "state=", "the progress of another stream")
        self.close()
        self._progress = Progress(*state["progress"])
        self._buffer.load_state_dict(state["buffer"], self.device)
        waiting = on_device(state["waiting"], self.device)
        self._waiting = waiting if waiting and n_rows(waiting) else None
        for name, sums in state["statistics"].items():
            total, squares = sums["total"].to(self.device), sums["squares"].to(self.device)
            self._statistics[name] = ActivationStatistics(sums["n"], total.clone(), squares.clone())


def activation_stream(
    model: HookedLLaVA,
    hooks: HookNames,
    data: Any,
    *,
    tokens: str = ALL,
    batch_size: int = 4096,
    buffer: int = 2**16,
    seed: int = 0,
    epochs: int | None = 1,
    prompts_per_forward: int = 8,
    prefetch: int = 2,
    cache_dir: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    columns: tuple[str, str] = ("image", "question"),
    images: str | Path | None = None,
    part: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> ActivationStream:
    """Shuffled activations [batch, d_in] of a model over images and prompts: an iterator of tensors, as trainers take it.

    Args:
        model: the model; a forward pass stops at the highest hook.
        hooks: one hook, or a list of hooks with the same positions, for batches that are dicts by name.
        data: a DataFrame or data set with columns; rows of a table (`StudyRow`); a folder of images, with `prompt`; or an
            iterable of (image, question), of dicts, or of `Inputs` of one prompt each.
        tokens: whose activations: "all", "image", "text", or any span; of tiles "image" (patches), or "all" (class tokens too).
        batch_size: activations in a batch; the last may be smaller.
        buffer: activations that are mixed, the memory of the stream; it is full before the first batch.
        seed: of the order of prompts and activations.
        epochs: how often the data are read; None for without end.
        prompts_per_forward: prompts in one forward pass.
        prefetch: batches of prompts prepared ahead in a thread; 0 for none.
        cache_dir: folder to keep the activations in: they are computed once, before the first batch, and read from there.
        prompt: the question about every image, in place of the data's.
        columns: names of the columns of image and question.
        images: folder of the images that the data name.
        part: (i, n): only every n-th prompt, from the i-th on; by default each process of a launch takes its part.
        device: where buffer and batches are; the model's by default.
        progress: show a progress bar while `cache_dir` is filled.
        options: go to `model.prepare`.

    Raises `InputError` for hooks without a vector at every position, data of no known kind, and for prompts that do not fit.
    """
    config = StreamConfig(tokens, batch_size, buffer, seed, epochs, prompts_per_forward)
    of_data = DataOptions(prompt, columns, images, launched_as() if part is None else part)
    prompts = PromptSource(data, of_data, seed=seed, epochs=epochs if cache_dir is None else 1)
    one = not isinstance(hooks, Iterable) or isinstance(hooks, (str, tuple))
    names = checked_hooks(model, [hooks] if one else list(hooks), tokens)
    source = ModelSource(model, names, prompts, config.tokens, prompts_per_forward, prefetch, options)
    about = {"model": model.config.model_name, "hooks": names, "part": list(of_data.part), "n_rows": prompts.n_rows}
    chunks = (
        source.chunks
        if cache_dir is None
        else _cached(source, cache_dir, {**about, "tokens": tokens}, config, progress)
    )
    device = torch.device(model.cfg.device if device is None else device)
    return ActivationStream(model, names, chunks, config, about, one_hook=one, device=device)


def _cached(
    source: ModelSource, folder: str | os.PathLike[str], about: dict[str, Any], config: StreamConfig, progress: bool
) -> Callable[[Progress], Generator[Chunk]]:
    """A source that runs the model once, and then reads from the folder."""
    first, n = source.prompts.options.part
    identity = {
        **about,
        "weights": weights_hash(source.model),
        "dtype": str(source.model.cfg.dtype),
        "options": {name: str(value) for name, value in sorted(source.options.items())},
        "first_prompt": source.prompts.first_digest(),
    }
    cache = ShardCache(Path(folder) / f"part-{first}-of-{n}" if n > 1 else folder, identity)

    def chunks(start: Progress) -> Generator[Chunk]:
        cache.fill(lambda after: source.chunks(after, shuffled=False), progress=progress)
        yield from cache.chunks(start, seed=config.seed, epochs=config.epochs)

    return chunks
