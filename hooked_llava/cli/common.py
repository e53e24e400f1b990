"""What commands are given: a question and perhaps an image, a model by name, a file to write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hooked_llava.cli.options import DType
from hooked_llava.cli.terminal import busy
from hooked_llava.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs


def split_arguments(first: str | None, second: str | None, no_image: bool) -> tuple[str | None, str]:
    """The image, if any, and the question."""
    if first is None:
        raise InputError("There is no question; give one in quotes, after an image if it is about one.")
    if second is None:
        if not no_image and (_is_bundled(first) or Path(first).is_file()):
            raise InputError(f"There is an image, {first!r}, and no question; give one after it, in quotes.")
        return None, first
    if no_image:
        raise InputError(
            f"--no-image leaves only a question, and {first!r} stands before it; give the question alone, in quotes."
        )
    return first, second


def prepare(
    name: str, image: str | None, question: str, template: str, device: str, dtype: DType | None
) -> tuple[HookedLLaVA, Inputs]:
    """The model, and the question as it takes it; what is wrong with the image is said before the model is loaded."""
    opened = None if image is None else open_image(image)
    model = load_model(name, device, dtype)
    return model, model.prepare(question, opened, template=template_name(template))


def template_name(template: str) -> str | None:
    """The option as `prepare` takes it."""
    return None if template == "none" else template


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

        from hooked_llava.model.llava import HookedLLaVA

        _quiet()
        kind = None if dtype is None else getattr(torch, dtype.value)
        return HookedLLaVA.from_pretrained(name, device=_device(device), dtype=kind)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        why = "torch knows no such device" if "device string" in said else said
        raise InputError(
            f"--device {name} cannot be used here ({why}); expected cpu, cuda, cuda:1, ... or auto."
        ) from None
    return name


def _quiet() -> None:
    """Our own progress is shown; the bars of the libraries below would be a second one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_writable(path: Path, option: str = "--output") -> None:
    """Said before the work is done, not after."""
    if path.is_dir() or not path.expanduser().parent.is_dir():
        problem = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise InputError(f"{option} {path} {problem}; expected a file name in an existing folder.")
