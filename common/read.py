"""What stands in a file, for every script: lines, records, pictures. Whoever wrote the file, it is
read whole or refused by its name and line with a ValueError (or OSError): see UNREADABLE."""

import codecs
import csv
import io
import json
import os
import random
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

UNREADABLE = (OSError, ValueError)         # what the functions of this file raise, and nothing else
MOST_TEXT = 4096          # bytes of a text in UTF-8, some 700 words: more is no prompt of a model
MOST_LINE = 2**24         # bytes of a line, 16 MiB
MOST_PIXELS = 2**26       # of a picture: 8192 x 8192, 200 MB once unpacked


# ---------------------------------------------------------------------------------------------
# Files, lines, records


def regular(path):
    """-> the path, of a file proper: a pipe or a device might never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")
    return path


def inside(folder, name):
    """A file that a record names -> its path. Only what lies in the record's own folder: data from
    elsewhere must not reach for other files."""
    if not isinstance(name, str) or not 0 < len(name) < 1000:
        raise ValueError(f"{named(name)} is not the name of a file")
    if os.path.isabs(name) or Path(os.path.normpath(name)).parts[:1] == ("..",):
        raise ValueError(f"{name!r} leaves the folder {folder}")
    return Path(folder) / name


def named(value):
    """What a value is, for an error; not the value itself, which may be of any size."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number",
             str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
         codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def utf8(raw, first=True):
    """Bytes -> text. first: they begin a file, and may have a byte order mark"""
    other = first and [name for mark, name in MARKS.items() if raw.startswith(mark)]
    if other:
        raise ValueError(f"this is {other[0]}: save it as UTF-8")
    if b"\0" in raw:
        raise ValueError("NUL bytes: UTF-16 without a mark, or no text: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"byte {e.start + 1} is not UTF-8, perhaps Latin-1 or Windows-1252: save "
                         "it as UTF-8") from None


def lines(path):
    """A text file -> (number from 1, line) of each line that is not blank. Lines end at \\n or
    \\r\\n alone: within a JSON string U+2028, U+0085 and others are letters."""
    number = 0
    with open(regular(path), "rb") as f:
        while raw := f.readline(MOST_LINE + 1):
            number += 1
            try:
                if len(raw) > MOST_LINE:
                    raise ValueError(f"longer than {MOST_LINE:,} bytes")
                text = utf8(raw, number == 1).removesuffix("\n").removesuffix("\r")
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
            if text and not text.isspace():
                yield number, text


def refuse(name):
    raise ValueError(f"{name} is not JSON")


STRICT, LOOSE = json.JSONDecoder(parse_constant=refuse), json.JSONDecoder()


def parse_json(text, decoder=STRICT):
    """JSON text -> value; NaN and Infinity are no JSON, but to a decoder that is LOOSE."""
    try:
        value = decoder.decode(text)
        if "\\ud" in text or "\\uD" in text:     # half of a pair is no letter, nor can be written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("\\ud800 to \\udfff are halves of letters, one stands alone") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path):
    """A file that is one JSON value -> that value"""
    try:
        with open(regular(path), "rb") as f:
            return parse_json(utf8(f.read()))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def csv_rows(path):
    """A .csv whose first line names the columns -> ("line N", {column: text}) of each row"""
    with open(regular(path), "rb") as f:
        try:
            utf8(f.readline(MOST_LINE))
        except ValueError as e:
            raise ValueError(f"{path}, line 1: {e}") from None
        f.seek(0)
        reader = csv.DictReader(io.TextIOWrapper(f, "utf-8-sig", newline=""), strict=True)
        try:
            if len({*(reader.fieldnames or ())}) < len(reader.fieldnames or ()):
                raise ValueError(f"{path}, line 1: two columns have one name")
            for row in reader:
                yield f"line {reader.line_num}", row
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}, behind line {reader.line_num}: not UTF-8 ({e.reason}): "
                             "save it as UTF-8") from None
        except csv.Error as e:
            raise ValueError(f"{path}, behind line {reader.line_num}: {e}") from None


def raw_records(path):
    """jsonl, a JSON list, .csv, .txt of prompts -> ("line N", a record for `record`) of each. A
    line of jsonl stays as it is: of a million of them the memory is that of their text."""
    ending = Path(path).suffix.lower()
    if ending in (".csv", ".txt"):
        yield from csv_rows(path) if ending == ".csv" else (
            (f"line {i}", dict(prompt=line)) for i, line in lines(path))
        return
    with open(regular(path), "rb") as f:
        start = f.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] == b"[":
        rows = read_json(path)
        yield from ((f"record {i}", row) for i, row in enumerate(rows, 1))
    else:
        yield from ((f"line {i}", line) for i, line in lines(path))


def record(raw):
    """What raw_records gives -> the record, {field: value}"""
    row = parse_json(raw) if isinstance(raw, str) else raw
    if not isinstance(row, dict):
        raise ValueError(f"{named(row)}, not a JSON object with fields")
    return row


def as_text(value, name="text", draw=0):
    """A field's value -> what it says. Of a list one is drawn, by `draw` alone. ValueError: it is
    no text, empty, or longer than a model reads. name: the field's, for the error"""
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = random.Random(draw).choice(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {named(value)}, no text")
    value = value.strip()
    if not value:
        raise ValueError(f"{name} is empty")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{name} has NUL or half of a letter in it")
    if len(value.encode()) > MOST_TEXT:
        raise ValueError(f"{name} has {len(value.encode()):,} bytes, more than {MOST_TEXT:,}")
    return value


# ---------------------------------------------------------------------------------------------
# Pictures

# Formats whose readers are code of Pillow: EPS would start another program.
FORMATS = [name for name in ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
           if name in Image.registered_extensions().values()]
PICTURES = {"png", "jpg", "jpeg", "webp", "avif", "gif", "bmp", "tif", "tiff"}   # endings of files


def read_image(source):
    """A file, or bytes in a BytesIO -> PIL RGB: upright as its EXIF says, 16 bits as 8, what is
    transparent on white."""
    name = "" if isinstance(source, io.BytesIO) else f"{source}: "
    if name:
        regular(source)
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than can be kept")
            return to_rgb(image)
    except OSError as e:                              # which mostly names the file already
        raise ValueError(f"{name}{e}" if name and str(source) not in str(e) else str(e)) from e
    except Exception as e:                            # whatever one of Pillow's readers may do
        raise ValueError(f"{name}{str(e) or type(e).__name__}") from e


def to_rgb(image):
    """A PIL image of any mode -> RGB, see read_image"""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                    # of 16 bits convert would keep what is below 256
        a = np.asarray(image)
        if image.mode == "F" or a.min() < 0 or a.max() > 65535:
            raise ValueError(f"its pixels, {a.min():g} to {a.max():g}, are neither 8 nor 16 bits")
        if image.mode != "I" or a.max() > 255:           # 32 bits say nothing: their range does
            a = (a / 257).round()
        image = Image.fromarray(a.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.load()                                         # now, while its file is open
    return image if image.mode == "RGB" else image.convert("RGB")        # which copies its own kind


def bucket(width, height, cfg):
    """Sides in pixels that keep an image's shape, at the preset's area; the DiT's multiples."""
    step = cfg.vae_factor * cfg.dit_config["patch_size"]       # pixels a side must divide into
    most = step * cfg.dit_config.get("pos_embed_max_size", 999)       # pixels that have a place
    ratio = min(100, max(0.01, width / height)) ** 0.5         # of others Qwen's eyes want nothing
    return tuple(min(most, max(step, round(cfg.size * r / step) * step))
                 for r in (ratio, 1 / ratio))


def fitted(images, cfg):
    """PIL images, the last of which decides -> PIL images: it and the first, which is what it was
    drawn from, in one bucket; further references in their own."""
    sizes = [bucket(*image.size, cfg) for image in images]
    sizes[0] = sizes[-1]
    return [image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
            for image, size in zip(images, sizes)]


def pixels(image):
    """PIL RGB -> uint8 (3,H,W)"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_bucket(images, cfg):
    """PIL images -> uint8 (3,H,W) each, of the sizes of `fitted`."""
    return [pixels(image) for image in fitted(images, cfg)]


def arrays(images):
    """(N,3,H,W) torch, any device -> (N,H,W,3) uint8 numpy."""
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def jpeg_kb(image):
    """Size in kB (1000 bytes) as a JPEG of quality 95."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000
