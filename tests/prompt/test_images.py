from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from hooked_llava.errors import InputError
from hooked_llava.experiments.pairs import without_object
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.images import load_image, upright_size

HEIGHT, WIDTH = 6, 8
COLORS = np.array([[200, 30, 40], [20, 180, 60], [10, 90, 220], [120, 120, 120]], dtype=np.uint8)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def indices() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)


def as_array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colors * share + 255 * (1 - share))


def png(depth: int, color_type: int, values: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG file of any bit depth, as the specification says; the values are [row, number]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(len(values), -1, 2), axis=-1)[..., 16 - depth :]
    rows = np.packbits(bits.reshape(len(values), -1), axis=-1)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color_type, 0, 0, 0)
    before = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def everywhere(data: bytes, folder: Path, suffix: str = ".png") -> list[np.ndarray]:
    """One file loaded as a path, as a PIL image fresh from the file, and as an array of the result."""
    path = folder / f"image{suffix}"
    path.write_bytes(data)
    loaded = load_image(path)
    return [
        as_array(loaded),
        as_array(load_image(str(path))),
        as_array(load_image(Image.open(io.BytesIO(data)))),
        as_array(load_image(loaded)),
        as_array(load_image(np.asarray(loaded))),
    ]


def test_every_kind_gives_the_same_image(pixels: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(pixels)
    image.save(tmp_path / "star.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    opaque = np.concatenate([pixels, np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)], axis=2)
    for given in (
        image,
        pixels,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        (pixels / 255).astype(np.float16),
        pixels.astype(np.uint16) * 257,
        pixels.astype(">u2") * 256,
        opaque,
        opaque / 255,
        tensor,
        tensor / 255,
        (tensor / 255).double(),
        torch.from_numpy(opaque).permute(2, 0, 1),
        tmp_path / "star.png",
        str(tmp_path / "star.png"),
        np.asfortranarray(pixels),
        pixels[::-1][::-1],
    ):
        np.testing.assert_array_equal(as_array(load_image(given)), pixels)


def test_grey_arrays(pixels: np.ndarray) -> None:
    values = pixels[..., 0]
    for given in (
        values,
        values[..., None],
        values / 255,
        values.astype(np.uint16) * 257,
        np.stack([values, np.full_like(values, 255)], axis=-1),
        torch.from_numpy(values),
        torch.from_numpy(values)[None],
        Image.fromarray(values),
        Image.fromarray(values.astype(np.uint16) * 257),
    ):
        np.testing.assert_array_equal(as_array(load_image(given)), grey(values))
    for given in (values > 127, Image.fromarray(values > 127), torch.from_numpy(values > 127)):
        np.testing.assert_array_equal(as_array(load_image(given)), grey(np.where(values > 127, 255, 0)))
    assert load_image(torch.rand(4, 5, 7).to(torch.bfloat16)).size == (7, 5)


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "YCbCr", "HSV", "CMYK", "LAB"])
def test_color_modes(mode: str, pixels: np.ndarray, tmp_path: Path) -> None:
    smooth = Image.fromarray(pixels)
    if mode == "LAB":
        srgb, lab = (ImageCms.ImageCmsProfile(ImageCms.createProfile(space)) for space in ("sRGB", "LAB"))
        given = ImageCms.ImageCmsTransform(srgb, lab, "RGB", "LAB").apply(smooth)
    else:
        given = smooth.convert(mode)
    # 8 bits in another color space lose a little, most in LAB's saturated colors; in CMYK and RGB nothing.
    allowed = {"LAB": 20, "HSV": 6, "YCbCr": 3}.get(mode, 0)
    difference = np.abs(as_array(load_image(given)).astype(int) - pixels)
    assert difference.max() <= allowed
    assert difference.mean() <= 2
    if mode in ("CMYK", "LAB", "YCbCr"):
        given.save(tmp_path / "image.tif")
        assert np.abs(as_array(load_image(tmp_path / "image.tif")).astype(int) - pixels).max() <= allowed


@pytest.mark.parametrize("mode", ["LA", "RGBA", "La", "RGBa", "PA"])
def test_transparency_lies_on_white(mode: str, pixels: np.ndarray) -> None:
    alpha = np.random.default_rng(2).choice(np.array([0, 64, 200, 255], dtype=np.uint8), (HEIGHT, WIDTH))
    alpha[0, :4] = [0, 64, 200, 255]
    colors = grey(pixels[..., 0]) if "L" in mode else COLORS[indices()] if mode == "PA" else pixels
    if mode == "PA":
        given = Image.fromarray(indices()).convert("P")
        given.putpalette(COLORS.tobytes())
        given = given.convert("PA")
        given.putalpha(Image.fromarray(alpha))
    else:
        full = Image.fromarray(np.concatenate([colors, alpha[..., None]], axis=2))
        given = full.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    assert given.mode == mode
    seen, expected = as_array(load_image(given)).astype(int), on_white(colors, alpha)
    assert (seen[alpha == 0] == 255).all()
    np.testing.assert_array_equal(seen[alpha == 255], colors[alpha == 255])
    assert np.abs(seen - expected).max() <= (3 if mode in ("La", "RGBa") else 1)
    if mode in ("LA", "RGBA"):  # the same as an array
        np.testing.assert_array_equal(seen, as_array(load_image(np.asarray(given))))
        np.testing.assert_array_equal(seen, as_array(load_image(np.asarray(given) / 255)))
        np.testing.assert_array_equal(seen, as_array(load_image(torch.from_numpy(np.array(given)).permute(2, 0, 1))))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_grey_png_of_every_depth(depth: int, transparent: bool, tmp_path: Path) -> None:
    top = 2**depth - 1
    values = np.random.default_rng(depth).integers(0, top + 1, (HEIGHT, WIDTH))
    values[0] = [0, top, 1, 0, top // 2, top // 3, top, 1]
    key = 1
    expected = values >> 8 if depth == 16 else values * (255 // top)
    expected = grey(np.where(transparent & (values == key), 255, expected))
    data = png(depth, 0, values, **({"tRNS": struct.pack(">H", key)} if transparent else {}))
    for seen in everywhere(data, tmp_path):
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_rgb_png_of_every_depth(depth: int, transparent: bool, tmp_path: Path) -> None:
    scale = 1 if depth == 8 else 257
    values = COLORS[indices()].astype(int) * scale
    key = COLORS[2].astype(int) * scale
    expected = np.where(transparent & (indices() == 2)[..., None], 255, COLORS[indices()])
    data = png(depth, 2, values.reshape(HEIGHT, -1), **({"tRNS": struct.pack(">3H", *key)} if transparent else {}))
    for seen in everywhere(data, tmp_path):
        np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize("depth", [2, 4, 8])
@pytest.mark.parametrize("alpha", [None, [255, 0], [255, 255, 0], [0, 128, 255, 30]])
def test_palette_png_of_every_depth(depth: int, alpha: list[int] | None, tmp_path: Path) -> None:
    chunks = {"PLTE": COLORS.tobytes()} | ({"tRNS": bytes(alpha)} if alpha else {})
    full = np.array([*(alpha or []), *[255] * 4][:4])
    expected = on_white(COLORS[indices()], full[indices()])
    for seen in everywhere(png(depth, 3, indices().astype(int), **chunks), tmp_path):
        assert np.abs(seen - expected).max() <= 1
        np.testing.assert_array_equal(seen[full[indices()] == 255], expected[full[indices()] == 255])
        assert (seen[full[indices()] == 0] == 255).all()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("color_type", [4, 6])
def test_png_with_alpha_of_every_depth(depth: int, color_type: int, pixels: np.ndarray, tmp_path: Path) -> None:
    colors = pixels if color_type == 6 else pixels[..., :1]
    alpha = np.where(indices() > 1, 255, np.where(indices() > 0, 100, 0))
    values = np.concatenate([colors, alpha[..., None]], axis=2).astype(int) * (1 if depth == 8 else 257)
    expected = on_white(np.broadcast_to(colors, pixels.shape), alpha)
    for seen in everywhere(png(depth, color_type, values.reshape(HEIGHT, -1)), tmp_path):
        assert np.abs(seen - expected).max() <= 1


def test_a_transparent_color_that_came_along_counts(tmp_path: Path) -> None:
    """PIL keeps which color of a palette was transparent when it converts to RGB."""
    data = png(8, 3, indices().astype(int), PLTE=COLORS.tobytes(), tRNS=bytes([255, 0]))
    expected = everywhere(data, tmp_path)[0]
    converted = Image.open(io.BytesIO(data)).convert("RGB")
    assert converted.info["transparency"] == tuple(COLORS[1].tolist())
    np.testing.assert_array_equal(as_array(load_image(converted)), expected)
    stray = Image.fromarray(COLORS[indices()])
    for key in (b"\0\1", 3, "none"):  # what fits no RGB image
        stray.info["transparency"] = key
        np.testing.assert_array_equal(as_array(load_image(stray)), COLORS[indices()])


def test_integers_and_floats_of_32_bits(pixels: np.ndarray, tmp_path: Path) -> None:
    values = pixels[..., 0]
    for given in (
        Image.fromarray(values).convert("I"),
        Image.fromarray(values).convert("F"),
        Image.fromarray(values.astype(np.int32) * 257),
        Image.fromarray((values / 255).astype(np.float32)),
    ):
        np.testing.assert_array_equal(as_array(load_image(given)), grey(values))
        given.save(tmp_path / "image.tif")
        np.testing.assert_array_equal(as_array(load_image(tmp_path / "image.tif")), grey(values))
    for given, said in (
        (Image.fromarray(np.full((2, 2), -1, dtype=np.int32)), "mode 'I'.*values.*-1 to -1.*0 to 255"),
        (Image.fromarray(np.full((2, 2), 1 << 20, dtype=np.int32)), r"mode 'I'.*values.*1\.04858e\+06"),
        (
            Image.fromarray(np.full((2, 2), 300, dtype=np.float32)),
            "mode 'F'.*values.*300 to 300.*0 to 1",
        ),
        (Image.fromarray(np.full((2, 2), np.nan, dtype=np.float32)), "mode 'F'.*values.*nan to nan"),
    ):
        with pytest.raises(InputError, match=said):
            load_image(given)


# What each EXIF orientation stores, given the upright image (rows first).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_every_orientation_becomes_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    upright = np.zeros((48, 80, 3), dtype=np.uint8)
    upright[:16, :32] = [250, 250, 250]
    upright[32:, 64:] = [120, 120, 120]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{kind}"
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(path, exif=exif, quality=100)
    opened = Image.open(io.BytesIO(path.read_bytes()))
    for seen in (load_image(path), load_image(opened), load_image(opened.convert("RGB"))):
        assert seen.size == (80, 48)
        assert np.abs(as_array(seen).astype(int) - upright).max() <= 12  # what JPEG loses
        np.testing.assert_array_equal(as_array(seen), as_array(load_image(path)))
        np.testing.assert_array_equal(as_array(load_image(seen)), as_array(seen))  # and not turned twice
    assert upright_size(Image.open(io.BytesIO(path.read_bytes()))) == upright_size(opened) == (80, 48)
    turned = ImageOps.exif_transpose(opened)
    np.testing.assert_array_equal(as_array(load_image(turned)), as_array(load_image(path)))
    if kind != "tif":  # which PIL itself turns as soon as it decodes it
        assert opened.getexif().get(0x0112, 1) == orientation  # the caller's image stays as it is


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_are_no_orientation(pixels: np.ndarray, tmp_path: Path) -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
        np.testing.assert_array_equal(as_array(load_image(tmp_path / "image.png")), pixels)
    for orientation in (0, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
        np.testing.assert_array_equal(as_array(load_image(tmp_path / "image.png")), pixels)


def test_a_turned_image_with_transparency(tmp_path: Path) -> None:
    upright = np.zeros((4, 6, 4), dtype=np.uint8)
    upright[..., :3], upright[..., 3] = 50, 255
    upright[0, 0, 3] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(STORED[6](upright))).save(tmp_path / "image.png", exif=exif)
    expected = np.full((4, 6, 3), 50)
    expected[0, 0] = 255
    np.testing.assert_array_equal(as_array(load_image(tmp_path / "image.png")), expected)
    values = np.full((4, 6), 50 * 257, dtype=np.uint16)
    values[0, 0] = 7
    path = tmp_path / "grey.png"
    Image.fromarray(np.ascontiguousarray(STORED[8](values))).save(path, exif=_exif(8), transparency=7)
    np.testing.assert_array_equal(as_array(load_image(path)), expected)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"image.{kind}", save_all=True, append_images=frames[1:], lossless=True)
    seen = as_array(load_image(tmp_path / f"image.{kind}"))
    np.testing.assert_array_equal(seen, np.full((6, 8, 3), [255, 0, 0]))
    later = Image.open(io.BytesIO((tmp_path / f"image.{kind}").read_bytes()))
    later.seek(1)
    np.testing.assert_array_equal(as_array(load_image(later)), np.full((6, 8, 3), [0, 0, 255]))


def test_a_transparent_gif(tmp_path: Path) -> None:
    image = Image.fromarray(indices()).convert("P")
    image.putpalette(COLORS.tobytes())
    image.save(tmp_path / "image.gif", transparency=2)
    seen = as_array(load_image(tmp_path / "image.gif"))
    np.testing.assert_array_equal(seen, np.where((indices() == 2)[..., None], 255, COLORS[indices()]))


def test_the_result_is_its_own(pixels: np.ndarray) -> None:
    given = Image.fromarray(pixels)
    seen = load_image(given)
    seen.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(given), pixels)


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_pretrained("tiny-shapes")


@pytest.mark.parametrize("color_type", [0, 2, 3])
def test_inputs_show_what_the_model_sees(color_type: int, model: HookedLLaVA, tmp_path: Path) -> None:
    """A transparent color: `images` processed by transformers are the pixels, and an edit changes what is under its box."""
    where = indices()
    values = {0: COLORS[where][..., 0], 2: COLORS[where].reshape(HEIGHT, -1), 3: where}[color_type]
    key = {0: COLORS[1:2, 0].astype(">u2").tobytes(), 2: COLORS[1].astype(">u2").tobytes(), 3: b"\xff\0"}[color_type]
    chunks = {"PLTE": COLORS.tobytes()} if color_type == 3 else {}
    (tmp_path / "image.png").write_bytes(png(8, color_type, values.astype(int), **chunks, tRNS=key))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = model.prepare("What color is the star?", images=tmp_path / "image.png")
    assert inputs.images is not None
    assert inputs.pixel_values is not None
    again = model.processor.image_processor(images=inputs.images[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs.pixel_values, again)
    before = np.asarray(inputs.images[0])
    assert (before[where == 1] == 255).all()
    edited = without_object(model, inputs, (0, 0, 2, 3))
    assert edited.images is not None
    changed = (np.asarray(edited.images[0]) != before).any(-1)
    assert changed[3:].sum() == changed[:, 2:].sum() == 0
    assert changed.any()


def test_what_a_processor_made_stays_as_it_is(model: HookedLLaVA, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=_exif(6))
    opened = Image.open(io.BytesIO((tmp_path / "image.png").read_bytes()))
    text = "USER: <image>\nWhat color is the star? Answer briefly. ASSISTANT:"
    encoded = model.processor(text=text, images=opened, return_tensors="pt")
    ours, kept = model.prepare("What color is the star?", images=opened), model.as_inputs(encoded)
    assert ours.pixel_values is not None
    assert kept.pixel_values is not None
    assert torch.equal(kept.pixel_values, encoded["pixel_values"])
    assert torch.equal(ours.input_ids, encoded["input_ids"])
    assert not torch.equal(ours.pixel_values, encoded["pixel_values"])  # the deviation: upright
    turned = model.processor(text=text, images=ImageOps.exif_transpose(opened), return_tensors="pt")
    assert torch.equal(ours.pixel_values, turned["pixel_values"])


def test_files_that_cannot_be_read(tmp_path: Path, pixels: np.ndarray) -> None:
    missing = tmp_path / "no.png"
    with pytest.raises(InputError, match=f"image.*path {re.escape(repr(str(missing)))}.*file"):
        load_image(missing)
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(InputError, match=f"Image 3.*file {re.escape(repr(str(text)))}.*image"):
        load_image(text, "Image 3")
    big = np.tile(pixels, (30, 30, 1))
    for kind in ("png", "jpg", "gif", "tif", "webp"):
        cut = tmp_path / f"cut.{kind}"
        Image.fromarray(big).save(cut)
        opened = Image.open(io.BytesIO(cut.read_bytes()[: cut.stat().st_size // 2])) if kind in ("png", "jpg") else None
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
        with pytest.raises(InputError, match=r"cut\." + kind):
            load_image(cut)
        if opened is not None:
            with pytest.raises(InputError, match=r"PIL image of mode RGB.*damaged.*\("):
                load_image(opened)
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    with pytest.raises(InputError, match="file '.*'.*PIL.*PNG, JPEG"):
        load_image(empty)
    with pytest.raises(InputError, match="no file"):
        load_image(tmp_path)
    (tmp_path / "good.png").write_bytes(png(8, 0, pixels[..., 0].astype(int)))
    with Image.open(tmp_path / "good.png") as closed:
        pass
    with pytest.raises(InputError, match="PIL image of mode L.*damaged, cut short"):
        load_image(closed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            5,
            r"image.*int.*path.*PIL image.*array \[height, width, 3\] \(uint8, uint16, bool",
        ),
        (None, "image.*NoneType.*path"),
        (b"\x89PNG", "image.*bytes.*path"),
        (b"\x89PNG", r"bytes.*PIL\.Image\.open\(io\.BytesIO\(\.\.\.\)\)"),
        (io.BytesIO(b"\x89PNG"), "image.*BytesIO.*path"),
        (io.BytesIO(b"\x89PNG"), r"PIL\.Image\.open\("),
        ("https://example.org/star.png", r"'https://example\.org/star\.png'.*file.*path"),
        ("iVBORw0KGgo" * 1000, r"\.\.\. \(11000 characters\).*file.*path"),
        ("", "image.*path ''.*file"),
        (torch.zeros(1, 3, 5, 7), r"image.*tensor.*1 x 3 x 5 x 7.*\[3, height, width\]"),
        (np.zeros((2, 5, 7, 3)), r"image.*array.*2 x 5 x 7 x 3.*\[height, width, 3\]"),
        (
            np.zeros((3, 5, 7)),
            r"array.*3 x 5 x 7.*\[height, width, 3\] \(or \[height, width\]\).*image",
        ),
        (np.zeros((3, 5, 7)), r"\[3, height, width\].*np\.moveaxis\(array, 0, -1\)"),
        (torch.zeros(5, 7, 3), r"image.*tensor.*5 x 7 x 3.*\[3, height, width\]"),
        (torch.zeros(5, 7, 3), r"\[height, width, 3\].*tensor\.permute\(2, 0, 1\)"),
        (np.zeros((0, 7, 3)), r"image.*array.*0 x 7 x 3.*\[height, width, 3\]"),
        (np.zeros((5, 7, 5)), r"image.*array.*5 x 7 x 5.*\[height, width, 3\]"),
        (np.zeros(5), r"image.*array.*5.*\[height, width, 3\]"),
        (Image.new("RGB", (0, 4)), r"image.*pixels \(0 x 4\)"),
        (
            np.zeros((5, 7, 3), dtype=np.int64),
            r"values.*int64.*uint8 \(0 to 255\), uint16 \(0 to 65535\), bool",
        ),
        (np.full((5, 7), 200, dtype=np.uint16), "values.*uint16.*200"),
        (np.full((5, 7, 3), -1.5), r"float values.*-1\.5 to -1\.5.*0 to 1.*image.*not"),
        (np.full((5, 7, 3), np.nan), "float values.*nan to nan.*0 to 1"),
        (torch.full((3, 5, 7), 200.0), "float values.*200 to 200.*0 to 1"),
    ],
)
def test_what_is_no_image(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_image(given)


def test_a_tensor_with_gradients_is_taken() -> None:
    assert load_image(torch.rand(3, 5, 7, requires_grad=True)).size == (7, 5)
