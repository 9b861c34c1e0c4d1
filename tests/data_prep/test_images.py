"""Image files as the web has them: each is read as it was meant, or refused with the reason, and nothing else."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.images import Unusable, bucket, decode, fit

WIDTH, HEIGHT = 60, 40


def smooth(width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """A picture that survives JPEG: uint8 (H W 3), no two of its corners alike."""
    coarse = np.random.default_rng(seed).integers(30, 226, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def file(image: np.ndarray | Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def read(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB, which Pillow does not write."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_are_read_to_the_bit(kind: str) -> None:
    assert (read(file(smooth(), kind)) == smooth()).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "JPEG2000", "AVIF", "GIF"])
def test_other_files_are_read_closely(kind: str) -> None:
    assert np.abs(read(file(smooth(), kind)) - smooth()).mean() < 4


def test_cmyk_jpegs_have_their_colours_and_not_the_inverse() -> None:
    data = file(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(read(data) - smooth()).mean() < 4


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette_become_rgb(mode: str) -> None:
    image = Image.fromarray(smooth()).convert(mode)
    assert (read(file(image)) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_cut_off(kind: str) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    assert (read(file(ramp, kind)) == np.arange(256)[None, :, None]).all()


def test_big_endian_sixteen_bit_grey_is_scaled_too() -> None:
    ramp = np.linspace(0, 65535, 256).astype(">u2")[None].repeat(4, 0)
    image = Image.frombytes("I;16B", (256, 4), ramp.tobytes())
    assert (read(file(image, "TIFF")) == np.arange(256)[None, :, None]).all()


def test_sixteen_bit_colour_is_scaled() -> None:
    assert np.abs(read(png16(smooth().astype(np.uint16) * 257)) - smooth()).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, : WIDTH // 3], alpha[:, -WIDTH // 3 :] = 0, 128
    grey = Image.fromarray(smooth()).convert("L").convert("RGB") if mode == "LA" else Image.fromarray(smooth())
    image = grey.convert(mode)
    image.putalpha(Image.fromarray(alpha))
    got, plain = read(file(image)), np.asarray(grey).astype(int)
    assert (got[:, : WIDTH // 3] == 255).all()
    assert (got[:, WIDTH // 3 : -WIDTH // 3] == plain[:, WIDTH // 3 : -WIDTH // 3]).all()
    assert np.abs(got[:, -WIDTH // 3 :] - (plain[:, -WIDTH // 3 :] + 255) / 2).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_becomes_white(kind: str) -> None:
    image = Image.new("P", (WIDTH, HEIGHT), 1)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 20, HEIGHT))
    got = read(file(image, kind, transparency=0))
    assert (got[:, :20] == 255).all()
    assert (got[:, 20:] == (0, 0, 200)).all()


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (1, 2, 3)), ("L", 7)])
def test_a_transparent_colour_without_palette_becomes_white(mode: str, colour: object) -> None:
    image = Image.new(mode, (8, 8), colour)
    image.putpixel((3, 4), 0 if mode == "L" else (0, 0, 0))
    got = read(file(image, transparency=colour))
    assert (got[4, 3] == 0).all()
    assert (got.sum((0, 1)) == 255 * 63).all()


ORIENTATIONS = {  # EXIF's number: what the stored pixels are of the upright ones
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("number", ORIENTATIONS)
def test_exif_orientation_is_applied(number: int, kind: str) -> None:
    stored = np.ascontiguousarray(ORIENTATIONS[number](smooth()))
    exif = Image.Exif()
    exif[0x0112] = number
    got = read(file(stored, kind, exif=exif, **({} if kind == "PNG" else {"quality": 95})))
    assert got.shape == smooth().shape
    assert np.abs(got - smooth()).mean() < 4


def test_exif_that_cannot_be_read_loses_nothing_else() -> None:
    good = file(smooth(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    assert decode(good).size == (HEIGHT, WIDTH)
    broken = good.replace(b"Exif\0\0MM\0*", b"Exif\0\0XX\xff\xff")
    assert decode(broken).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_animations_and_pages_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (read(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_a_truncated_file_is_refused(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file(noise, kind)
    with pytest.raises(Unusable, match="broken image|not an image"):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),  # would run a program
        (file(np.zeros((2, 2), np.float32), "TIFF"), "no 8-bit or 16-bit channels"),
        (file(Image.new("LAB", (2, 2)), "TIFF"), "no 8-bit or 16-bit channels"),
        (file(np.array([[-1, 70000]], np.int32), "TIFF"), "no 8-bit or 16-bit channels"),
        (file(Image.new("1", (20_000, 9_000))), "too many pixels"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as refusal:
        decode(data)
    assert refusal.value.reason == reason


def test_a_picture_12000_pixels_wide_is_read_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(file(Image.new("L", (12_000, 9_000)), "PNG", compress_level=1)).size == (12_000, 9_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
def test_any_damage_is_refused_or_read_and_never_raises_otherwise(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data, chance = file(smooth(), kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {})), random.Random(0)
    reasons = set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 4, 30])):
            damaged[chance.randrange(min(len(data), 300))] = chance.randrange(256)
        try:
            decode(bytes(damaged))
        except Unusable as why:
            reasons.add(why.reason)
    assert reasons <= {"broken image", "not an image", "too many pixels", "no 8-bit or 16-bit channels"}
    assert reasons


SIZES = [(64, 64), (96, 64), (64, 96)]


@pytest.mark.parametrize(
    ("image", "sizes", "expected"),
    [
        ((480, 400), SIZES, (64, 64)),
        ((500, 400), SIZES, (96, 64)),
        ((600, 400), SIZES, (96, 64)),
        ((400, 900), SIZES, (64, 96)),
        ((12_000, 70), SIZES, (96, 64)),
        ((64, 64), SIZES, (64, 64)),
        ((100, 100), [(128, 128), (64, 64), (96, 96)], (96, 96)),  # the largest that it covers
        ((1000, 500), [(64, 64), (48, 32)], (48, 32)),
    ],
)
def test_the_size_is_that_of_nearest_aspect(image: tuple, sizes: list, expected: tuple) -> None:
    assert bucket(*image, sizes) == expected


@pytest.mark.parametrize("image", [(1, 1), (63, 64), (64, 63), (12_000, 63), (95, 64), (90, 60)])
def test_an_image_is_never_enlarged(image: tuple[int, int]) -> None:
    with pytest.raises(Unusable, match=f"too small: {image[0]}x{image[1]} would have to be enlarged to "):
        bucket(*image, SIZES)


def test_the_middle_is_kept_and_all_of_one_side() -> None:
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = smooth(100, 100)  # what a square crop keeps
    got = fit(file(picture), [(50, 50)])
    assert (got.kind, got.width, got.height) == ("jpg", 50, 50)
    assert np.abs(read(got.data) - smooth(50, 50)).mean() < 4
    upright = fit(file(np.ascontiguousarray(picture.transpose(1, 0, 2))), [(50, 50)])
    assert np.abs(read(upright.data) - smooth(50, 50).transpose(1, 0, 2)).mean() < 4


def test_orientation_is_applied_before_the_size_is_chosen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    got = fit(file(smooth(192, 128), "JPEG", exif=exif), SIZES)
    assert (got.width, got.height) == (64, 96)


def test_jpeg_keeps_all_colour_at_quality_95() -> None:
    got = Image.open(io.BytesIO(fit(file(smooth(100, 100)), [(64, 64)]).data))
    assert got.format == "JPEG"
    assert [component[1:3] for component in got.layer] == [(1, 1)] * 3  # no subsampling
    assert got.quantization == Image.open(io.BytesIO(file(smooth(), "JPEG", quality=95))).quantization


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_a_file_that_fits_is_kept_to_the_byte(kind: str, suffix: str) -> None:
    data = file(smooth(64, 64), kind)
    assert fit(data, SIZES) == (data, suffix, 64, 64)


def not_plain() -> dict[str, bytes]:
    image = Image.fromarray(smooth(64, 64))
    exif = Image.Exif()
    exif[0x0112] = 3
    return {
        "rotated": file(image, "JPEG", exif=exif),
        "cmyk": file(image.convert("CMYK"), "JPEG"),
        "grey": file(image.convert("L")),
        "alpha": file(image.convert("RGBA")),
        "animated": file(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
        "lossless but rare": file(image, "BMP"),
    }


@pytest.mark.parametrize("name", not_plain())
def test_a_file_that_training_might_read_otherwise_is_written_anew(name: str) -> None:
    data = not_plain()[name]
    got = fit(data, SIZES)
    assert got.data != data
    assert got.kind == "jpg"
    assert np.abs(read(got.data) - read(data)).mean() < 4


def test_the_same_file_gives_the_same_bytes() -> None:
    data = file(smooth(200, 150), "WEBP")
    assert fit(data, SIZES) == fit(data, SIZES)
