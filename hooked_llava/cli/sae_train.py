"""`hooked-llava sae train`: a sparse autoencoder of one hook, trained on a model's activations over images and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.command import command
from hooked_llava.cli.common import ModelOptions
from hooked_llava.cli.options import at_least
from hooked_llava.cli.terminal import busy, escape, say, show_table
from hooked_llava.errors import InputError

if TYPE_CHECKING:
    from hooked_llava.datasets import StudyRow
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.sae import LossRecovered, SparseAutoencoder, StepRecord

EMBEDDED_HOOK, EMBEDDED_WORLD = "blocks.0.hook_resid_pre", "tiny-shapes"
_WORLD_ROWS, _HELD_OUT, _BATCH = 4000, 64, 16
_LAST = 100  # steps over which the printed numbers are averaged


class TrainedKind(StrEnum):
    """How features are chosen. Matryoshka's nested widths are halves of halves."""

    topk = "topk"
    batch_topk = "batch_topk"
    jump_relu = "jump_relu"
    matryoshka = "matryoshka"


HookName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"The hook in the language tower. Default: in the embedded models {EMBEDDED_HOOK}."
    ),
]
Tokens = Annotated[str, typer.Option(metavar="SPAN", help="Whose activations: all, image, text, or another span.")]
Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="TABLE",
        help="A CSV file with the columns image and question, or tiny-shapes. Default: for the embedded models tiny-shapes.",
    ),
]
ImageFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Where the table's images are; or, with --question, the images themselves."),
]
Question = Annotated[str | None, typer.Option(metavar="QUESTION", help="What is asked about each image of --images.")]
Width = Annotated[int, at_least(1, help="Number of features.")]
Active = Annotated[int, at_least(1, "--k", help="Active features of a vector.")]
KindOption = Annotated[TrainedKind, typer.Option(help="How features are chosen.")]
Steps = Annotated[int, at_least(1, help="Steps of the optimizer.")]
BatchSize = Annotated[int, at_least(1, help="Activations in a step.")]
Buffer = Annotated[int, at_least(1, help="Activations that are mixed.")]
LearningRate = Annotated[
    float | None, typer.Option("--lr", metavar="X", help="The highest learning rate. Default: the paper's rule.")
]
DeadAfter = Annotated[int, at_least(1, help="A feature is dead if it was active at none of so many activations.")]
Seed = Annotated[int, at_least(0, help="Of the start values, and of the order of the activations.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the autoencoder goes.")]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep the run's state here; the same command again goes on where it stopped."),
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images and questions that the model is run on."""

    dataset: Dataset = None
    images: ImageFolder = None
    question: Question = None

    def rows(self, model: ModelOptions) -> list[StudyRow]:
        """The prompts, at least two; raises `InputError` for options that do not fit each other, and for unreadable tables."""
        if self.question is not None and (self.dataset is not None or self.images is None):
            raise InputError(
                "--question is asked about each image of a folder; give --images FOLDER, without --dataset."
            )
        if self.dataset is None and self.images is not None:
            rows = self._folder(self.images)
        elif self.dataset not in (None, EMBEDDED_WORLD):
            rows = self._table(Path(self.dataset))
        else:
            if self.dataset is None and not model.is_tiny_shapes:
                raise InputError(
                    f"There are no images for {model.model!r}; give --images FOLDER with --question, or --dataset TABLE."
                )
            if self.images is not None:
                raise InputError("--images belongs to a table that names its images; tiny-shapes draws its own.")
            from hooked_llava.toy.feature_tables import feature_rows

            rows = feature_rows(_WORLD_ROWS)
        if len(rows) < 2:
            raise InputError(f"There are {len(rows)} prompts; expected at least 2, of which one is held out.")
        return rows

    def _folder(self, folder: Path) -> list[StudyRow]:
        from hooked_llava.datasets import StudyRow
        from hooked_llava.datasets.rows import SUFFIXES, image_files

        if self.question is None:
            raise InputError(f"--images {folder} has no questions; give --question, or --dataset TABLE.")
        if not (found := image_files(folder)):
            raise InputError(f"--images {folder} holds no images ({', '.join(SUFFIXES)}); check the path.")
        return [StudyRow(id=path.name, question=self.question, answer="", image=path.resolve()) for path in found]

    def _table(self, path: Path) -> list[StudyRow]:
        import pandas as pd

        from hooked_llava.datasets import StudyRow

        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"--dataset {path} cannot be read as a CSV file ({reason}).") from error
        if missing := {"image", "question"} - set(table.columns):
            raise InputError(
                f"--dataset {path} has the columns {', '.join(table.columns)}; expected image and question, and "
                f"{' and '.join(sorted(missing))} is not there."
            )
        folder = (path.parent if self.images is None else self.images).resolve()
        pairs = zip(table["image"], table["question"], strict=True)
        return [
            StudyRow(id=str(row), question=question, answer="", image=folder / image if image else None)
            for row, (image, question) in enumerate(pairs)
        ]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The autoencoder, and how it is trained."""

    hook: HookName = None
    tokens: Tokens = "image"
    width: Width = 1024
    k: Active = 16
    kind: KindOption = TrainedKind.topk
    steps: Steps = 3000
    batch_size: BatchSize = 1024
    buffer: Buffer = 2**16
    lr: LearningRate = None
    dead_after: DeadAfter = 1_000_000
    seed: Seed = 0

    def hook_of(self, model: ModelOptions) -> str:
        """The hook; raises `InputError` where none was given and none is known to suit."""
        if self.hook is None and not model.is_tiny_shapes:
            raise InputError("There is no hook; name one of the language tower: --hook blocks.3.hook_resid_post.")
        return self.hook or EMBEDDED_HOOK

    def groups(self) -> tuple[int, ...]:
        """Nested widths of a Matryoshka autoencoder: an eighth, a quarter, a half, all."""
        if self.kind is not TrainedKind.matryoshka:
            return ()
        return tuple(sorted({max(1, self.width // part) for part in (8, 4, 2, 1)}))

    def trained(
        self, model: HookedLLaVA, hook: str, rows: Sequence[StudyRow], template: str | None, resume: Path | None
    ) -> tuple[SparseAutoencoder, list[StepRecord]]:
        """The autoencoder, and the record of every step of this call."""
        from hooked_llava.sae import activation_stream, train_sae

        records: list[StepRecord] = []
        stream = activation_stream(
            model,
            hook,
            rows,
            tokens=self.tokens,
            batch_size=self.batch_size,
            buffer=max(self.buffer, self.batch_size),
            seed=self.seed,
            epochs=None,
            template=template,
        )
        how = {"lr": self.lr, "dead_after": self.dead_after, "seed": self.seed, "on_step": records.append}
        size = {"kind": self.kind.value, "groups": self.groups(), "checkpoint_dir": resume}
        try:
            sae = train_sae(stream, self.width, self.k, steps=self.steps, **size, **how)  # type: ignore[arg-type]
        finally:
            stream.close()
        return sae, records


@command(
    "sae train --steps 3000 --out my-sae",
    'sae train --images photos --question "What is this?" --hook blocks.16.hook_resid_post --tokens all --width 65536 '
    "--k 64 --steps 50000 --out my-sae --resume my-run -m llava-hf/llava-1.5-7b-hf --dtype bfloat16",
)
def train(
    options: TrainOptions,
    data: DataOptions,
    model_options: ModelOptions,
    out: Out = Path("sae"),
    resume: Resume = None,
) -> None:
    """Train a sparse autoencoder of one hook, write it to a folder, and print what it explains and what the answers lose."""
    if out.is_file() or not out.expanduser().parent.is_dir():
        raise InputError(f"--out {out} is a file, or in a folder that does not exist; expected a folder's name.")
    file_format = "sparsify" if options.kind is TrainedKind.topk else "saelens"
    hook = options.hook_of(model_options)
    with busy("reading the prompts"):
        rows = data.rows(model_options)
    every = max(2, len(rows) // _HELD_OUT)
    held_out, rest = (
        rows[::every][:_HELD_OUT],
        [row for i, row in enumerate(rows) if i % every or i // every >= _HELD_OUT],
    )
    model = model_options.load()
    from hooked_llava.sae import save_sae

    sae, records = options.trained(model, hook, rest, model_options.template_name, resume)
    save_sae(sae, out, file_format=file_format)
    with busy("measuring what the answers lose"):
        kept = _kept(model, sae, held_out, options.tokens, model_options.template_name)
    _show(sae, records, kept)
    say(f"The autoencoder is in [bold]{escape(str(out))}[/bold].")


def _kept(
    model: HookedLLaVA, sae: SparseAutoencoder, rows: Sequence[StudyRow], tokens: str, template: str | None
) -> LossRecovered:
    """What the autoencoder keeps of the model's own answers to the prompts that were held out."""
    from hooked_llava.datasets import prepare_rows
    from hooked_llava.sae import loss_recovered

    parts = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
    return loss_recovered(model, sae, [prepare_rows(model, part, template=template) for part in parts], tokens=tokens)


def _show(sae: SparseAutoencoder, records: Sequence[StepRecord], kept: LossRecovered) -> None:
    """The numbers of the last steps, and those of the held-out answers."""
    last = records[-_LAST:]
    say(f"{sae.cfg.d_sae} features of [bold]{escape(str(sae.cfg.hook))}[/bold], kind {sae.cfg.kind}, k = {sae.cfg.k}.")
    if last:
        fvu, l0 = (sum(getattr(record, name) for record in last) / len(last) for name in ("fvu", "l0"))
        say(f"FVU {fvu:.4f}, L0 {l0:.1f}, dead {last[-1].dead:.1%} (the last {len(last)} steps).\n")
    else:
        say("The run was finished before; nothing was trained.\n")
    rows = [
        ["nothing", f"{kept.clean:.4f}", ""],
        ["the reconstruction", f"{kept.spliced:.4f}", f"{kept.answers_kept:.1%}"],
        ["their mean", f"{kept.mean_ablated:.4f}", f"{kept.answers_kept_mean:.1%}"],
        ["zeros", f"{kept.zero_ablated:.4f}", f"{kept.answers_kept_zero:.1%}"],
    ]
    columns = ["cross-entropy", "answers kept"]
    show_table([f"{kept.n_prompts} held-out prompts, replaced by", *columns], rows, right=columns)
    say(f"Cross-entropy recovered: {kept.recovered:.3f}, against the mean.")
