"""Training data as people have it: folders with metadata, lists, pictures beside captions, shards,
parquet, the Hub. What each is recognised by: docs/data.md."""

import io
import os
import re
import sys
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import accumulate, islice
from pathlib import Path

from common.read import (LOOSE, PICTURES, UNREADABLE, as_text, inside, parse_json, raw_records,
                         read_image, read_json, record, regular, utf8)
from common.run import beside, fail, one_line
from common.shards import Member, members, shuffled
from common.stop import this_rank

# Of training rows: files, the last of them drawn; texts. These are our names of a record's fields;
# the first file may be several.
FORMS = {
    "t2i": (("file_name",), ("prompt",)), "edit": (("source", "target"), ("instruction",)),
    "cot": (("file_name",), ("prompt", "reasoning")),
    "reflect": (("image", "refined"), ("prompt", "critique")),
    "prompts": ((), ("prompt",)),                                # of RL: texts alone
}
# Other people's names for them, in the order in which they are looked for.
NAMES = {
    "file_name": ("image", "image_path", "img", "jpg", "png", "jpeg", "webp"),
    "prompt": ("text", "caption", "txt", "re_caption"),
    "source": ("src_img", "source_image", "source_images", "input_image", "input", "image"),
    "target": ("edited_img", "target_image", "output_image", "output"),
    "instruction": ("edited_prompt_list", "prompt", "txt"),
}
# What --columns can name, and our name for it.
ROLES = dict(image="file_name", caption="prompt", **{k: k for k in (
    "source", "target", "instruction", "reasoning", "critique", "refined")})
FILES = (".jsonl", ".json", ".csv", ".txt", ".tar", ".parquet")
NOT_TRAINED = {"test", "val", "valid", "validation", "eval"}         # folders


# ---------------------------------------------------------------------------------------------
# A record -> what it holds


def columns_of(text):
    """--columns: "caption=my_text,image=my_file" -> {our name: the data's}; ValueError"""
    pairs = [item.partition("=") for item in text.split(",")] if text else []
    for role, _, name in pairs:
        if role.strip() not in ROLES or not name.strip():
            raise ValueError("it is like caption=my_text,image=my_file; what can be named is: "
                             + ", ".join(ROLES))
    return {ROLES[role.strip()]: name.strip() for role, _, name in pairs}


def lookup(row, name, columns={}):
    """The value of a record's field, under our name or another's; LookupError."""
    names = [columns[name]] if name in columns else (name, *NAMES.get(name, ()))
    for k in names:
        if k in row:
            return row[k]
    raise LookupError(f"no {' or '.join(names)} among its fields {', '.join(map(str, row))}"[:400])


def pictures_in(value, folder):
    """A field's value -> what read_image takes: a file's name, its bytes (as parquet has them) or
    several of these."""
    if isinstance(value, list):
        return [one for v in value for one in pictures_in(v, folder)]
    if isinstance(value, dict):                                  # {bytes, path} of `datasets`
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Member):
        value = value.read()
    return [io.BytesIO(value) if isinstance(value, bytes) else inside(folder, value)]


def caption_beside(row, folder, pictures, columns):
    """The caption that stands in a file of its own: `annotation`, or .txt of the picture's name,
    which has no column that --columns could name"""
    if "annotation" in row:
        file = inside(folder, row["annotation"])
    elif pictures and isinstance(pictures[-1], Path):
        file = pictures[-1].with_suffix(".txt")
    else:
        raise LookupError("no file that a caption could stand beside")
    if file.suffix == ".json":
        return lookup(record(read_json(file)), "prompt", columns)
    if "prompt" in columns:
        raise LookupError(f"{file.name} has no fields")
    with open(regular(file), "rb") as f:
        return utf8(f.read(2**20))


def sample(row, folder, form, columns={}, draw=0):
    """A record -> its pictures, the last of which is drawn, and its texts; ValueError, OSError.
    draw: decides which of several captions"""
    (*first, drawn), texts = FORMS[form]
    try:
        pictures = [p for name in first for p in pictures_in(lookup(row, name, columns), folder)]
        if first and not pictures:
            raise ValueError(f"{first[0]} is empty")
        own = pictures_in(lookup(row, drawn, columns), folder)
        if len(own) != 1:
            raise ValueError(f"{drawn} is {len(own)} pictures")
        said = []
        for name in texts:
            try:
                value = lookup(row, name, columns)
            except LookupError as e:
                try:
                    if name != "prompt":
                        raise e
                    value = caption_beside(row, folder, own, columns)
                except (FileNotFoundError, LookupError):
                    raise e from None
            said.append(as_text(value, name, draw))
        return pictures + own, said
    except LookupError as e:
        raise ValueError(str(e)) from None


# ---------------------------------------------------------------------------------------------
# Layouts. Each gives records in the order of a pass


@dataclass
class Data:
    """What --data and the like name."""

    about: str                  # what was understood, in words
    one_pass: Callable          # (rng or None, unreadable) -> (where, raw record, folder) of each;
                                # rng: shuffles; unreadable(where, error): of what gives no record
    row: Callable = record      # raw record -> {field: value}


@lru_cache(4)
def rows_of(file, stamp):
    """-> places and raw records, two lists: of a million tuples Python would look after each.
    stamp: when the file was written, and how long it is"""
    places, raws = [], []
    for place, raw in raw_records(file):
        places.append(place)
        raws.append(raw)
    return places, raws


def table(files):
    """metadata.jsonl or .csv, a list: kept in memory as text, and read once it is drawn"""
    parts = [rows_of(file, (os.stat(file).st_mtime_ns, os.stat(file).st_size)) for file in files]
    starts = [0, *accumulate(len(raws) for _, raws in parts)]            # of each file's records

    def one_pass(rng, unreadable):
        order = range(starts[-1])
        for i in rng.sample(order, len(order)) if rng else order:
            k = bisect(starts, i) - 1
            places, raws = parts[k]
            where = f"{files[k]}, {places[i - starts[k]]}"
            yield where, raws[i - starts[k]], files[k].parent
    return Data(f"{starts[-1]:,} records of {', '.join(f.name for f in files[:3])}", one_pass)


def captioned(folder, walk=os.walk):
    """Pictures that have their caption beside them, as kohya's and ai-toolkit's trainers want it
    -> Data, or None without any"""
    found = []
    for home, _, files in walk(folder):
        names = {*files}
        for name in sorted(names):
            stem, _, ending = name.rpartition(".")
            captions = [f"{stem}.{k}" for k in ("txt", "json") if f"{stem}.{k}" in names]
            if ending.lower() in PICTURES and captions:
                found.append((Path(home), dict(file_name=name, annotation=captions[0])))

    def one_pass(rng, unreadable):
        for home, row in rng.sample(found, len(found)) if rng else found:
            yield f"{home / row['file_name']}", row, home
    return Data(f"{len(found):,} pictures with captions beside them", one_pass) if found else None


def unpacked(raw, form):
    """A record of a shard -> {field: value}: those of its .json, its .txt, and its pictures, which
    have their field's name before their ending, as source.png and source2.png"""
    about = record(parse_json(utf8(raw["json"].read()), LOOSE)) if "json" in raw else {}
    ours = [k for name in FORMS[form][0] for k in (name, *NAMES.get(name, ()))]
    row = {k: v for k, v in about.items() if k not in ours}      # which name files elsewhere
    if "txt" in raw:
        row.setdefault("txt", utf8(raw["txt"].read()))
    for member in sorted(raw, key=lambda member: (len(member.rpartition(".")[0]), member)):
        stem, _, ending = member.rpartition(".")
        its = (k for k in ours if re.fullmatch(rf"{k}_?\d*", stem))     # source, source2
        name = next(its, None) if stem else "image"
        if ending in PICTURES and name and (stem or name not in row):
            row[name] = [*row.get(name, []), raw[member]]
    return row


def shards(files, form):
    def one_pass(rng, unreadable):
        order = [*files]
        if rng:
            rng.shuffle(order)
        found = (item for file in order for item in members(file, unreadable))
        return shuffled(found, rng) if rng else found
    return Data(f"{len(files)} shards (.tar)", one_pass, partial(unpacked, form=form))


def of_datasets(path, files=()):
    """parquet, a saved dataset, or owner/name on the Hub, by the library `datasets`; pictures stay
    packed until read_image has them."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{path}: parquet and saved datasets are read by a library: pip install datasets" if
            os.path.exists(path) else
            f"{path} is not here; datasets of the Hub are read by a library: pip install datasets"
        ) from None
    try:
        if files:
            rows = datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train",
                                         streaming=True)
        elif os.path.isdir(path):
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path), split="train", streaming=True)
        if isinstance(rows, dict):                               # of several splits
            rows = rows["train"] if "train" in rows else next(iter(rows.values()))
        packed = datasets.Image(decode=False)
        for name, its in (rows.features or {}).items():
            if isinstance(its, datasets.Image):
                rows = rows.cast_column(name, packed)
            elif isinstance(getattr(its, "feature", None), datasets.Image):
                rows = rows.cast_column(name, datasets.List(packed))
    except Exception as e:                           # whatever a library and the Hub may say
        raise ValueError(f"{path} cannot be read as a dataset: {one_line(e)}") from None

    def one_pass(rng, unreadable):
        home, stored = Path(files[0]).parent if files else Path(path), hasattr(rows, "num_rows")
        order = rng.sample(range(len(rows)), len(rows)) if stored and rng else None
        try:
            found = ((f"{path}, row {i}", row, home) for i, row in (
                ((k + 1, rows[k]) for k in order) if order else enumerate(rows, 1)))
            yield from shuffled(found, rng) if rng and not stored else found
        except Exception as e:
            fail(f"{path} cannot be read on as a dataset: {one_line(e)}")    # of all of it
    size = f"{len(rows):,} rows" if hasattr(rows, "num_rows") else f"{len(files) or 'many'} files"
    return Data(f"a dataset of {size}", one_pass)


# ---------------------------------------------------------------------------------------------
# Which layout is it?


def walk(folder):
    """os.walk in order, without what is hidden or held out"""
    for home, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f[0] != "." and f.lower() not in NOT_TRAINED)
        yield home, folders, sorted(f for f in files if f[0] != ".")


def trained(files):
    """Of several files those whose names begin with train, if some do"""
    return [f for f in files if f.name.startswith("train")] or files


def held_in(folder, form):
    """-> Data of what lies in this very folder, or None"""
    def files(*patterns):
        return [Path(f) for f in sorted(str(f) for p in patterns for f in folder.glob(p)
                                        if f.name[0] != ".")]
    meta, tars = files("metadata.jsonl", "metadata.csv"), files("*.tar")
    if len(meta) > 1 or meta and tars:
        raise ValueError(f"{folder} holds {meta[0].name} and {(meta[1:] or tars)[0].name}: give "
                         "the file that is meant, or move the other away")
    if meta or tars:
        return table(meta) if meta else shards(tars, form)
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return of_datasets(folder)
    if parquet := files("*.parquet"):
        return of_datasets(folder, trained(parquet))
    if form != "prompts" and captioned(folder, lambda folder: islice(walk(folder), 1)):
        return captioned(folder, walk)
    lists = trained(files("*.jsonl", "*.json", "*.csv", *["*.txt"] * (form == "prompts")))
    if len(lists) > 1:
        raise ValueError(f"{folder} holds {lists[0].name} and {lists[1].name}: give the file that "
                         "is meant")
    return table(lists) if lists else None


def layout(path, form):
    """A file, a folder or owner/name on the Hub -> Data; ValueError, OSError"""
    ending = path.suffix.lower()
    if path.is_file():
        return (shards([path], form) if ending == ".tar" else
                of_datasets(path, [path]) if ending == ".parquet" else table([path]))
    if not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not (path.exists() or
                                                           ending in FILES):
            return of_datasets(path)
        regular(path)
    for home in (path, path / "train", path / "data"):
        if home.is_dir() and (found := held_in(home, form)):
            return found
    deep = [Path(home, name) for home, _, files in walk(path) for name in files]
    for found in ([f for f in deep if f.name in ("metadata.jsonl", "metadata.csv")],
                  [f for f in deep if f.suffix == ".tar"],
                  trained([f for f in deep if f.suffix == ".parquet"])):
        if found:
            return (table(found) if found[0].name.startswith("metadata.") else
                    shards(found, form) if found[0].suffix == ".tar" else of_datasets(path, found))
    if found := captioned(path, walk):
        return found
    raise ValueError(f"{path} holds neither metadata.jsonl nor *.tar shards nor what else "
                     "docs/data.md lists")


def all_records(path, form="prompts"):
    """Every record of a file or folder -> (where, {field: value}, folder); the first that is broken
    raises ValueError, by its name."""
    def refuse(where, error):
        raise ValueError(f"{where}: {one_line(error)}")
    data = layout(beside(path), form)
    for where, raw, home in data.one_pass(None, refuse):
        try:
            row = data.row(raw)
        except ValueError as e:
            refuse(where, e)
        yield where, row, home


@cache
def say(text):
    """Prints, once a run, on rank 0."""
    if this_rank() == 0:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def understood(data, path, form, columns):
    """Says what was understood, by the first record that can be read; the user's error if none of
    the first twenty can."""
    errors = []
    first = data.one_pass(None, lambda where, e: errors.append(f"{where}: {one_line(e)}"))
    for where, raw, home in islice(first, 20):
        try:
            pictures, said = sample(data.row(raw), home, form, columns)
            width, height = [read_image(p) for p in pictures][-1].size
        except UNREADABLE as e:
            errors.append(f"{where}: {one_line(e)}")
            continue
        texts = " | ".join(text if len(text) < 60 else f"{text[:57]}..." for text in said)
        say(f"{path}: {data.about}; the first: {width} x {height}, {texts!r}")
        return
    fail(errors[0] if errors else f"{path} holds no records")
