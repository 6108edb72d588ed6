"""Layouts of data that people have, each in miniature, in its makers' own field names: docs/data.md
shows a line of each, and each is trained on for two steps."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import common.layouts as layouts_py
import cycle_edit
import grpo
import data.shapes.looks as looks_py
import pretrain
from common.data import pairs
from common.layouts import unpacked
from common.presets import Config
from data.shapes.edits import bench_edit
from rewards.prompts import read_prompts
from test_cli import complaint

CFG = Config(mmdit=tiny.MMDIT)
DOCS = (tiny.ROOT / "docs/data.md").read_text()
N = 4                                                    # records of a layout


def png(i):
    data = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 6 * i, np.uint8)).save(data, "png")
    return data.getvalue()


def write(folder, files):
    """{name: bytes, text, or what is written as JSON}"""
    for name, what in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        what = what if isinstance(what, (bytes, str)) else json.dumps(what)
        path.write_bytes(what if isinstance(what, bytes) else what.encode())
    return folder


def line(text):
    """A line that docs/data.md shows"""
    assert f"`{text}`" in DOCS, text
    return text


def numbered(row, i):
    """A row of docs/data.md about pictures 0, 1 and 2 -> of record i: 10 i, 10 i + 1, 10 i + 2"""
    if isinstance(row, dict):
        return {k: numbered(v, i) for k, v in row.items()}
    if isinstance(row, list):
        return [numbered(v, i) for v in row]
    head, slash, name = str(row).rpartition("/")
    stem, dot, ending = name.rpartition(".")
    return f"{head}{slash}{10 * i + int(stem)}.{ending}" if stem.isdigit() and dot else row


def rows(text, n=N):
    """A line of docs/data.md, as n records"""
    return [numbered(json.loads(line(text)), i) for i in range(n)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def tar(folder, name, records):
    """A shard of records [{ending: bytes or what is written as JSON or text}]"""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for i, record in enumerate(records):
            for ending, what in record.items():
                what = what if isinstance(what, (bytes, str)) else json.dumps(what)
                what = what if isinstance(what, bytes) else what.encode()
                info = tarfile.TarInfo(f"{i:09}.{ending}")
                info.size = len(what)
                out.addfile(info, io.BytesIO(what))
    return folder


def images(folder="", n=N):
    return {f"{folder}{10 * i + k}.png": png(10 * i + k) for i in range(n) for k in range(3)}


RED = "a red circle"
META = {"url": "http://x/0.jpg", "caption": RED, "width": 64, "height": 64, "status": "success"}


def own(folder):
    return write(folder, images() | {"metadata.jsonl": jsonl(rows(
        '{"file_name": "0.png", "prompt": "a red circle"}'))})


def own_in_train(folder):
    own(folder / "train")
    write(folder / "test", {"metadata.jsonl": '{"file_name": "none.png", "prompt": "held out"}'})
    return folder


def imagefolder(folder):
    return write(folder, images() | {"metadata.jsonl": "\ufeff" + jsonl(rows(
        '{"file_name": "0.png", "text": ["a red circle", "one circle"]}')).replace("\n", "\r\n")})


def in_csv(folder):
    head, row = line("file_name,text"), line("0.png,a red circle")
    body = [row.replace("0.png", f"{10 * i}.png") for i in range(N)]
    return write(folder / "train", images() | {"metadata.csv": "\r\n".join([head, *body])}).parent


def img2dataset(folder):
    return tar(write(folder, {"00000_stats.json": {"count": 4}, "00000.parquet": b"of no use"}),
               "00000.tar", [{"jpg": png(i), "txt": RED, "json": META} for i in range(N)])


def blip3o(folder):
    return tar(folder, "a.tar", [{"jpg": png(i), "txt": line(RED) + "\n"} for i in range(N)])


def text_to_image_2m(folder):
    for name in ("data_512_2M/0.tar", "data_1024_10K/0.tar"):
        tar(folder, name, [{"jpg": png(i), "json": json.loads(line('{"prompt": "a red circle"}'))}
                           for i in range(N)])
    return folder


def openuni(folder):
    listed = rows('{"image": "raw/0.png", "annotation": "raw/0.json"}')
    listed[-1]["annotation"] = "raw/last.txt"
    notes = {row["annotation"]: {"re_caption": RED} for row in listed[:-1]}
    return write(folder, images("raw/") | notes | {"raw/last.txt": RED, "data.json": listed})


def deepgen(folder):
    return write(folder, images("images/") | {"list.json": rows(
        '{"type": "T2I", "txt": "a red circle", "image_path": "images/0.png"}')}) / "list.json"


def kohya(folder):
    texts = {f"10_circle/{10 * i + k}.txt": RED + "\n" for i in range(N) for k in range(3)}
    return write(folder, images("10_circle/") | texts)


def parquet(folder):
    """As the Hub has it: a picture is its bytes, as Image has them, or a plain struct."""
    datasets = pytest.importorskip("datasets")
    line('{"image": {"bytes": ..., "path": "0.png"}, "text": "a red circle"}')
    (folder / "data").mkdir(parents=True)
    for name, texts in dict(train=RED, test="held out").items():
        made = datasets.Dataset.from_dict(dict(text=[texts] * N, image=[
            dict(bytes=png(i), path=f"{i}.png") for i in range(N)]))
        if name == "train":
            made = made.cast_column("image", datasets.Image())
        made.to_parquet(folder / f"data/{name}-00000-of-00001.parquet")
    return folder


def saved(folder):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(dict(caption=[RED] * N, image=[
        dict(bytes=png(i), path=None) for i in range(N)])).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=made, test=made).save_to_disk(folder)
    return folder


PICTURES = [own, own_in_train, imagefolder, in_csv, img2dataset, blip3o, text_to_image_2m, openuni,
            deepgen, kohya, parquet, saved]


def trained_on(parts, tmp_path, *flags):
    log = tiny.play(parts, tmp_path / "run", "--init", "", "--batch", 2, "--steps", 2, *flags,
                    main=pretrain.main)
    assert [row["step"] for row in log] == [1, 2]
    return log


@pytest.mark.parametrize("layout", PICTURES, ids=lambda f: f.__name__)
def test_pictures_with_captions(parts, tmp_path, capsys, layout):
    path = layout(tmp_path / "data")
    data = pairs(path, CFG, 2, 0)
    seen = [next(data) for _ in range(12)]
    said = {text for _, texts in seen for text in texts}
    assert said == ({RED, "one circle"} if layout is imagefolder else {RED})
    assert len({int(x.float().mean()) for xs, _ in seen for x in xs}) >= N       # all of them
    line_of_it = capsys.readouterr().out
    assert str(path) in line_of_it and "64 x 64" in line_of_it and line_of_it.count("\n") == 1
    assert all(row["loss"] > 0 for row in trained_on(parts, tmp_path, "--data", path))


EDITS = dict(
    ours='{"source": "0.png", "target": "1.png", "instruction": "make it blue"}',
    omniedit='{"src_img": "0.png", "edited_img": "1.png", "edited_prompt_list": ["make it blue", '
             '"paint it blue"]}',
    metaquery='{"source_images": ["0.png", "2.png"], "prompt": "make it blue", "target_image": '
              '"1.png"}',
    gpt_image_edit='{"input": "0.png", "output": "1.png", "instruction": "make it blue"}',
    dancegrpo='{"source_image": "0.png", "target_image": "1.png", "instruction": "make it blue"}',
    deepgen='{"input_image": ["0.png"], "output_image": "1.png", "instruction": "make it blue"}',
)


@pytest.mark.parametrize("who", [*EDITS, "shards", "parquet"])
def test_edits(parts, tmp_path, monkeypatch, who):
    monkeypatch.setattr(looks_py, "bench_edit", lambda edit, *_: bench_edit(edit, 1, 5))
    folder = tmp_path / "edits"
    if who == "shards":
        about = json.loads(line('{"instruction": "make it blue"}'))
        tar(folder, "0.tar", [{"source.png": png(10 * i), "source2.png": png(10 * i + 2),
                               "target.png": png(10 * i + 1), "json": about} for i in range(N)])
    elif who == "parquet":
        datasets = pytest.importorskip("datasets")
        folder.mkdir()
        made = {k: [dict(bytes=png(10 * i + at), path=None) for i in range(N)]
                for at, k in enumerate(("src_img", "edited_img"))}
        made["edited_prompt_list"] = [["make it blue"]] * N
        datasets.Dataset.from_dict(made).to_parquet(folder / "0.parquet")
    else:
        form = "edits.json" if who == "deepgen" else "metadata.jsonl"
        made = rows(EDITS[who])
        write(folder, images() | {form: made if form == "edits.json" else jsonl(made)})
    data = pairs(folder, CFG, 2, 0, form="edit")
    seen = [next(data) for _ in range(8)]
    said = {text for _, texts, _ in seen for text in texts}
    assert said == {"make it blue"} | ({"paint it blue"} if who == "omniedit" else set())
    for targets, _, sources in seen:
        for new, old in zip(targets, sources):
            assert len(old) == 1 + (who in ("metaquery", "shards"))
            assert (new.int() - old[0]).unique().tolist() == [6]        # target 1 of source 0
    plain = own(tmp_path / "plain")
    log = trained_on(parts, tmp_path, "--data", plain, "--edits", folder, "--edit-share", 1.0)
    assert all(row["edit_loss"] > 0 for row in log)


@pytest.mark.parametrize("text", [
    '{"image": "0.png", "prompt": "make it blue", "caption": "a red circle", "target_caption": '
    '"a blue circle"}', '{"image": "0.png", "prompt": "make it blue"}'], ids=["unirl", "flow_grpo"])
def test_edits_without_targets(parts, tmp_path, text):
    folder = write(tmp_path / "edits", images() | {"metadata.jsonl": jsonl(rows(text))})
    first = cycle_edit.read_edits(folder)[0]
    assert first["instruction"] == "make it blue" and first["source"] == "0.png"
    if "caption" in text:
        assert first["captions"] == [RED, "a blue circle"] and first["prompt"] == "a blue circle"
    log = tiny.play(parts, tmp_path / "run", "--steps", 2, "--reward", "jpeg_compressibility",
                    "--data", folder, main=cycle_edit.main)
    assert [row["step"] for row in log] == [0, 1, 2]


GENEVAL = ('{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], '
           '"prompt": "a photo of a red circle"}')


@pytest.mark.parametrize("name, text", [
    ("train.txt", 'a sign that says "HI" on a wall'), ("p.jsonl", GENEVAL), ("p.json", GENEVAL),
    ("p.jsonl", '{"prompt": "a red circle", "key": "partiprompts0"}'),
    ("p.jsonl", '{"caption": "a red circle"}'), ("p.csv", "caption"), ("p.parquet", "caption"),
], ids=["txt", "geneval", "list", "dpg", "caption", "csv", "parquet"])
def test_prompts(parts, tmp_path, name, text):
    file = tmp_path / "prompts" / name
    file.parent.mkdir()
    if name == "p.parquet":
        pytest.importorskip("datasets").Dataset.from_dict(dict(caption=[RED] * 4)).to_parquet(file)
    else:
        made = [json.loads(line(text))] * 4 if "{" in text else []
        file.write_text("caption\r\n" + f"{RED}\r\n" * 4 if name == "p.csv" else
                        json.dumps(made) if name == "p.json" else
                        jsonl(made) or f"{line(text)}\n\n" * 4)
    found = read_prompts(file)
    assert found == read_prompts(file.parent) and len(found) == 4
    log = tiny.play(parts, tmp_path / "run", "--steps", 2, "--reward", "jpeg_compressibility",
                    "--prompts", file, main=grpo.main)
    assert [row["step"] for row in log] == [0, 1, 2]


def test_columns_of_other_names(parts, tmp_path):
    made = [dict(my_file=f"{10 * i}.png", my_text=RED, text="not this") for i in range(N)]
    folder = write(tmp_path / "data", images() | {"metadata.jsonl": jsonl(made)})
    columns = "caption=my_text, image=my_file"
    assert next(pairs(folder, CFG, 2, 0, columns=columns))[1] == [RED] * 2
    trained_on(parts, tmp_path, "--data", folder, "--columns", columns)
    assert read_prompts(folder, "caption=my_text")[0]["prompt"] == RED
    for wrong in ("caption", "title=x", "caption=", "=x", "a=b=c"):
        assert "--columns" in complaint(tiny.play, parts, tmp_path / "none", "--columns", wrong)
        assert not (tmp_path / "none").exists()
    assert "no file_name or image or image_path" in complaint(lambda: pairs(folder, CFG, 2, 0))
    assert "no none among its fields my_file, my_text" in complaint(
        lambda: pairs(folder, CFG, 2, 0, columns="image=my_file,caption=none"))
    beside = write(tmp_path / "beside", images() | {
        f"{10 * i}.json": dict(caption="short", my_text=RED) for i in range(N)})
    assert next(pairs(beside, CFG, 2, 0, columns="caption=my_text"))[1] == [RED] * 2
    for home in (beside, write(tmp_path / "texts", images() | {"0.txt": RED})):
        assert "typo" in complaint(lambda: pairs(home, CFG, 2, 0, columns="caption=typo"))


def test_pictures_on_top_and_below(tmp_path):
    """All are met, but for a Mac's own files beside them."""
    names = ["a", "sub/b", "sub/deep/c", "sub/._b", "._a", "val/held"]
    file = [*images().values()][0]
    folder = write(tmp_path, {f"{name}.png": file if "." not in name else b"x" for name in names} |
                   {f"{name}.txt": name for name in names})
    data = pairs(folder, CFG, 1, 0)
    assert {next(data)[1][0] for _ in range(6)} == {"a", "sub/b", "sub/deep/c"}


def test_pictures_of_a_shard_by_name():
    """In the order of their numbers, and none that only begins alike."""
    names = ["source.png", *(f"source{i}.png" for i in range(2, 13)), "source_depth.png",
             "target.png", "json"]
    raw = {name: io.BytesIO(b'{"instruction": "x"}' if name == "json" else name.encode())
           for name in sorted(names)}
    row = unpacked(raw, "edit")
    assert [x.getvalue().decode() for x in row["source"]] == names[:12]
    assert [x.getvalue().decode() for x in row["target"]] == ["target.png"]


def test_names_on_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(layouts_py, "of_datasets", lambda path, files=(): asked.append(str(path)))
    for name in ("owner/name", "owner/Edit-1.5M"):
        layouts_py.layout(Path(name), "edit")
    assert asked == ["owner/name", "owner/Edit-1.5M"]
    with pytest.raises(OSError):
        layouts_py.layout(Path("owner/name.jsonl"), "edit")


def test_parquet_beside_its_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    file = [*images().values()][0]
    folder = write(tmp_path / "rows", {"images/0.png": file})
    datasets.Dataset.from_list([dict(file_name="images/0.png", prompt=RED)]).to_parquet(
        folder / "metadata.parquet")
    for path in (folder, folder / "metadata.parquet"):
        assert next(pairs(path, CFG, 1, 0))[1] == [RED]


def test_nulls_of_parquet_are_nothing(tmp_path):
    """Where prompts differ, each has every field of the others, and it is null."""
    datasets = pytest.importorskip("datasets")
    plain = [dict(tag="colors", prompt="a red star", include=[
                 {"class": "star", "count": 1, "color": "red"}]),
             dict(tag="position", prompt="a star left of a ring", include=[
                 {"class": "ring", "count": 1},
                 {"class": "star", "count": 1, "position": ["left of", 0]}]),
             dict(tag="counting", prompt="two stars", exclude=[{"class": "star", "count": 3}],
                  include=[{"class": "star", "count": 2}], category="many")]
    file = tmp_path / "prompts.parquet"
    rows = [row | dict(category=row.get("category"), exclude=row.get("exclude"), include=[
        {k: part.get(k) for k in ("class", "count", "color")} for part in row["include"]])
        for row in plain]
    datasets.Dataset.from_list(rows).to_parquet(file)
    for row in plain:
        for part in row["include"]:
            part.pop("position", None)                   # its list is of two types: no column
    assert read_prompts(file) == plain


def test_what_cannot_be_decided(tmp_path, monkeypatch):
    """Two layouts in one folder are named; so is the library that is not there."""
    both = own(tmp_path / "both")
    blip3o(both)
    assert "metadata.jsonl and a.tar: give the file" in complaint(lambda: pairs(both, CFG, 2, 0))
    assert next(pairs(both / "a.tar", CFG, 2, 0))[1] == [RED] * 2
    lists = write(tmp_path / "lists", {"a.json": [], "b.jsonl": ""})
    assert "a.json and b.jsonl: give the file" in complaint(lambda: pairs(lists, CFG, 2, 0))
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows", {"0.parquet": b"", "data/x.txt": ""})
    for path in ("rows", Path("rows/0.parquet"), "owner/name"):
        assert "pip install datasets" in complaint(lambda: pairs(path, CFG, 2, 0))
    assert "neither metadata.jsonl" in complaint(lambda: pairs("rows/data", CFG, 2, 0))


def test_broken_parquet(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path, {"0.parquet": b"PAR1" + bytes(100) + b"PAR1"})
    assert "as a dataset" in complaint(lambda: next(pairs(tmp_path, CFG, 2, 0)))
