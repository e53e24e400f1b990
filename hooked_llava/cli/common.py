"""What commands are given: a model by name, a question and perhaps an image, a file to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_llava.cli.options import (
    EMBEDDED_MODEL,
    Device,
    DType,
    DTypeOption,
    First,
    Model,
    NoImage,
    Second,
    TemplateName,
    TraceWindow,
    TraceWindowReading,
    WindowReading,
)
from hooked_llava.cli.terminal import busy
from hooked_llava.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, how it is held, and the template that its prompts are written in."""

    model: Model = EMBEDDED_MODEL
    template: TemplateName = "default"
    device: Device = "auto"
    dtype: DTypeOption = None

    @property
    def is_tiny_shapes(self) -> bool:
        """Whether it is a checkpoint of `tiny-shapes`, about whose world edits have tables of questions."""
        from hooked_llava.loading.embedded import EMBEDDED

        return EMBEDDED.get(self.model, "").startswith("seed")

    @property
    def template_name(self) -> str | None:
        """The template as `prepare` takes it."""
        return None if self.template == "none" else self.template

    def load(self) -> HookedLLaVA:
        """The model, while a spinner turns."""
        return load_model(self.model, self.device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """How many layers a causal trace restores together, by the names that `causal_trace` has for it."""

    window: TraceWindow = 1
    window_reading: TraceWindowReading = WindowReading.centered


@dataclass(frozen=True, kw_only=True)
class PromptOptions(ModelOptions):
    """A question, perhaps about an image, and the model that is asked."""

    first: First = None
    second: Second = None
    no_image: NoImage = False

    @property
    def question(self) -> str:
        """The question; raises `InputError` where there is none."""
        return self._image_and_question()[1]

    def prepare(self) -> tuple[HookedLLaVA, Inputs]:
        """The model, and the question as it takes it; what is wrong with the image is said before the model is loaded."""
        image, question = self._image_and_question()
        opened = None if image is None else open_image(image)
        model = self.load()
        return model, model.prepare(question, opened, template=self.template_name)

    def _image_and_question(self) -> tuple[str | None, str]:
        first, second = self.first, self.second
        if first is None:
            raise InputError("There is no question; give one in quotes, after an image if it is about one.")
        if second is None:
            if not self.no_image and (_is_bundled(first) or Path(first).is_file()):
                raise InputError(f"There is an image, {first!r}, and no question; give one after it, in quotes.")
            return None, first
        if self.no_image:
            raise InputError(
                f"--no-image leaves only a question, but {first!r} is given before it; give the question alone, in quotes."
            )
        return first, second


def open_image(image: str) -> Image:
    """A file, or a bundled image by its name; raises `InputError` for anything else."""
    from hooked_llava.prompt.images import load_image

    return load_image(_image_path(image))


def _image_path(image: str) -> str:
    """A file, or where a bundled image is; a file comes before a bundled image of its name."""
    if Path(image).is_file():
        return image
    from hooked_llava.toy.images import NAMES, image_path

    if _is_bundled(image):
        return str(image_path(Path(image).stem))
    if Path(image).is_dir():
        raise InputError(f"The image {image!r} is a folder; give one file in it.")
    raise InputError(
        f"There is no image {image!r}: neither a file, nor a bundled image ({', '.join(NAMES)})."
        f"{did_you_mean(image, NAMES)}"
    )


def _is_bundled(image: str) -> bool:
    from hooked_llava.toy.images import NAMES

    return image in NAMES or image in {f"{name}.png" for name in NAMES}


def load_model(name: str, device: str, dtype: DType | None) -> HookedLLaVA:
    """The model, while a spinner turns."""
    with busy(f"loading {name}"):
        import torch
        from transformers.utils import logging

        from hooked_llava.model.llava import HookedLLaVA

        # Our own progress is shown; the bars of the libraries below would be a second one.
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        kind = None if dtype is None else getattr(torch, dtype.value)
        return HookedLLaVA.from_pretrained(name, device=chosen_device(device), dtype=kind)


def chosen_device(name: str) -> str:
    """The device that an option names; raises `ConfigError` for one that cannot be used here."""
    from hooked_llava.machine.devices import check_device
    from hooked_llava.machine.processes import own_accelerator

    if name == "auto":
        return own_accelerator() or "cpu"
    check_device(name, f"--device {name}", "cpu, cuda, cuda:1, ... or auto")
    return name


def check_writable(path: Path | None, option: str = "--output") -> None:
    """Raise `InputError` before the work is done, where the file cannot be written after it; None is no file."""
    if path is not None and (path.is_dir() or not path.expanduser().parent.is_dir()):
        problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise InputError(f"{option} {path} {problem}; expected a file name in an existing folder.")
