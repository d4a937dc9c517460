"""Pictures as a viewer shows them: formats, grey of 16 bits, transparency, ink, orientation, thin ones, strangers."""
import io, os, struct, zlib

import numpy as np
import pytest
from PIL import features, Image, ImageCms

from data_files import refused
from mcl_repro.core.errors import DataError
from mcl_repro.data import pictures
from mcl_repro.data.pairs import FileImages
from mcl_repro.data.pictures import as_rgb, decode, file_kind, PICTURE_ENDINGS, picture_formats, square

STEPS = np.arange(256, dtype=np.uint16).reshape(16, 16)      # all that 8 bits can say
GREY = np.repeat(STEPS[..., None], 3, 2).astype(np.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).choice(np.array([0, 7, 128, 255], np.uint8), (12, 16))
needs_avif = pytest.mark.skipif("AVIF" not in picture_formats(), reason="this Pillow has no AVIF")


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()

def on_white(colours, alpha):
    share = alpha[..., None]/255
    return np.rint(colours*share + 255*(1 - share)).astype(np.uint8)

def far(a, b):
    "The largest difference."
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())

def tiff(values, photometric=1, kind=1, end="<", bits=None, extra=()):
    "A TIFF file as Pillow would not write it; `kind`: 1 whole numbers, 2 with a sign, 3 floats."
    height, width, channels = (*values.shape, 1)[:3]
    pixels = values.astype(values.dtype.newbyteorder(end)).tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2)
        parts = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
        pixels = np.stack(parts, 1).astype(np.uint8).tobytes()
    tags = {256: [width], 257: [height], 258: [bits or 8*values.itemsize]*channels, 259: [1], 262: [photometric],
            273: None, 277: [channels], 278: [height], 279: [len(pixels)], 339: [kind]*channels}
    tags |= {338: list(extra)} if extra else {}
    begin = 8 + 2 + 12*len(tags) + 4
    entries, lists = b"", b""
    places = {tag: len(v) for tag, v in tags.items() if v and len(v) > 2}
    begin_pixels = begin + sum(2*n for n in places.values())
    for tag, v in sorted(tags.items()):
        v = [begin_pixels] if v is None else v
        long = tag in (273, 279)
        entries += struct.pack(end + "HHI", tag, 4 if long else 3, len(v))
        content = struct.pack(end + str(len(v)) + ("I" if long else "H"), *v)
        entries += struct.pack(end + "I", begin + len(lists)) if len(content) > 4 else content.ljust(4, b"\0")
        lists += content if len(content) > 4 else b""
    start = {"<": b"II*\0", ">": b"MM\0*"}[end]
    return start + struct.pack(end + "IH", 8, len(tags)) + entries + bytes(4) + lists + pixels

def png(width, bits, colour, row, key):
    "A PNG of one row with an invisible colour."
    part = lambda k, d: struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
    head = struct.pack(">2I5B", width, 1, bits, colour, 0, 0, 0)
    parts = (b"IHDR", head), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(part(*p) for p in parts)


# ---- ordinary pictures

@pytest.mark.parametrize("format, mode", [
    *[("PNG", m) for m in ("RGB", "L", "P", "1")], *[("GIF", m) for m in ("L", "P", "1")],
    *[("TIFF", m) for m in ("RGB", "L", "P", "1", "CMYK", "YCbCr")], *[("BMP", m) for m in ("RGB", "L", "P", "1")],
    *[("JPEG", m) for m in ("RGB", "L", "CMYK")], *[("PPM", m) for m in ("RGB", "L", "1")],
    *[("TGA", m) for m in ("RGB", "L", "P")], ("DIB", "RGB"), ("PCX", "RGB"), ("WEBP", "RGB"), ("QOI", "RGB"),
    ("JPEG2000", "RGB"), ("JPEG2000", "L"), ("MPO", "RGB"), ("ICO", "RGB"),
])
def test_an_ordinary_picture_has_the_pixels_of_convert(format, mode):
    if format == "QOI" and "QOI" not in Image.SAVE:
        pytest.skip("this Pillow writes no QOI")
    options = dict(sizes=[(16, 12)]) if format == "ICO" else {}
    data = encoded(Image.fromarray(COLOURS).convert(mode), format, **options)
    with Image.open(io.BytesIO(data)) as opened:
        wanted = np.asarray(opened.convert("RGB"))
    assert (np.asarray(decode(data, "x")) == wanted).all()
    assert (np.asarray(as_rgb(Image.open(io.BytesIO(data)))) == wanted).all()

@needs_avif
def test_avif_is_read():
    assert far(decode(encoded(Image.new("RGB", (32, 24), (10, 200, 90)), "AVIF"), "x"), (10, 200, 90)) < 4

def test_an_ordinary_rgb_picture_is_returned_itself():
    image = Image.fromarray(COLOURS)
    assert as_rgb(image) is image and square(image.resize((16, 16)), 16).size == (16, 16)

def test_the_first_of_several_pages_and_moments_is_taken():
    pages = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for format in ("TIFF", "GIF", "WEBP", "PNG", "MPO"):
        options = dict(lossless=True) if format == "WEBP" else {}
        data = encoded(pages[0], format, save_all=True, append_images=pages[1:], **options)
        assert far(decode(data, "x"), (255, 0, 0)) < 3, format

def test_a_profile_of_rgb_changes_no_pixel_and_stays():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    shown = decode(encoded(Image.fromarray(COLOURS), icc_profile=profile), "x")
    assert (np.asarray(shown) == COLOURS).all()
    assert shown.info["icc_profile"] == profile


# ---- grey in many steps

@pytest.mark.parametrize("factor", [256, 257])
def test_16_bits_are_shown_by_their_upper_8(factor):
    deep = Image.fromarray(factor*STEPS)
    files = [
        encoded(deep), encoded(deep, "TIFF"), encoded(deep, "TIFF", compression="tiff_adobe_deflate"),
        encoded(deep, "PPM"), tiff(factor*STEPS), tiff(factor*STEPS, end=">"),
        b"P2 16 16 65535 " + " ".join(map(str, (factor*STEPS).ravel())).encode(),
    ]
    if "JPEG2000" in picture_formats():
        files.append(encoded(deep, "JPEG2000", irreversible=False))
    for data in files:
        assert (np.asarray(decode(data, "x")) == GREY).all()
    for mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        order = ">u2" if mode == "I;16B" else "=u2" if mode == "I;16N" else "<u2"
        memory = Image.frombytes(mode, (16, 16), (factor*STEPS).astype(order).tobytes())
        assert (np.asarray(as_rgb(memory)) == GREY).all(), mode
        assert (np.asarray(square(memory, 16)) == GREY).all(), mode

def test_white_may_be_zero_in_tiff():
    assert (np.asarray(decode(tiff(257*STEPS, 0), "x")) == 255 - GREY).all()
    assert (np.asarray(decode(tiff(STEPS.astype(np.uint8), 0), "x")) == 255 - GREY).all()
    assert (np.asarray(decode(tiff(np.float32(STEPS/255), 0, 3), "x")) == 255 - GREY).all()

def test_12_bits_are_not_taken_for_16():
    assert (np.asarray(decode(tiff(16*STEPS, bits=12), "x")) == GREY).all()

def test_a_pgm_with_a_highest_value_of_its_own():
    shown = np.asarray(decode(b"P2 3 1 1000 0 500 1000", "x"))
    assert shown[0, :, 0].tolist() == [0, 128, 255]

@pytest.mark.parametrize("end", "<>")
def test_16_bits_a_channel(end):
    colours = np.stack([STEPS, STEPS.T, 255 - STEPS], 2)
    assert (np.asarray(decode(tiff(257*colours, 2, end=end), "x")) == colours).all()
    alpha = np.where(STEPS > 99, 65535, 0).astype(np.uint16)
    four = tiff(np.dstack([257*colours, alpha]), 2, end=end, extra=(2,))
    assert (np.asarray(decode(four, "x")) == np.where(STEPS[..., None] > 99, colours, 255)).all()

def test_floats_from_0_to_1_go_from_black_to_white():
    for end in "<>":
        assert (np.asarray(decode(tiff(np.float32(STEPS/255), kind=3, end=end), "x")) == GREY).all()
    assert (np.asarray(as_rgb(Image.fromarray(np.float32(STEPS/255)))) == GREY).all()
    pfm = b"Pf\n16 16\n-1.0\n" + np.float32(STEPS[::-1]/255).astype("<f4").tobytes()
    assert (np.asarray(decode(pfm, "x")) == GREY).all()

@pytest.mark.parametrize("values, kind, said", [
    (np.float32(STEPS), 3, "floating-point numbers from 0 to 255"),
    (np.float32(STEPS) - 1, 3, "floating-point numbers from -1 to 254"),
    (np.where(STEPS == 7, np.nan, STEPS/255).astype(np.float32), 3, "numbers that are not finite"),
    (np.where(STEPS == 7, np.inf, STEPS/255).astype(np.float32), 3, "numbers that are not finite"),
    (STEPS.astype(np.uint32), 1, "whole numbers of 32 bits"), (STEPS.astype(np.int32), 2, "whole numbers of 32 bits"),
    (STEPS.astype(np.int16) - 9, 2, "whole numbers of 32 bits, or with a sign"),
])
def test_numbers_of_which_nobody_knows_the_white_are_refused(values, kind, said, tmp_path):
    (tmp_path/"scan.tif").write_bytes(tiff(values, kind=kind))
    images = FileImages(tmp_path, ["scan.tif"])
    for read in (lambda: images[0], lambda: images.array(size=8)):
        refused(f"scan.tif: the pixels are {said}", read)
        refused("convert the picture to 8 bits", read)
    if values.dtype != np.int16:
        refused("a picture in memory: the pixels are ", as_rgb, Image.fromarray(values.astype(
            np.int32 if values.dtype == np.uint32 else values.dtype)))

@pytest.mark.parametrize("values", [STEPS/255, np.float32(np.stack([STEPS/255]*3, 2)), np.float16(STEPS/255)])
def test_tiff_that_pillow_cannot_read_is_told_from_damage(values):
    data = tiff(values, 2 if values.ndim == 3 else 1, 3)
    refused("x.tif: the file cannot be read as a picture", decode, data, "x.tif")
    refused("TIFF, damaged or with pixels that Pillow cannot read", decode, data, "x.tif")


# ---- transparency

@pytest.mark.parametrize("format, options", [
    ("PNG", {}), ("TIFF", {}), ("TGA", {}), ("WEBP", dict(lossless=True, exact=True)), ("ICO", dict(sizes=[(16, 12)])),
    ("JPEG2000", dict(irreversible=False)),
])
def test_transparent_files_are_laid_on_white(format, options):
    picture = Image.fromarray(np.dstack([COLOURS, ALPHA]))
    assert (np.asarray(decode(encoded(picture, format, **options), "x")) == on_white(COLOURS, ALPHA)).all()

@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_every_mode_with_an_alpha_channel_is_laid_on_white(mode):
    alpha = Image.fromarray(ALPHA)
    if mode == "PA":
        picture = Image.fromarray(COLOURS).quantize(8).convert("PA")
        colours = np.asarray(picture.convert("RGB"))
        picture.putalpha(alpha)
    else:
        whole = mode.upper()
        bands = Image.fromarray(COLOURS).convert(whole[:-1])
        colours = np.asarray(bands.convert("RGB"))
        picture = bands.convert(whole)
        picture.putalpha(alpha)
        picture = picture.convert(mode)
    assert picture.mode == mode
    assert far(as_rgb(picture), on_white(colours, ALPHA)) <= (1 if mode.endswith("a") else 0)

def test_what_is_hidden_does_not_reach_the_model():
    seen = set()
    for hidden in ("red", "blue"):
        picture = Image.new("RGBA", (30, 30), hidden)
        picture.putalpha(0)
        picture.paste("green", (10, 10, 20, 20))
        seen.add(np.asarray(square(decode(encoded(picture), "x"), 16)).tobytes())
    assert len(seen) == 1

def test_an_opaque_alpha_channel_changes_nothing():
    picture = Image.fromarray(np.dstack([COLOURS, np.full_like(ALPHA, 255)]))
    assert (np.asarray(decode(encoded(picture), "x")) == COLOURS).all()

def test_transparency_of_a_palette():
    picture = Image.fromarray(COLOURS).quantize(8)
    numbers, colours = np.asarray(picture), np.asarray(picture.convert("RGB"))
    for format in ("PNG", "GIF"):
        shown = np.asarray(decode(encoded(picture, format, transparency=3), "x"))
        assert (shown == np.where((numbers == 3)[..., None], 255, colours)).all(), format
    alpha = np.array([0, 255, 128, 0, 255, 255, 7, 255], np.uint8)
    shown = np.asarray(decode(encoded(picture, transparency=alpha.tobytes()), "x"))
    assert (shown == on_white(colours, alpha[numbers])).all()
    with_alpha = Image.new("P", (3, 1))
    with_alpha.putdata([0, 1, 2])
    with_alpha.putpalette([10, 20, 30, 255, 90, 80, 70, 0, 0, 0, 0, 51], "RGBA")
    assert np.asarray(as_rgb(with_alpha))[0].tolist() == [[10, 20, 30], [255]*3, [204]*3]

def test_one_colour_that_is_invisible():
    key = tuple(int(v) for v in COLOURS[0, 0])
    hidden = (COLOURS == key).all(-1, keepdims=True)
    shown = np.asarray(decode(encoded(Image.fromarray(COLOURS), transparency=key), "x"))
    assert (shown == np.where(hidden, 255, COLOURS)).all()
    grey = Image.fromarray(STEPS.astype(np.uint8))
    assert (np.asarray(decode(encoded(grey, transparency=7), "x")) == np.where(GREY == 7, 255, GREY)).all()
    deep = decode(encoded(Image.fromarray(257*STEPS), transparency=257*7), "x")
    assert (np.asarray(deep) == np.where(GREY == 7, 255, GREY)).all()
    assert np.asarray(decode(encoded(Image.new("1", (4, 4)), transparency=0), "x")).min() == 255

@pytest.mark.parametrize("width, bits, colour, row, key, wanted", [
    (4, 2, 0, bytes([0b00011011]), struct.pack(">H", 1), [[0]*3, [255]*3, [170]*3, [255]*3]),
    (2, 4, 0, bytes([0x23]), struct.pack(">H", 2), [[255]*3, [51]*3]),
    (2, 16, 2, struct.pack(">6H", 51400, 5, 9, 1799, 2056, 2313), struct.pack(">3H", 51400, 5, 9),
     [[255]*3, [7, 8, 9]]),
])
def test_an_invisible_colour_is_given_in_the_steps_of_the_file(width, bits, colour, row, key, wanted):
    assert np.asarray(decode(png(width, bits, colour, row, key), "x"))[0].tolist() == wanted

def test_a_note_on_transparency_that_does_not_fit_hides_nothing():
    picture = Image.fromarray(COLOURS)
    picture.info["transparency"] = b"\0\xff"
    assert (np.asarray(as_rgb(picture)) == COLOURS).all()

def test_tga_has_a_fourth_channel_only_where_it_says_so():
    data = bytearray(encoded(Image.fromarray(np.dstack([COLOURS, np.zeros_like(ALPHA)])), "TGA"))
    assert np.asarray(decode(bytes(data), "x")).min() == 255
    data[17] &= 0xF0      # bits of transparency: none
    assert (np.asarray(decode(bytes(data), "x")) == COLOURS).all()


# ---- ink and Lab

def test_lab_and_other_colour_models_become_rgb():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    smooth = Image.linear_gradient("L").resize((16, 12)).convert("RGB")
    for mode in ("YCbCr", "HSV", "RGBX", "CMYK"):
        assert far(as_rgb(smooth.convert(mode)), smooth) <= 2, mode
    picture = ImageCms.profileToProfile(smooth, srgb, lab, outputMode="LAB")
    assert far(as_rgb(picture), smooth) <= 4
    assert far(decode(encoded(picture, "TIFF"), "x"), smooth) <= 4

def test_lab_without_its_library_is_one_clear_error(monkeypatch):
    def missing(*_):
        raise ImportError("no _imagingcms here")
    for name in ("createProfile", "ImageCmsProfile"):
        monkeypatch.setattr(ImageCms, name, missing)
    refused("a picture in memory: a picture of mode LAB that cannot be shown", as_rgb, Image.new("LAB", (2, 2)))

def test_ink_goes_by_its_profile_where_it_has_a_usable_one(monkeypatch):
    ink = Image.fromarray(COLOURS).convert("CMYK")
    plain = np.asarray(ink.convert("RGB"))
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (None, b"no profile", rgb_profile):
        data = encoded(ink, "TIFF", **({"icc_profile": profile} if profile else {}))
        shown = decode(data, "x")
        assert (np.asarray(shown) == plain).all()
        assert "icc_profile" not in shown.info
    asked = []
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: asked.append(file.read()) or "profile")
    red = lambda image, *_, outputMode: Image.new(outputMode, image.size, "red")
    monkeypatch.setattr(ImageCms, "profileToProfile", red)
    assert np.asarray(decode(encoded(ink, "JPEG", icc_profile=b"of a press"), "x")).tolist() == [[[255, 0, 0]]*16]*12
    assert asked == [b"of a press"]


# ---- orientation

TURNED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90,
}

def note(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif

@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("format, options", [
    ("JPEG", {}), ("PNG", {}), ("WEBP", dict(lossless=True)), ("MPO", {}), ("TIFF", {}),
    ("TIFF", dict(compression="tiff_adobe_deflate")), pytest.param("AVIF", dict(quality=100), marks=needs_avif),
])
def test_pictures_come_upright_once(format, options, orientation):
    plain = np.asarray(decode(encoded(Image.fromarray(COLOURS), format, **options), "x"))
    data = encoded(Image.fromarray(COLOURS), format, exif=note(orientation), **options)
    shown = decode(data, "x")
    assert np.asarray(shown).shape == TURNED[orientation](plain).shape
    assert (np.asarray(shown) == TURNED[orientation](plain)).all()
    assert (np.asarray(as_rgb(Image.open(io.BytesIO(data)))) == np.asarray(shown)).all()      # in memory
    assert (np.asarray(as_rgb(shown)) == np.asarray(shown)).all()                             # not twice
    for written in ("PNG", "JPEG", "WEBP", "TIFF"):
        again = Image.open(io.BytesIO(encoded(shown, written)))
        assert again.getexif().get(0x0112, 1) == 1 and again.size == shown.size

@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK"])
def test_every_mode_is_turned(mode):
    deep = Image.fromarray(np.uint16(np.asarray(Image.fromarray(COLOURS).convert("L"))) * 257)
    image = deep if mode == "I;16" else Image.fromarray(COLOURS).convert(mode)
    options = ("TIFF", {}) if mode == "CMYK" else ("PNG", {})
    plain, turned = (decode(encoded(image, options[0], exif=note(n)), "x") for n in (1, 6))
    assert (np.asarray(turned) == np.rot90(np.asarray(plain), -1)).all()
    assert (np.asarray(as_rgb(turned)) == np.asarray(turned)).all()

@pytest.mark.parametrize("exif", [
    b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff", b"Exif\0\0", b"no note", b"Exif\0\0II*\0\xff\xff\xff\xff", note(0), note(9),
    note(77),
])
def test_a_note_that_says_nothing_changes_nothing(exif):
    for format in ("JPEG", "PNG"):
        plain = np.asarray(decode(encoded(Image.fromarray(COLOURS), format), "x"))
        assert (np.asarray(decode(encoded(Image.fromarray(COLOURS), format, exif=exif), "x")) == plain).all()

def test_imagemagicks_notes_in_png_are_followed():
    from PIL.PngImagePlugin import PngInfo
    said, info = note(6).tobytes(), PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(said):8}\n{said.hex()}\n", zip=True)
    shown = decode(encoded(Image.fromarray(COLOURS), pnginfo=info), "x")
    assert (np.asarray(shown) == np.rot90(COLOURS, -1)).all()


# ---- what is opened

def test_all_endings_of_the_opened_formats_are_known():
    Image.init()
    odd = {".icb", ".vda", ".vst"}       # TGA's other names, of which .vst is a drawing of Visio today
    theirs = {ending for ending, format in Image.registered_extensions().items() if format in picture_formats()}
    assert theirs - set(PICTURE_ENDINGS) == odd
    assert {".jpg", ".jfif", ".jpe", ".mpo", ".avif", ".pgm", ".jp2", ".dib", ".apng"} <= set(PICTURE_ENDINGS)
    assert len(set(PICTURE_ENDINGS)) == len(PICTURE_ENDINGS) and all(e == e.lower() for e in PICTURE_ENDINGS)

def test_ghostscript_is_never_started(tmp_path, monkeypatch):
    (tmp_path/"gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path/"gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
    for start in (b"", b"\x04"):
        refused("PostScript (EPS)); convert it to PNG or JPEG", decode, start + eps, "0.png")
    refused("PostScript (EPS))", decode, b"\xc5\xd0\xd3\xc6" + bytes(60), "0.png")
    assert not (tmp_path/"started").exists()

@pytest.mark.parametrize("format", ["EPS", "PDF", "DDS", "SPIDER", "ICNS", "MSP", "IM", "BLP", "SGI", "XBM"])
def test_formats_off_the_list_are_refused(format):
    image = Image.new({"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P"}.get(format, "RGB"), (64, 64))
    refused("x.png: the file cannot be read as a picture", decode, encoded(image, format), "x.png")

@pytest.mark.parametrize("data, kind, remedy", [
    (b"", "empty", "fetch it again"), (bytes(5000), "nothing but zeros", "fetch it again"),
    (b"<html>404</html>", "a web page", "fetch it again"),
    (b"\xef\xbb\xbf\n<!DOCTYPE HTML>", "a web page", "fetch it again"),
    (b"<!-- saved -->\n<HTML>", "a web page", "fetch it again"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS", "git lfs pull"),
    (b"/annex/objects/SHA256E-s3--0.jpg\n", "a pointer of git-annex", "git annex get"),
    (b"<?xml version='1.0'?>\n<svg xmlns='x'>", "an SVG drawing", "convert it to PNG"),
    (b"%PDF-1.7\n", "a PDF", "convert"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo", "convert"),
    (b"\0\0\0\x18ftypmif1", "a HEIC photo", "convert"),
    (b"\0\0\0\x20ftypisom", "a video", "take a picture"), (b"\x1aE\xdf\xa3webm", "a video", "take a picture"),
    (b"RIFF\0\0\0\0AVI LIST", "a video", "take a picture"),
    (b"\0\0\x01\xba\x44" + bytes(40), "a video", "take a picture"),
    (b"PK\x03\x04" + bytes(90), "a zip archive", "unpack"), (b"\x1f\x8b\x08", "an archive", "unpack"),
    (bytes(1) + b"a"*256 + b"ustar\0", "an archive", "unpack"), (b"8BPS\0\x01", "a Photoshop file", "convert"),
    (b"\xff\x0a\xfa\x7f", "a JPEG XL picture", "convert"), (b"\x93NUMPY\x01\0", "an array of numbers", "PNG"),
    (b"image,caption\n0.png,caf\xc3\xa9\n", "a text", "fetch it again"),
    (b'{"error": "gone"}', "a text", "fetch it again"),
    (("\u00e9"*2000).encode(), "a text", "fetch it again"), (b"\x80\x04\x95" + bytes(range(200)), "", "fetch it again"),
])
def test_a_file_that_is_no_picture_is_named_for_what_it_is(data, kind, remedy):
    assert file_kind(data)[0] == kind
    size = f"({len(data):,} bytes, {kind})" if kind else f"({len(data):,} bytes)"
    refused(f"a.jpg: the file cannot be read as a picture {size}; ", decode, data, "a.jpg")
    refused(remedy, decode, data, "a.jpg")
    refused("or take it out of the list", decode, data, "a.jpg")

def test_formats_that_this_pillow_lacks_are_named(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name not in ("avif", "jpg_2000"))
    picture_formats.cache_clear()
    try:
        assert {"AVIF", "JPEG2000"} & set(picture_formats()) == set()
        refused("AVIF, which the installed Pillow cannot read); install a newer Pillow, convert it", decode,
                b"\0\0\0\x1cftypavif" + bytes(40), "a.avif")
        refused("JPEG2000, which the installed Pillow cannot read", decode,
                b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "a.jp2")
    finally:
        picture_formats.cache_clear()

@pytest.mark.parametrize("error", [
    OSError, SyntaxError, ValueError, EOFError, struct.error, RuntimeError, NotImplementedError, AttributeError,
    TypeError, IndexError, KeyError, MemoryError, zlib.error, OverflowError, ZeroDivisionError, AssertionError,
    RecursionError,
])
def test_whatever_a_decoder_raises_names_the_picture(error, monkeypatch):
    def fail(self):
        raise error("inside\nthe decoder")
    data = encoded(Image.fromarray(COLOURS))
    monkeypatch.setattr(Image.Image, "load", fail)
    from PIL import ImageFile
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    refused("x.png: the file cannot be read as a picture", decode, data, "x.png")

def test_damaged_files_of_every_format_are_shown_or_named():
    rng, tried, refusals = np.random.default_rng(0), 0, 0
    for format in picture_formats():
        mode = "P" if format == "GIF" else "RGB"
        if format == "QOI" and "QOI" not in Image.SAVE:
            continue
        whole = encoded(Image.fromarray(COLOURS).convert(mode), format)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            tried += 1
            try:
                assert decode(bytes(data), "x").mode == "RGB"
            except DataError as e:
                refusals += 1
                assert str(e).startswith("x: ") and "\n" not in str(e)
    assert tried > 600 and 50 < refusals < tried

def test_too_many_pixels_are_refused_before_they_take_memory():
    head = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    refused("x.png: the picture has too many pixels to be opened safely; scale it down", decode, bomb, "x.png")

def test_no_junk_is_taken_for_tga():
    begin, end = b"\0\0\x02", struct.pack("<4xHHBB", 4, 4, 24, 0) + bytes(48)
    assert decode(begin + bytes(5) + end, "x").size == (4, 4)
    refused("x: the file cannot be read as a picture", decode, begin + b"\0\x01\0\x10\x10" + end, "x")     # a cursor


# ---- thin pictures

def scaled_then_cut(image, size):
    "The square by way of the whole picture."
    (width, height), short = image.size, min(image.size)
    scaled = int(size*max(image.size)/short)
    whole = image.resize((size, scaled) if width <= height else (scaled, size), Image.Resampling.BICUBIC)
    left, top = int(round((whole.width - size)/2)), int(round((whole.height - size)/2))
    return whole.crop((left, top, left + size, top + size))

@pytest.mark.parametrize("coarse, least", [(8, 1), (1, 2)])      # like a photo, and noise of single pixels
def test_a_thin_picture_has_the_square_of_the_whole(coarse, least):
    rng, exact, shares = np.random.default_rng(0), 0, []
    for k in range(80):
        size = int(rng.integers(1, 100))
        short = int(rng.integers(1, size + 10))
        long = int(short*rng.uniform(16, 40)) + 1
        width, height = (long, short) if k % 2 else (short, long)
        image = Image.fromarray(rng.integers(0, 256, (height//coarse + 1, width//coarse + 1, 3), dtype=np.uint8))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        ours, whole = np.asarray(square(image, size), int), np.asarray(scaled_then_cut(image, size), int)
        assert abs(ours - whole).max() <= least, (image.size, size)
        exact += (ours == whole).all()
        shares.append((ours != whole).mean())
    assert exact > 40 and max(shares) < .02       # where a value lies between two bytes, rounding may differ

@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (20, 80), (80, 20), (20, 320), (500, 333), (30, 30)])
def test_other_pictures_have_it_to_the_bit(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    for size in (16, 30, 224):
        assert (np.asarray(square(image, size)) == np.asarray(scaled_then_cut(image, size))).all()

@pytest.mark.parametrize("size", [(1, 6000), (5000, 3), (1, 60_000), (60_000, 1), (1, 1), (2, 99)])
def test_thin_pictures_take_no_memory(size, monkeypatch):
    largest, resize = [0], Image.Image.resize
    def watched(self, size, *args, **options):
        largest[0] = max(largest[0], size[0]*size[1])
        return resize(self, size, *args, **options)
    monkeypatch.setattr(Image.Image, "resize", watched)
    ramp = np.arange(size[0]*size[1]*3, dtype=np.uint32).reshape(size[1], size[0], 3)
    shown = np.asarray(square(Image.fromarray((ramp % 251).astype(np.uint8)), 224))
    assert shown.shape == (224, 224, 3) and largest[0] <= 224*300
    middle = (ramp % 251).astype(np.uint8)[size[1]//2, size[0]//2]
    assert far(shown[112, 112], middle) < 60


# ---- every place that reads pictures

def test_readers_show_pictures_alike(tmp_path):
    from mcl_repro.data.labelled import read_class_folders
    from mcl_repro.data.readers import read_csv_pairs
    from mcl_repro.data.tars import read_webdataset_pairs
    from data_files import shard
    lying = encoded(Image.fromarray(COLOURS), exif=note(6))
    wanted = np.rot90(COLOURS, -1)
    (tmp_path/"cat").mkdir()
    (tmp_path/"cat"/"a.PNG").write_bytes(lying)
    (tmp_path/"dog").mkdir()
    (tmp_path/"dog"/"b.png").write_bytes(lying)
    (tmp_path/"pairs.csv").write_text("image,caption\ncat/a.PNG,a cat\n")
    shard(tmp_path/"a.tar", {"a.apng": lying, "a.txt": b"a cat"})
    for images in (read_csv_pairs(tmp_path/"pairs.csv").images, read_class_folders(tmp_path).images,
                   read_webdataset_pairs(tmp_path/"a.tar").images):
        assert (np.asarray(images[0]) == wanted).all()
        assert (images.array(size=8)[0] == np.asarray(square(Image.fromarray(np.ascontiguousarray(wanted)), 8))).all()

@pytest.mark.parametrize("ending", PICTURE_ENDINGS)
def test_files_of_every_ending_are_found(ending, tmp_path):
    from mcl_repro.data.labelled import pictures_in
    for name in ("a" + ending, "b" + ending.upper(), "c.txt", "d" + ending + ".part"):
        (tmp_path/name).touch()
    assert sorted(pictures_in(tmp_path)) == ["a" + ending, "b" + ending.upper()]

def test_the_page_names_every_format():
    text = (pictures.__file__.rsplit("mcl_repro", 1)[0] + "nbs/data/pictures.ipynb")
    page = open(text, encoding="utf-8").read()
    said = page[page.index("## Which files are opened"):page.index("PICTURE_FORMATS =")]
    names = dict(PPM="PPM", JPEG2000="JPEG 2000", WEBP="WebP")
    assert [n for n in pictures.PICTURE_FORMATS if names.get(n, n) not in said] == []
