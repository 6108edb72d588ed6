"""Files of prompts in GenEval's schema, of both worlds, and GenEval's own prompts, which are about
COCO's 80 things.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from common.layouts import all_records, columns_of, lookup
from common.read import as_text, named
from common.run import fail, write
from data.shapes.captions import article, make_meta, plural
from data.shapes.world import COLORS, RELATIONS, SHAPES, TAGS

COCO = ("person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
        "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
        "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, "
        "snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis "
        "racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, "
        "orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
        "dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell "
        "phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy "
        "bear, hair drier, toothbrush").split(", ")  # COCO's order, GenEval's names


def coco_meta(tag, rng):
    """One GenEval prompt about COCO's things; draws from rng as GenEval's create_prompts.py does,
    so that one seed gives its very file. No colours for `person`, COCO[0]."""
    def some(i, count=1, **more):
        return {"class": COCO[i], "count": count, **more}

    if tag == "counting":
        i, n = rng.choice(80), int(rng.integers(2, 4, endpoint=True))
        return make_meta(tag, [some(i, n)], plural(n, COCO[i]), exclude=[some(i, n + 1)])
    if tag == "colors":
        i, c = rng.choice(79) + 1, COLORS[rng.choice(10)]
        return make_meta(tag, [some(i, color=c)], article(f"{c} {COCO[i]}"))
    if tag == "color_attr":
        i, j = rng.choice(79, 2, replace=False) + 1
        c, d = (COLORS[k] for k in rng.choice(10, 2, replace=False))
        return make_meta(tag, [some(i, color=c), some(j, color=d)],
                         f"{article(f'{c} {COCO[i]}')} and {article(f'{d} {COCO[j]}')}")
    i, j = rng.choice(80, 2, replace=False)
    a, b = article(COCO[i]), article(COCO[j])
    if tag == "two_object":
        return make_meta(tag, [some(i), some(j)], f"{a} and {b}")
    rel = RELATIONS[rng.choice(4)]                    # position
    return make_meta(tag, [some(j), some(i, position=[rel, 0])], f"{a} {rel} {b}")


def geneval_prompts():
    """The 553 test prompts, a JSON line each: byte for byte GenEval's evaluation_metadata.jsonl."""
    rng = np.random.default_rng(43)
    rows = [make_meta("single_object", [{"class": COCO[i], "count": 1}], article(COCO[i]))
            for i in rng.choice(80, 80, replace=False)]
    rows += [coco_meta(tag, rng) for tag in TAGS[1:] for _ in range(100)]
    lines = list(dict.fromkeys(json.dumps(row) + "\n" for row in rows))              # each once
    if hashlib.sha256("".join(lines).encode()).hexdigest()[:16] != "5c48e0813e812e3c":
        fail(f"numpy {np.__version__} draws otherwise than GenEval's: these are not its prompts")
    return lines


def geneval_train_prompts(n=50_000):
    """n training prompts in Flow-GRPO's shares, none about what a test prompt is about.

    Departs from Flow-GRPO, which leaves out the test's exact words: here a pair of things (and of
    colours) is out in either order, whatever the relation. Lines repeat: just 160 can count."""
    def about(row):
        return row["tag"], *(frozenset(want.get(k) for want in row["include"])
                             for k in ("class", "count", "color"))

    tested = {about(json.loads(line)) for line in geneval_prompts()}
    shares = dict(position=7, counting=5, color_attr=3, colors=1, two_object=1)
    tags = [tag for tag, share in shares.items() for _ in range(share)]
    rng, rows = np.random.default_rng(0), []
    while len(rows) < n:
        row = coco_meta(tags[len(rows) % len(tags)], rng)
        if about(row) not in tested:
            rows.append(row)
    return [json.dumps(rows[i]) + "\n" for i in rng.permutation(n)]


MOST_COUNT = 16                    # objects of a class that the detector of photos can find


def check_part(part, before, most):
    """ValueError where one part of `include` or `exclude` is none; before: how many precede it;
    most: the highest count."""
    if not isinstance(part, dict) or not isinstance(part.get("class"), str):
        raise ValueError("`include` and `exclude` are lists of objects with `class` and `count`")
    if type(part.get("count")) is not int or not 1 <= part["count"] <= most:
        raise ValueError(f"`count` of {part['class']!r} is no whole number from 1 to {most}")
    if part.get("color") is not None and part["color"] not in COLORS:
        raise ValueError(f"`color` of {part['class']!r} is none of {', '.join(COLORS)}")
    where = part.get("position")
    if where is not None and not (
            isinstance(where, list) and len(where) == 2 and where[0] in RELATIONS
            and type(where[1]) is int and 0 <= where[1] < before):
        raise ValueError(f"`position` of {part['class']!r} is not one of {', '.join(RELATIONS)} "
                         "and the number, from 0, of a part of `include` before it")


def without_nulls(row):
    """-> a row, and what it includes and excludes, without what is null: where rows differ, parquet
    has every field in each."""
    def some(part):
        return {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
    return {k: [*map(some, v)] if k in ("include", "exclude") and isinstance(v, list) else v
            for k, v in some(row).items()}


def check_meta(row):
    """GenEval's metadata of a row, if it has any; ValueError where it is not of the schema, or asks
    for what no picture can show."""
    for k in ("tag", "category", "text"):
        if row.get(k) is not None and (isinstance(row[k], list) or not as_text(row[k], k)):
            raise ValueError(f"`{k}` is {named(row[k])}, no text")
    parts = {k: row.get(k) or [] for k in ("include", "exclude")}
    for k, of in parts.items():
        if not isinstance(of, list):
            raise ValueError(f"`{k}` is {named(of)}, no list")
        for i, part in enumerate(of):
            included = k == "include"
            check_part(part, i if included else 0, MOST_COUNT if included else MOST_COUNT + 1)
    if row.get("include") == [] and not row.get("text"):
        raise ValueError("`include` asks for nothing")
    its = {part["class"] for of in parts.values() for part in of}
    if not (its <= {*SHAPES} or its <= {*COCO}):           # no detector sees both worlds
        raise ValueError(f"{', '.join(sorted(its))}: not all shapes of the classroom, nor all "
                         "among GenEval's 80 names: SHAPES in data/shapes/world.py, COCO in "
                         "rewards/prompts.py")
    asked = {}
    for part in parts["include"]:
        what = part["count"], part.get("color")
        if asked.setdefault(part["class"], what) != what:
            raise ValueError(f"{part['class']!r} is asked for twice, and otherwise")
    for part in parts["exclude"]:
        if part["class"] in asked and part["count"] <= asked[part["class"]][0]:
            raise ValueError(f"{part['class']!r} is asked for and excluded")


def read_prompts(path, columns=""):
    """Prompts, and what rewards read of them, such as GenEval's metadata: jsonl, a JSON list, .csv,
    .txt with a prompt a line, or another layout of docs/data.md -> list of rows with `prompt`. What
    is broken raises ValueError with its line. columns: --columns"""
    return [row for row, _, _ in prompts_of(path, columns)]


def prompts_of(path, columns=""):
    """As read_prompts -> (row, its file and line, its folder) of each"""
    columns = columns_of(columns)
    for where, row, folder in all_records(path):
        try:
            row = without_nulls(row)
            row.pop("group", None)                       # which in training numbers the groups
            prompt = as_text(lookup(row, "prompt", columns), "prompt", where)
            if columns.get("prompt", "text") == "text" and "prompt" not in row:
                row.pop("text", None)                    # which beside a prompt is a sign's letters
            check_meta(row)
        except (ValueError, LookupError) as e:
            raise ValueError(f"{where}: {e}") from None
        yield row | dict(prompt=prompt), where, folder


def write_prompts(name="", path="", *more):
    """--write-prompts NAME FILE; an existing file stays as it is."""
    makers = {"geneval": geneval_prompts, "geneval-train": geneval_train_prompts}
    if name not in makers or not path or more:
        fail(f"--write-prompts takes one of {', '.join(makers)}, and a file")
    if Path(path).exists() or not Path(path).absolute().parent.is_dir():
        fail(f"{path} exists or is in no folder that does: choose another file")
    lines = makers[name]()
    write(path, "".join(lines))
    print(f"{path}: {len(lines)} prompts")
