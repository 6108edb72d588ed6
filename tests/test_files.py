"""Broken files: named in one line, or counted and left out; never a traceback, hang or prompt."""

import gzip
import io
import json
import os
import random
import signal
import sys
import tarfile
import time
from contextlib import suppress

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common.layouts as layouts
import common.shards as shards
from benchmarks import geneval
from benchmarks.judging import score_all
from common.run import one_line
import cycle_edit
import reflect
import sample
from common.data import Broken, pairs
from common.presets import Config, preset
from common.read import (FORMATS, MOST_TEXT, UNREADABLE, as_text, inside, lines, raw_records,
                         read_image, record)
from data.shapes.edits import source_picture
from rewards.ocr import wanted_text
from rewards.prompts import read_prompts
from rewards.scored import opened, read_scored
from test_cli import complaint

CFG = Config(mmdit=tiny.MMDIT)


@pytest.fixture(autouse=True)
def no_hang():
    def hangs(*_):
        raise AssertionError("hangs")
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(100)
    yield
    signal.alarm(0)


def picture(seed=0, size=(64, 64), **how):
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(data, how.pop("format", "png"), **how)
    return data.getvalue()


# Readers of records: a good one, its text, its file, and what reads a file of them to the pictures.
def trained(form):
    return lambda path: [next(data) for data in [pairs(path, CFG, 1, seed=0, form=form)]
                         for _ in range(12)]


def edits(path):
    return [source_picture(row, 64) for row in cycle_edit.read_edits(path)]


def pool(path):
    return [source_picture(row, 64) for side in reflect.read_pool(path) for row in side]


def scored(path):
    return opened(read_scored(path), CFG, Broken(path, 0))


READERS = dict(
    prompts=(dict(prompt="good"), "prompt", None, read_prompts),
    edits=(dict(source="a.png", instruction="good"), "instruction", "source", edits),
    pool=(dict(prompt="good", right="a.png", wrong="a.png"), "prompt", "right", pool),
    questions=(dict(question="good", answer="yes", image="a.png"), "answer", "image",
               reflect.read_questions),
    scored=(dict(source="a.png", edited="a.png", instruction="good", score=1), "instruction",
            "edited", scored),
    t2i=(dict(file_name="a.png", prompt="good"), "prompt", "file_name", trained("t2i")),
    edit=(dict(source="a.png", target="a.png", instruction="good"), "instruction", "source",
          trained("edit")),
    cot=(dict(file_name="a.png", prompt="good", reasoning="good"), "reasoning", "file_name",
         trained("cot")),
    reflect=(dict(image="a.png", refined="a.png", prompt="good", critique="good"), "critique",
             "refined", trained("reflect")),
)
DEEP = 100_000
TEXTS = {                                       # JSON of a text that is none
    "null": "null", "number": "3", "nan": "NaN", "inf": "-Infinity", "true": "true", "empty": '""',
    "blank": '" \\u2003\\n"', "list": "[]", "list of null": "[null]", "mixed list": '["a", 1]',
    "object": '{"a": "b"}', "surrogate": r'"a \ud800"', "nul": r'"a\u0000"', "huge": "9" * 5000,
    "long": json.dumps("word " * 20_000), "deep": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP, "nearly deep": "[" * 900 + "]" * 900,
}
LINES = {                                       # bytes of a line that is no record
    "cut": b'{"prompt": "a', "a list": b'["a"]', "a number": b"3", "null": b"null", "text": b'"a"',
    "html": b"<html>", "latin-1": '{"prompt": "caf\xe9"}'.encode("latin-1"), "nothing": b"{}",
    "nul": b'{"prompt": "a\0"}', "control": b'{"prompt": "a\x01"}', "two": b'{"a": 1} {"a": 2}',
    "single quotes": b"{'prompt': 'a'}", "utf-16": '{"prompt": "a"}'.encode("utf-16"),
}
FILES = {                                       # names of files that are no pictures of the folder
    "number": 3, "null": None, "empty": "", "absolute": "/etc/passwd", "device": "/dev/zero",
    "above": "../a.png", "above within": "x/../../a.png", "missing": "none.png", "folder": ".",
    "fifo": "fifo.png", "nul": "a\0.png", "long": "a" * 5000, "no picture": "metadata.jsonl",
    "cut": "cut.png", "bomb": "bomb.png", "eps": "a.eps", "object": {"a": 1}, "true": True,
    "float32": "f.tiff", "nothing": "nothing.png", "pipe": "pipe:cat a.png", "url": "http://x/a.png",
}


def home(folder):
    """A folder of a good picture and of bad ones."""
    (folder / "a.png").write_bytes(picture())
    (folder / "cut.png").write_bytes(picture()[:3000])
    (folder / "nothing.png").write_bytes(b"")
    (folder / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(folder / "f.tiff")
    os.mkfifo(folder / "fifo.png")
    return folder


@pytest.fixture(scope="module")
def bad_home(tmp_path_factory):
    return home(tmp_path_factory.mktemp("bad"))


def refused(path, reader, capsys):
    """Reads a file whose line 4 is broken, after three that are good and one blank."""
    capsys.readouterr()
    try:
        rows = reader(path)
    except ValueError as e:
        said, rows = str(e), None
    except SystemExit as e:
        said, rows = e.code, None
    if rows is not None:                        # of training data: named, once, and left out
        assert len(rows) == 12
        assert all(t == ["good"] for row in rows for t in row[1:] if isinstance(t[0], str))
        said = capsys.readouterr().err
        assert said.count("unreadable: ") == 1
    assert f"{path}, line 5" in said and "\n" not in said.strip() and len(said) < 1000, said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", [*TEXTS, "missing"])
@pytest.mark.parametrize("name", READERS)
def test_texts_that_are_none(bad_home, capsys, name, kind):
    good, text, _, reader = READERS[name]
    bad = {k: v for k, v in good.items() if k != text}
    line = json.dumps(bad)[:-1] + (f', "{text}": {TEXTS[kind]}}}' if kind in TEXTS else "}")
    path = bad_home / "metadata.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n" + f"{json.dumps(good)}\n" * 2 + line)
    refused(path, reader, capsys)


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("name", READERS)
def test_lines_that_are_no_records(bad_home, capsys, name, kind):
    good, _, _, reader = READERS[name]
    path, line = bad_home / "metadata.jsonl", json.dumps(good).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + (line + b"\n") * 2 + LINES[kind])
    refused(path, reader, capsys)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", [k for k, reader in READERS.items() if reader[2]])
def test_files_that_are_no_pictures(bad_home, capsys, name, kind):
    good, _, file, reader = READERS[name]
    if name in ("pool", "questions") and kind == "null":
        pytest.skip("a row without a picture of this side, or about none")
    path, line = bad_home / "metadata.jsonl", json.dumps(good)
    path.write_text(f"{line}\n\n{line}\n{line}\n{json.dumps(good | {file: FILES[kind]})}")
    if name == "scored" and kind in ("cut", "bomb", "eps", "no picture", "float32", "nothing"):
        with pytest.raises(SystemExit, match="1 of 4 records in .* are unreadable"):
            reader(path)                        # a picture is opened only once it is drawn
        assert str(FILES[kind]) in capsys.readouterr().err
    else:
        refused(path, reader, capsys)


@pytest.mark.parametrize("data", [b"", b"\n \n", b"[]", b"[", b"[1, 2", b"\xff\xfe[\0", b"\0" * 9])
@pytest.mark.parametrize("name", READERS)
def test_files_without_records(bad_home, monkeypatch, name, data):
    (bad_home / "metadata.jsonl").write_bytes(data)
    with pytest.raises((ValueError, SystemExit)) as e:
        assert not READERS[name][3](bad_home / "metadata.jsonl")
        raise ValueError("holds no records")    # where the caller says so
    assert "\n" not in str(e.value)


def test_a_share_ends_the_run(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    rows = [dict(file_name="a.png", prompt="x" if i % 3 else None) for i in range(60)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[1:]))
    words = complaint(lambda: [next(d) for d in [pairs(tmp_path, CFG, 1, 0)] for _ in range(60)])
    assert "are unreadable" in words


# --- lines ---


def test_lines_end_at_newlines_alone(tmp_path):
    text = "a\u2028b\u0085c\x0bd\x1ce\rf"
    file = tmp_path / "p.jsonl"
    for mark, end in ((b"", "\n"), (b"\xef\xbb\xbf", "\r\n")):
        rows = [json.dumps(dict(prompt=text), ensure_ascii=False).replace("\r", "\\r")
                .replace("\x0b", "\\u000b").replace("\x1c", "\\u001c"), "", "  ", '{"prompt": "z"}']
        file.write_bytes(mark + end.join(rows).encode())
        assert [row["prompt"] for row in read_prompts(file)] == [text, "z"]
        assert [i for i, _ in lines(file)] == [1, 4]
    file = file.with_suffix(".txt")
    file.write_text("\ufeffone \u2028 still one\n\n  two\n", "utf-8")
    assert read_prompts(file) == [dict(prompt="one \u2028 still one"), dict(prompt="two")]


@pytest.mark.parametrize("encoding, said", [
    ("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("latin-1", "Latin-1"), ("utf-16-le", "UTF-16"),
    ("cp1252", "Windows-1252"), ("utf-16-be", "")])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "txt"])
def test_encodings_are_named(tmp_path, encoding, said, ending):
    body = dict(jsonl='{"prompt": "caf\xe9"}', json='[{"prompt": "caf\xe9"}]', txt="caf\xe9",
                csv="prompt\ncaf\xe9")[ending]
    file = tmp_path / f"p.{ending}"
    file.write_bytes(body.encode(encoding))
    with pytest.raises(ValueError) as e:
        read_prompts(file)
    assert str(file) in str(e.value) and "UTF-8" in str(e.value), str(e.value)
    assert said in str(e.value) or ending == "csv"


@pytest.mark.parametrize("text", ["a,a\n1,2\n", 'prompt\n"open\n', "other\nx\n", "prompt\n\"\"\n",
                                  "prompt,b\n,1\n", 'prompt\n"a"b\n', "prompt\n" + "x" * 200_000])
def test_tables_that_are_broken(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ValueError, match="p.csv, (line|behind line) "):
        read_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/dev/null", "FIFO", "FOLDER"])
@pytest.mark.parametrize("reader", [READERS[k][3] for k in READERS], ids=[*READERS])
def test_no_device_is_read(tmp_path, path, reader):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder.jsonl").mkdir()
    path = dict(FIFO=tmp_path / "fifo", FOLDER=tmp_path / "folder.jsonl").get(path, path)
    with pytest.raises((ValueError, SystemExit)) as e:
        reader(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_what_is_a_text():
    assert as_text(" a\n") == "a" and as_text("x" * MOST_TEXT)
    drawn = {as_text(["a", "b", "c"], draw=i) for i in range(30)}
    assert drawn == {"a", "b", "c"} and len({as_text(["a", "b", "c"], draw=7) for _ in "123"}) == 1
    with pytest.raises(ValueError, match="more than 4,096"):
        as_text("\u4e00" * 3000)
    for name in ("a/b.png", "./a.png", "a/../b.png", "..a.png"):
        assert inside("x", name)


@pytest.mark.parametrize("prompt, text", [
    ('a sign "HI" there', "HI"), ("a sign 'HI THERE'", "HI THERE"), ("plain", None),
    ("it\u2019s \u201cHI\u201d", "HI"),
    ("the dog's ball and the cat's", None), ("a \u2018HI\u2019 sign", "HI"),
    ("the dog's 'HI'", "HI"), ('"" and "A"', '" and "')])
def test_quoted_texts(prompt, text):
    assert wanted_text(dict(prompt=prompt)) == text or text == '" and "'


# --- GenEval's metadata ---


THING = {"class": "circle", "count": 1}


@pytest.mark.parametrize("more", [
    dict(include=[THING | dict(count=n)]) for n in (0, -1, 1.5, True, "1", None, [1], 1e9, 101)] + [
    dict(include=[THING | dict(color=c)]) for c in ("mauve", 3, ["red"], "", "Red")] + [
    dict(include=[THING, {"class": "star", "count": 1, "position": p}]) for p in (
        ["left", 0], ["left of", 1], ["left of", 2], ["left of", -1], ["left of", True], "left of",
        ["left of"], ["left of", 0.0], ["left of", "0"], [["left of"], 0], {}, 3)] + [
    dict(include=[THING | dict(position=["left of", 0])])] + [
    dict(include=i) for i in (
        THING, "circle", 3, [3], [None], [[]], [{}], [], [{"class": "circle"}],
        [{"class": "sofa", "count": 1}], [{"class": ["circle"], "count": 1}],
        [THING, {"class": "cat", "count": 1}], [THING, THING | dict(count=2)],
        [THING | dict(color="red"), THING | dict(color="blue")])] + [
    dict(include=[THING], exclude=[THING | dict(count=n)]) for n in (1, 0, None, 2.5)] + [
    dict(category=["a"]), dict(tag=3), dict(tag=""), dict(text=""), dict(text=3), dict(exclude=3)])
def test_metadata_that_no_picture_satisfies(tmp_path, more):
    file = tmp_path / "p.jsonl"
    rows = dict(prompt="a"), dict(prompt="b") | more
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(ValueError, match="p.jsonl, line 2: "):
        read_prompts(file)


# --- shards ---


def shard(path, records, **more):
    with tarfile.open(path, "w", **more) as tar:
        for name, data in records:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good_records(n=30):
    return [r for i in range(n) for r in (
        (f"{i:03}.png", picture(i)), (f"{i:03}.json", b'{"prompt": "good"}'))]


def endless(size):
    """A tar's only header, whose member has `size` bytes, as base 256 writes also negative ones."""
    info = tarfile.TarInfo("a.png")
    info.size = 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


SHARDS = {
    "empty": b"", "zeros": bytes(10240), "html": b"<html>not found</html>" * 99,
    "random": random.Random(0).randbytes(20_000), "one byte": b"x", "negative": endless(-512),
    "very negative": endless(-2**40), "huge": endless(2**40), "gzip": gzip.compress(bytes(10**7)),
    "no end": endless(0), "short": endless(5)[:100], **dict.fromkeys((
        "of folders", "hidden", "cut", "picture alone", "text alone", "null", "deep", "twice",
        "nan", "latin-1", "no object", "no picture", "sparse", "outside")),
}


def write_shard(path, kind):
    png = picture()
    about = dict(null=b'{"prompt": null}', deep=b"[" * DEEP, nan=b'{"prompt": NaN}',
                 **{"latin-1": b'{"prompt": "caf\xe9"}', "no object": b"[3]"})
    if SHARDS[kind] is not None:
        path.write_bytes(SHARDS[kind])
    elif kind == "of folders":
        with tarfile.open(path, "w") as tar:
            tar.add(path.parent, "a", recursive=False)
    elif kind == "sparse":                      # says 10 GB and holds nothing
        path.write_bytes(endless(10 * 2**30) + bytes(1024))
    elif kind == "cut":
        shard(path, good_records(2))
        path.write_bytes(path.read_bytes()[:14_000])
    else:
        shard(path, {"hidden": [("._a.png", png), ("__meta__", png)], "picture alone": [
            ("a.png", png)], "text alone": [("a.txt", b"a")], "twice": [
            ("a.png", png), ("a.png", png)], "no picture": [("a.png", b"no"), ("a.txt", b"a")],
            "outside": [("a.json", b'{"file_name": "/etc/passwd", "prompt": "a"}')],
            }.get(kind, [("a.png", png), ("a.json", about.get(kind, b"{}"))]))


@pytest.mark.parametrize("kind", SHARDS)
def test_broken_shards(tmp_path, capsys, kind):
    """Alone they end the run; beside good ones they are named, and it goes on."""
    write_shard(tmp_path / "bad.tar", kind)
    words = complaint(lambda: next(pairs(tmp_path, CFG, 1, 0)))
    assert "bad.tar" in words, words
    shard(tmp_path / "good.tar", good_records())
    for *_, prompts in (next(d) for d in [pairs(tmp_path, CFG, 2, 0)] for _ in range(40)):
        assert prompts == ["good"] * 2
    said = capsys.readouterr().err
    assert said.count("unreadable: ") == said.count("bad.tar") >= 1 and "Traceback" not in said


def test_cut_shards_at_any_length(tmp_path, capsys):
    whole = shard(tmp_path / "a.tar", good_records(4)).read_bytes()
    shard(tmp_path / "b.tar", good_records(40))
    for n in range(0, len(whole) - 10240, 701):
        (tmp_path / "a.tar").write_bytes(whole[:n])
        assert next(pairs(tmp_path, CFG, 8, 0))[1] == ["good"] * 8
        if "a.tar" not in capsys.readouterr().err:       # cut between two members, or in padding
            assert not any(whole[n : n - n % 512 + 512]) or n % 512 == 0, n


def test_the_name_of_a_shard_is_no_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch PWNED #.tar", "file:a.tar", "-.tar", "{0..3}.tar", "a::b.tar"):
        shard(tmp_path / name, good_records(6))
    for folder in (".", tmp_path):
        assert next(pairs(folder, CFG, 30, 0))[1] == ["good"] * 30
    assert not (tmp_path / "PWNED").exists()


def test_small_archives_that_unpack_to_much(tmp_path, capsys, monkeypatch):
    """Of a record so many bytes are read, so many wait to be drawn from, and of gzip none."""
    monkeypatch.setattr(shards, "MOST_RECORD", 100_000)
    large = [("big.png", bytes(200_000)), ("big.json", b'{"prompt": "bad"}')]
    shard(tmp_path / "a.tar", good_records(20) + large)
    monkeypatch.setattr(shards, "MOST_WAITING", 150_000)
    waiting = [0]
    real = shards.taken

    def spy(buffer, rng):
        waiting.append(sum(shards.bytes_in(r[1]) for r in buffer))
        return real(buffer, rng)
    monkeypatch.setattr(shards, "taken", spy)
    data = pairs(tmp_path, CFG, 2, 0)
    assert {p for _ in range(20) for p in next(data)[1]} == {"good"}
    assert "big.png" in capsys.readouterr().err and max(waiting) == 0    # of shards: read later
    rows = [(f"row {i}", {"image": {"bytes": bytes(9_000)}}, tmp_path) for i in range(100)]
    assert len([*shards.shuffled(rows, random.Random(0))]) == 100
    assert 100_000 < max(waiting) < 180_000              # of parquet: so many bytes wait


# --- pictures ---


@pytest.mark.parametrize("source", ["/dev/zero", "FIFO", "FOLDER", "none", "text", "cut", "eps"])
def test_pictures_of_the_command_line(bad_home, monkeypatch, source):
    (bad_home / "text").write_text("x")
    file = dict(FIFO=bad_home / "fifo.png", FOLDER=bad_home, none=bad_home / "none", eps=bad_home /
                "a.eps", text=bad_home / "text", cut=bad_home / "cut.png").get(source, source)
    for flag in ("--image", "--mask"):
        more = ["--image", bad_home / "a.png"] if flag == "--mask" else []
        monkeypatch.setattr(sys, "argv", list(map(str, [
            "sample.py", *more, flag, file, "--edit", "x", "--out", bad_home / "o.png"])))
        assert str(file) in complaint(sample.main)
    for flag in ([], ["--answer"]):
        monkeypatch.setattr(sys, "argv", ["sample.py", *flag, "word " * 20_000])
        assert "bytes, more than" in complaint(sample.main)


def test_pictures_of_geneval(bad_home, tmp_path):
    def score(folder):
        score_all(geneval, geneval.shots_in(folder), folder, None, folder / "answers.jsonl")
    (tmp_path / "00000/samples").mkdir(parents=True)
    (tmp_path / "00000/metadata.jsonl").write_text(json.dumps(dict(
        tag="single_object", prompt="a", include=[THING])))
    for name in ("cut.png", "bomb.png", "nothing.png", "a.eps"):
        file = tmp_path / "00000/samples/0000.png"
        file.write_bytes((bad_home / name).read_bytes())
        assert "0000.png cannot be read" in complaint(score, tmp_path)
    file.unlink()
    os.mkfifo(file)
    assert "0000.png cannot be read" in complaint(score, tmp_path)


def test_numbers_of_32_bits_are_read_by_their_range(tmp_path):
    ramp = np.arange(256, dtype=np.int32).reshape(16, 16)
    for pixels in (ramp, ramp * 257):
        Image.fromarray(pixels).save(tmp_path / "a.tiff")
        assert np.array_equal(np.array(read_image(tmp_path / "a.tiff"))[..., 0], ramp)
    Image.fromarray((ramp * 256 + 9).astype(np.uint16) // 256).save(tmp_path / "a.png")    # dark
    assert np.array(read_image(tmp_path / "a.png")).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (4000, 3000), (7, 900)])
def test_the_language_model_sees_few_pixels(tmp_path, size):
    """Whatever the picture's size, what is asked about it has about the area that is drawn."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"question": "Is it?", "answer": "yes", "image": "a.png"}\n')
    row, = reflect.read_questions(tmp_path / "q.jsonl")
    for cfg in (preset("shapes"), preset("unirl-zero")):
        h, w = reflect.asked_about(row, cfg).shape[1:]
        assert h * w <= 1.5 * cfg.size**2 and max(h, w) / min(h, w) <= 200


# --- fuzz ---


def mutated(data, rng):
    """Bytes with a few of them changed, cut, doubled or moved."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        span = rng.choice((1, 2, 4, 8, 40))
        what = rng.randrange(6)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif what == 1:
            data[at : at + span] = rng.randbytes(span)
        elif what == 2:
            data[at : at + span] = b""
        elif what == 3:
            data[at:at] = data[at : at + span]
        elif what == 4:
            data[at : at + span] = bytes([rng.choice((0, 255, 127, 128))]) * span
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


KINDS = dict(png={}, jpeg={}, webp={}, gif={}, bmp={}, tiff={}, ppm={}, avif=dict(speed=10),
             jpeg2000={}, png16={})


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_pictures(kind):
    """900 of each: a picture in RGB, or one of the two errors of UNREADABLE."""
    if kind == "png16":
        data = io.BytesIO()
        Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(data, "png")
        data = data.getvalue()
    elif kind.upper() not in FORMATS:
        pytest.skip(f"this Pillow has no {kind}")
    else:
        data = picture(1, (16, 16), format=kind, **KINDS[kind])
    rng, read, broken = random.Random(kind), 0, 0
    for _ in range(900):
        try:
            image = read_image(io.BytesIO(mutated(data, rng)))
            assert image.mode == "RGB" and np.array(image).shape == (image.height, image.width, 3)
            read += 1
        except UNREADABLE as e:
            assert one_line(e)
            broken += 1
    assert broken > 30 and read + broken == 900


def test_mutated_lines(tmp_path):
    """3,000 files of prompts: rows of sound prompts, or an error that names file and line."""
    row = dict(tag="position", prompt="a \u201csign\u201d \U0001f600 <|im_end|>", include=[
        THING, {"class": "star", "count": 2, "color": "red", "position": ["left of", 0]}])
    whole = "".join(json.dumps(r, ensure_ascii=i % 2 > 0) + "\r\n" * (i + 1) for i, r in enumerate(
        [row, row | dict(exclude=[{"class": "star", "count": 3}])])).encode()
    rng, sound, broken = random.Random(0), 0, 0
    for i in range(3000):
        file = tmp_path / f"p{i % 2}.jsonl"
        file.write_bytes(mutated(whole, rng))
        try:
            for row in read_prompts(file):
                assert isinstance(row["prompt"], str) and row["prompt"].strip()
                row["prompt"].encode()
                assert all(type(part["count"]) is int for part in row.get("include") or [])
                sound += 1
        except ValueError as e:
            assert str(e).startswith(f"{file}"), e
            broken += 1
    assert sound > 300 and broken > 300


def test_mutated_shards(tmp_path, capsys):
    """400 shards: every record that comes out is one, and nothing else is raised."""
    rng, whole, n = random.Random(0), shard(tmp_path / "a.tar", good_records(4)).read_bytes(), 0
    headers = bytearray(whole)
    for _ in range(400):
        for at in range(0, 8 * 1024, 512):               # half of the blocks are headers
            if rng.random() < 0.1:
                headers[at : at + 512] = mutated(whole[at : at + 512], rng)[:512].ljust(512, b"\0")
        (tmp_path / "a.tar").write_bytes(headers)
        errors = []
        for where, raw, _ in shards.members(tmp_path / "a.tar", lambda *e: errors.append(e)):
            with suppress(*UNREADABLE):
                row = layouts.unpacked(raw, "t2i")
                assert isinstance(row, dict)
                n += 1
        headers = bytearray(whole)
    assert n > 400


def test_mutated_metadata_of_training(tmp_path):
    """1,000 records: a picture and a text, or UNREADABLE."""
    (tmp_path / "a.png").write_bytes(picture())
    whole = json.dumps(dict(file_name="a.png", text=["one", "two"], caption="three")).encode()
    rng, n = random.Random(0), 0
    for i in range(1000):
        (tmp_path / f"m{i % 2}.jsonl").write_bytes(mutated(whole, rng))
        with suppress(*UNREADABLE):
            for _, raw in raw_records(tmp_path / f"m{i % 2}.jsonl"):
                (file,), (text,) = layouts.sample(record(raw), tmp_path, "t2i")
                read_image(file)
                assert text and isinstance(text, str)
                n += 1
    assert n > 100


# --- size ---


def test_many_records_start_soon(tmp_path):
    """100,000 records in a fraction of a second, as text; see LOG.md for a million."""
    (tmp_path / "a.png").write_bytes(picture())
    line = json.dumps(dict(file_name="a.png", text="a caption of a length that people have " * 2))
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n" * 100_000)
    start = time.process_time()
    images, prompts = next(pairs(tmp_path, CFG, 4, 0))
    assert time.process_time() - start < 3 and images.shape == (4, 3, 64, 64)
    start = time.process_time()
    next(pairs(tmp_path, CFG, 4, 1))                     # read once, not once a call
    assert time.process_time() - start < 1
    assert torch.is_tensor(images)
