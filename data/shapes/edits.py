"""Edits of the classroom's scenes: how they are made and said, whether a picture shows one, and how
many of the held-out ones a policy gets right.
"""

import hashlib
import json
import math

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.layouts import all_records, pictures_in
from common.read import UNREADABLE, arrays, pixels, read_image
from common.run import fail
from common.show import by_tag, grid, mean_and_error, spread
from data.shapes.bench import PROMPTS
from data.shapes.captions import CAPTION_ERROR, article, make_meta, scene_for
from data.shapes.judge import SHAPES_THRESHOLDS, detect_shapes, evaluate, extra_objects
from data.shapes.world import (SHAPES, SIDE, SIZES, VERSION, box, named, place, relation,
                               render, seen_color)

# ---------------------------------------------------------------------------------------------
# A source scene, a target scene that differs in exactly one thing, and how to say it.

KINDS = ["add", "remove", "recolor", "move", "replace"]


def describe(scene):
    """Metadata, with caption, that names every thing of a scene of distinct shapes."""
    return make_meta("scene", [{"class": t["shape"], "count": 1, "color": t["color"]}
                               for t in scene],
                     ", ".join(article(named(t)) for t in scene))  # fmt: skip


def describe_position(scene):
    """Metadata of two things by how the second stands to the first (the world's `position`)."""
    (rel,) = relation(box(scene[1]), box(scene[0]))
    a, b = scene[1]["shape"], scene[0]["shape"]
    return make_meta("position", [{"class": b, "count": 1},
                                  {"class": a, "count": 1, "position": [rel, 0]}],
                     f"{article(a)} {rel} {article(b)}")  # fmt: skip


def edit_scene(source, kind, rng):
    """Change exactly one thing of `source` (distinct shapes): (target, instruction, inverse), or
    None where that fails (crowded, or nothing to remove or move)."""
    i = rng.randrange(len(source))
    old, rest = source[i], source[:i] + source[i + 1 :]
    free = [s for s in SHAPES if s not in [t["shape"] for t in source]]
    add, remove = "add {}".format, "remove the {}".format
    if kind == "add" and len(source) < 4:
        shape = rng.choice(free)
        new = dict(shape=shape, color=seen_color(shape, rng), size=rng.choice(SIZES))
        target = place([new], rng, keep=source, tries=1)
        return target and (target, add(article(named(new))), remove(named(new)))
    if kind == "remove" and len(source) > 1:
        return rest, remove(named(old)), add(article(named(old)))
    if kind == "recolor":
        new = dict(old, color=seen_color(old["shape"], rng))
        say = f"change the color of the {old['shape']} to {{}}".format
        same = new["color"] == old["color"]
        return None if same else (source[:i] + [new] + source[i + 1 :], say(new["color"]),
                                  say(old["color"]))  # fmt: skip
    if kind == "replace":
        shape = rng.choice(free)
        new = dict(old, shape=shape, color=seen_color(shape, rng))
        say = "replace the {} with {}".format
        return (source[:i] + [new] + source[i + 1 :], say(named(old), article(named(new))),
                say(named(new), article(named(old))))  # fmt: skip
    if kind == "move" and len(source) == 2:
        was = relation(box(source[1]), box(source[0]))
        target = place(source[1:], rng, keep=source[:1], tries=1)
        now = target and relation(box(target[1]), box(target[0]))
        if now and len(was) == len(now) == 1 and was != now:
            say = [f"move the {source[1]['shape']} {'to the ' * r.endswith('of')}{r} "
                   f"the {source[0]['shape']}" for r in (*now, *was)]  # fmt: skip
            return target, *say
    return None


def sample_edit(rng, kind=None, source=None):
    """One edit; rng is a random.Random; kind one of KINDS, or any; source a scene, or a new one.

    dict(kind, source, target: scenes; instruction, inverse: text; source_meta, target_meta:
    GenEval metadata, whose `prompt` is the caption).  A move's captions name the relation, the
    others' every thing with its colour."""
    while True:
        k = kind or rng.choice(KINDS)
        for _ in range(50):  # or another kind: a given source may allow no move, no removal ...
            things = [dict(shape=s, color=seen_color(s, rng), size=rng.choice(SIZES))
                      for s in rng.sample(SHAPES, 2 if k == "move" else rng.randint(1, 3))]
            scene = source or place(things, rng)
            if done := scene and edit_scene(scene, k, rng):
                target, instruction, inverse = done
                say = describe_position if k == "move" else describe
                return dict(kind=k, source=scene, target=target, instruction=instruction,
                            inverse=inverse, source_meta=say(scene), target_meta=say(target))


def held(scene):
    """Is the scene kept for evaluation? An eighth of all, by its hash: no edit that is trained on,
    by example or by reward, starts from one or leads to one."""
    things = json.dumps(sorted(scene, key=str), sort_keys=True)
    return hashlib.sha256(things.encode()).digest()[0] < 32


def split_edit(rng, kind=None, test=False):
    """sample_edit on one side of the split; a test's source is held, wherever it leads."""
    while True:
        e = sample_edit(rng, kind)
        if held(e["source"]) if test else not (held(e["source"]) or held(e["target"])):
            return e


def training_edit(rng, error=CAPTION_ERROR):
    """An edit whose target shows, at the stated rate, not what the instruction says: nothing was
    done, or, as often, another edit was."""
    e = split_edit(rng)
    if rng.random() < error:
        told, done = e["target"], rng.random() < 0.5
        e["target"] = e["source"]
        while done and (e["target"] == told or e["target"] == e["source"] or held(e["target"])):
            e["target"] = sample_edit(rng, source=e["source"])["target"]
    return e


# ---------------------------------------------------------------------------------------------
# Is the change there, by GenEval's rule, and is all else as it was?

# Pixels between the sides of two boxes that are one: the detector errs by 3, the VAE by 1 more;
# places are 16 apart, sizes 4, so that the next size passes and the next place does not.
NEAR = 5


def near(found, place):
    return max(abs(a - b) for a, b in zip(found["box"], place)) <= NEAR


def asked_of(edit):
    """-> what an edit changes, as GenEval metadata that the source does not meet; what it moves, as
    (class, old box), or None; and what must stay, [(classes, colours, box or None = anywhere)]:
    every thing of the source, a recoloured or replaced one as its old or its new self.
    Shapes are distinct within a scene."""
    old = {t["shape"]: t for t in edit["source"]}
    new = {want["class"]: want for want in edit["target_meta"]["include"]}
    came = [want for s, want in new.items() if s not in old]
    gone = [s for s in old if s not in new]
    if edit["kind"] == "move":
        change, s = edit["target_meta"], edit["target_meta"]["include"][1]["class"]
        moved = s, box(old[s])
    else:
        came += [new[s] for s, t in old.items() if s in new and new[s]["color"] != t["color"]]
        change = dict(include=came, exclude=[{"class": s, "count": 1} for s in gone])
        moved = None
    stay = []
    for s, t in old.items():
        after = new.get(s) or (came and came[0])                 # gone, and one came: replaced
        if after:
            stay.append(({s, after["class"]}, {t["color"], after.get("color", t["color"])},
                         None if moved and s == moved[0] else box(t)))
    return change, moved, stay


def check_edit(image, edit):
    """One image (H,W,3) and a row of edit_*.jsonl -> dict(success, preservation, extra).

    success       0 or 1: what the instruction changes is there, every count exact (`strict`); what
                  it moves is no longer where it was: a diagonal may seem to hold both relations
    preservation  in [0,1]: of the source's other things, the share still there in shape, colour
                  and, within NEAR, place and size; a thing too many counts as one more that is not
    extra         things too many: of a shape in neither source nor target, or a second of one"""
    change, moved, stay = asked_of(edit)
    found = [f for f in detect_shapes(image) if f["score"] > SHAPES_THRESHOLDS[0]]
    still = moved and any(f["class"] == moved[0] and near(f, moved[1]) for f in found)
    kept = sum(any(f["class"] in classes and f["color"] in colors and (not place or near(f, place))
                   for f in found) for classes, colors, place in stay)
    known = {t["shape"] for t in edit["source"]} | {
        want["class"] for want in edit["target_meta"]["include"]}
    extra = extra_objects(found, dict(include=[{"class": s, "count": 1} for s in known]))
    return dict(success=float(evaluate(found, change)["strict"] and not still),
                preservation=kept / (len(stay) + extra), extra=extra)


def must_be_checked(row):
    """ValueError where the checker of the classroom's edits can make nothing of a row."""
    try:
        check_edit(np.zeros((SIDE, SIDE, 3), np.uint8), row)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{row['where']}: reward 'edit' cannot check it, {type(e).__name__}: {e}"
                         ) from None


def scored_edit(rng):
    """One example of the classroom: (source, edited, instruction, score), the score being the
    checker's. Edited by the target itself or, where one must be found wanting: nothing, another
    edit, a redrawn scene, the target with one thing more changed."""
    row = sample_edit(rng)
    shown, made = row["target"], rng.choice(["target", "source", "wrong", "redrawn", "more"])
    while shown is row["target"] and made != "target":
        if made == "source":
            shown = row["source"]
        elif made == "redrawn":
            shown = scene_for(row["target_meta"], rng)
        else:
            start = row["target" if made == "more" else "source"]
            other = edit_scene(start, rng.choice(KINDS), rng)    # None: no room, nothing to move
            shown = other[0] if other else row["target"]
    image = render(shown)
    v = check_edit(image, row)
    return render(row["source"]), image, row["instruction"], v["success"] * v["preservation"]


# ---------------------------------------------------------------------------------------------
# The benchmark.

def picture_of(source, folder):
    """A scene, a file of a folder or (of parquet) its bytes -> (H,W,3) uint8; ValueError"""
    try:
        if isinstance(source, list) and source and all(isinstance(x, dict) for x in source):
            return render(source)
        pictures = pictures_in(source, folder)
        if len(pictures) != 1:
            raise ValueError(f"it is {len(pictures)} pictures, and RL edits one")
        return np.array(read_image(pictures[0]))
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as e:   # the last: of a scene
        raise ValueError(f"{type(e).__name__}: {e}") from None


def source_picture(row, size):
    """A row's source, a file or a scene -> uint8 (3,size,size). As in grpo.py all pictures are
    square: others lose what stands out."""
    try:
        image = Image.fromarray(picture_of(row["source"], row["folder"]))
    except ValueError as e:
        fail(f"{row['where']}: its source cannot be read ({e})")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return pixels(image)


def edit_table(rows, judged):
    """check_edit's dicts, n for each of P rows -> metrics over the kinds (a row's tag), x_se being
    the standard error of x. `both` is sqrt(mean success x mean preservation), not a mean of roots;
    its error is that of its linear part, for the two means correlate."""
    s, p = (np.array([[v[k] for v in vs] for vs in judged]) for k in ("success", "preservation"))
    units = [dict(tag=row["tag"], prompt=str(i)) for i, row in enumerate(rows)]   # each its own
    out = dict(world=VERSION, images=s.size)
    for kind, mine in {"": range(len(rows)), **by_tag(rows)}.items():
        a, b, who = s[mine], p[mine], [units[i] for i in mine]
        (ms, es), (mp, ep) = mean_and_error(a, who), mean_and_error(b, who)
        both = math.sqrt(ms * mp)
        eb = mean_and_error((mp * a + ms * b) / (2 * both), who)[1] if both else 0.0
        for name, mean, error in ((kind or "success", ms, es), (f"{kind} preservation", mp, ep),
                                  (f"{kind} both", both, eb)):
            out[name.strip()], out[name.strip() + "_se"] = mean, error
    return out


def bench_edit(edit, n_per_row=1, limit=None, png=None, draw=None):
    """The classroom's held-out edits -> flat dict of metrics, see edit_table.

    edit(instructions, images, seeds) -> uint8 (N,3,64,64), images N lists of one uint8 (3,64,64). A
    seed depends on its row and its number among n_per_row only.  limit: at most so many images,
    equally many per kind.  png: four rows per kind, source and edited, right ones framed green.
    draw(prompts, seeds), if given, adds what two that do not edit score: `identity`, the source
    itself, and `redrawn`, the target's caption drawn from scratch."""
    rows = [dict(row, tag=row["kind"]) for _, row, _ in all_records(PROMPTS / "edit_eval.jsonl")]
    k = limit // n_per_row // len(by_tag(rows)) if limit else len(rows)
    assert k, f"limit={limit} images do not reach every kind with {n_per_row} per row"
    chosen, results = spread(rows, k), {}
    mine = [rows[i] for i in chosen]
    source = np.stack([render(row["source"]) for row in mine])                   # (P,64,64,3)
    todo = [(j, 1000 * i + m) for j, i in enumerate(chosen) for m in range(n_per_row)]
    painters = {"": edit, "identity": lambda says, x, seeds: torch.stack([own for own, in x]),
                "redrawn": draw}
    for name, painter in painters.items() if draw else [("", edit)]:
        images = []
        for a in tqdm(range(0, len(todo), 64), name or "edit", unit="batch", disable=None):
            now, seeds = zip(*todo[a : a + 64])
            if painter is draw:
                images.append(draw([mine[j]["target_meta"]["prompt"] for j in now], list(seeds)))
                continue
            seen = [[torch.from_numpy(source[j]).permute(2, 0, 1)] for j in now]
            images.append(painter([mine[j]["instruction"] for j in now], seen, list(seeds)))
        images = arrays(torch.cat([x.cpu() for x in images])).reshape(
            -1, n_per_row, SIDE, SIDE, 3)
        judged = [[check_edit(x, row) for x in xs] for row, xs in zip(mine, images)]
        out = edit_table(mine, judged)
        results |= {name: out} if name else out
        if png and not name:
            show = spread(mine, 4)
            pairs = np.stack([source[show], images[show, 0]], 1).reshape(-1, SIDE, SIDE, 3)
            right = [judged[i][0]["success"] * judged[i][0]["preservation"] == 1 for i in show]
            grid(pairs, [t for i in show for t in (mine[i]["instruction"], "")], png,
                 [f for r in right for f in (None, r)])
    return results
