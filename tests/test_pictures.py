from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hooked_llava.errors import InputError
from hooked_llava.pictures import load_picture


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def as_array(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_every_kind_gives_the_same_picture(pixels: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "star.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for given in (
        picture,
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        tensor,
        tensor / 255,
        (tensor / 255).double(),
        tmp_path / "star.png",
        str(tmp_path / "star.png"),
        np.asfortranarray(pixels),
    ):
        np.testing.assert_array_equal(as_array(load_picture(given)), pixels)


def test_every_mode_becomes_rgb(pixels: np.ndarray, tmp_path: Path) -> None:
    picture = Image.fromarray(pixels)
    for mode in ("L", "LA", "P", "RGBA", "CMYK", "YCbCr", "1", "HSV", "I", "F"):
        assert load_picture(picture.convert("L" if mode in "IF" else "RGB").convert(mode)).mode == "RGB"
    palette = picture.convert("P")
    palette.save(tmp_path / "star.gif", transparency=0)
    assert load_picture(tmp_path / "star.gif").size == (7, 5)
    grey = load_picture(pixels[..., 0])
    np.testing.assert_array_equal(as_array(grey), np.repeat(pixels[..., :1], 3, axis=2))
    np.testing.assert_array_equal(as_array(load_picture(pixels[..., :1])), as_array(grey))
    np.testing.assert_array_equal(as_array(load_picture(torch.from_numpy(pixels[..., 0]))), as_array(grey))
    assert as_array(load_picture(pixels[..., 0] > 127)).max() == 255
    assert load_picture(torch.rand(4, 5, 7).to(torch.bfloat16)).size == (7, 5)


def test_files_that_cannot_be_read(tmp_path: Path, pixels: np.ndarray) -> None:
    missing = tmp_path / "no.png"
    with pytest.raises(
        InputError, match=re.escape(f"The picture is the path {str(missing)!r}, where there is no file; ")
    ):
        load_picture(missing)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(
        InputError, match=re.escape(f"Picture 3 is the file {str(text)!r}, which is not a picture that PIL ")
    ):
        load_picture(text, "Picture 3")
    cut = tmp_path / "cut.png"
    Image.fromarray(np.tile(pixels, (30, 30, 1))).save(cut)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(InputError, match=r"which is damaged or cut short \(.*\); get the file anew\."):
        load_picture(cut)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "The picture is a int; expected a path, a PIL picture, a numpy array [height, width, 3] (uint8, or floats"),
        (None, "The picture is a NoneType; expected a path"),
        (torch.zeros(1, 3, 5, 7), "The picture is a tensor of shape (1, 3, 5, 7); expected [3, height, width]."),
        (np.zeros((2, 5, 7, 3)), "The picture is an array of 2 x 5 x 7 x 3; expected [height, width, 3]"),
        (
            np.zeros((3, 5, 7)),
            "The picture is an array of 3 x 5 x 7; expected [height, width, 3] (a torch tensor: [3, ",
        ),
        (torch.zeros(5, 7, 3), "The picture is an array of 7 x 3 x 5; expected [height, width, 3]"),
        (np.zeros((0, 7, 3)), "The picture is an array of 0 x 7 x 3; expected [height, width, 3]"),
        (Image.new("RGB", (0, 4)), "The picture has no pixels (0 x 4); give one with an area."),
        (
            np.zeros((5, 7, 3), dtype=np.int64),
            "has values of type int64; expected uint8 (0 to 255) or floats from 0 to 1",
        ),
        (
            np.full((5, 7, 3), -1.5),
            "has float values from -1.5 to -1.5; expected 0 to 1. Give the picture itself (not ",
        ),
        (np.full((5, 7, 3), np.nan), "has float values from nan to nan; expected 0 to 1."),
        (torch.full((3, 5, 7), 200.0), "has float values from 200 to 200; expected 0 to 1."),
    ],
)
def test_what_is_no_picture(given: object, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_picture(given)


def test_a_tensor_with_gradients_is_taken() -> None:
    assert load_picture(torch.rand(3, 5, 7, requires_grad=True)).size == (7, 5)
