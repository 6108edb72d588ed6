"""The classroom world: a universe small enough to know completely.

Scenes of coloured shapes, their captions (which err at a stated rate, as web captions do), their
GenEval metadata, edits, signs to read, riddles, questions and what is said in answer.
"""

import hashlib
import json
import math

import numpy as np


# ---------------------------------------------------------------------------------------------
# Scenes: a scene is a JSON list of things; everything else is derived from it, so truth is known.

SIDE = 64  # pixels
GROUND = (128, 128, 128)
PALETTE = {  # GenEval's ten colours
    "red": (225, 25, 30), "orange": (255, 140, 0), "yellow": (250, 225, 35),
    "green": (25, 150, 50), "blue": (40, 75, 220), "purple": (125, 35, 165),
    "pink": (255, 140, 195), "brown": (120, 65, 20), "black": (10, 10, 10),
    "white": (248, 248, 248),
}  # fmt: skip
COLORS = list(PALETTE)
SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart"]
SIDES = {"triangle": 3, "square": 4}  # for riddles: both are counts that a scene can hold
MIXES = {"orange": ("red", "yellow"), "green": ("blue", "yellow"), "purple": ("red", "blue"),
         "pink": ("red", "white")}  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four"]
RELATIONS = ["left of", "right of", "above", "below"]
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]  # GenEval
SIZES = (16, 20, 24)  # pixels across: small, medium, large
GAP = 2  # pixels kept free between two things
LATTICE = 16  # pixels: corners stand on the DiT's patches, so that it need not learn every phase

# Never drawn, never captioned in training: a quarter of the colour-shape pairs, and four stars.
UNSEEN_PAIRS = {(c, s) for i, c in enumerate(COLORS) for j, s in enumerate(SHAPES)
                if (i + 3 * j) % 4 == 0}  # fmt: skip
UNSEEN_COUNT = ("star", 4)

# Captions contradict their image this often (a wrong shape, colour, count, relation, or a missing
# object).  A model trained to its plateau then draws correctly about as often as its data was
# right; what is missing can be learned from reward, not from more of the same data.
CAPTION_ERROR = 0.2
GLYPHS = {  # 5x7 font, one string of 0/1 per row; sixteen characters that differ clearly
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "7": "11111 00001 00010 00010 00100 00100 00100",
}
GLYPHS = {c: np.array([[int(b) for b in row] for row in g.split()]) for c, g in GLYPHS.items()}
PITCH, PLATE_H, MARGIN = 12, 18, 2  # a glyph is drawn twice as large, 10x14, on a plate


def shape_mask(shape, size, supersample=8):
    """Coverage (size, size) in [0,1] of one shape that fills its box, antialiased."""
    n = size * supersample
    y, x = np.mgrid[0:n, 0:n] / (n / 2) - 1 + 1 / n  # pixel centres in [-1,1], y down
    r, angle = np.hypot(x, y), np.arctan2(x, -y)
    if shape == "circle":
        inside = r <= 1
    elif shape == "square":
        inside = r < 9
    elif shape == "triangle":
        inside = np.abs(x) <= (y + 1) / 2
    elif shape == "star":  # five points: the edge between tip (1) and notch (0.45) in polar form
        a = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)  # 0 at a tip
        notch = 0.45
        inside = r * (np.sin(math.pi / 5 - a) * notch + np.sin(a)) <= notch * math.sin(math.pi / 5)
    elif shape == "cross":
        inside = (np.abs(x) <= 0.36) | (np.abs(y) <= 0.36)
    elif shape == "diamond":
        inside = np.abs(x) + np.abs(y) <= 1
    elif shape == "ring":
        inside = (r <= 1) & (r >= 0.5)
    elif shape == "heart":
        lobes = np.hypot(np.abs(x) - 0.5, y + 0.45) <= 0.52
        inside = lobes | ((y >= -0.25) & (np.abs(x) <= (1 - y) / 1.25 * 0.98))
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return inside.reshape(size, supersample, size, supersample).mean((1, 3)).astype(np.float32)


MASKS = {(s, d): shape_mask(s, d)[:, :, None] for s in SHAPES for d in SIZES}  # (d,d,1)


def sign_box(thing):
    """Width and height in pixels of a sign."""
    return PITCH * len(thing["text"]) + MARGIN, PLATE_H


def box(thing):
    """(x0, y0, x1, y1) in pixels."""
    w, h = sign_box(thing) if "text" in thing else (thing["size"], thing["size"])
    return thing["x"], thing["y"], thing["x"] + w, thing["y"] + h


def render(scene):
    """Scene -> uint8 (64,64,3) RGB."""
    img = np.empty((SIDE, SIDE, 3), np.float32)
    img[:] = GROUND
    for thing in scene:
        x0, y0, x1, y1 = box(thing)
        if "text" in thing:
            img[y0:y1, x0:x1] = PALETTE["white"]
            for i, c in enumerate(thing["text"]):
                gx, gy = x0 + MARGIN + PITCH * i, y0 + MARGIN
                ink = np.kron(GLYPHS[c], np.ones((2, 2)))[:, :, None] > 0
                patch = img[gy : gy + 14, gx : gx + 10]
                patch[:] = np.where(ink, PALETTE["black"], patch)
        else:
            a, patch = MASKS[thing["shape"], thing["size"]], img[y0:y1, x0:x1]
            patch += a * (np.array(PALETTE[thing["color"]], np.float32) - patch)
    return (img + 0.5).astype(np.uint8)


def relation(a, b):
    """The relations (0, 1 or 2) in which box a stands to box b: GenEval's rule.

    d' = sign(d) max(|d| - 0.1 (size_a + size_b), 0) per axis; a relation holds where the component
    of d' / |d| passes 0.5, so a diagonal satisfies two."""
    d = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    s = [(a[i + 2] - a[i] + b[i + 2] - b[i]) for i in (0, 1)]
    e = [math.copysign(max(abs(di) - 0.1 * si, 0), di) for di, si in zip(d, s)]
    if max(abs(e[0]), abs(e[1])) < 1e-3:
        return set()
    norm = math.hypot(*d)
    (x, y), out = (e[0] / norm, e[1] / norm), set()
    out |= {"left of"} if x < -0.5 else {"right of"} if x > 0.5 else set()
    out |= {"above"} if y < -0.5 else {"below"} if y > 0.5 else set()
    return out


def place(things, rng, keep=(), ok=lambda scene: True, tries=200):
    """Give every thing a place: no overlap, GAP pixels apart, and `ok(scene)`; None if crowded."""
    for _ in range(tries):
        scene = list(keep)
        for thing in things:
            w, h = sign_box(thing) if "text" in thing else (thing["size"],) * 2
            for _ in range(20):
                t = dict(thing, x=LATTICE * rng.randint(0, (SIDE - w) // LATTICE),
                         y=LATTICE * rng.randint(0, (SIDE - h) // LATTICE))
                a = box(t)
                if all(a[0] >= b[2] + GAP or b[0] >= a[2] + GAP or a[1] >= b[3] + GAP
                       or b[1] >= a[3] + GAP for b in map(box, scene)):  # fmt: skip
                    scene.append(t)
                    break
            else:
                break
        if len(scene) == len(keep) + len(things) and ok(scene):
            return scene
    return None


def seen_color(shape, rng, unseen=False):
    """A random colour for a shape; only held-out evaluation may pass unseen=True."""
    return rng.choice([c for c in COLORS if ((c, shape) in UNSEEN_PAIRS) == unseen])


# ---------------------------------------------------------------------------------------------
# Prompts in GenEval's schema, and the scenes that satisfy them.


def plural(n, shape):
    return f"{NUMBERS[n]} {shape if n == 1 else shape + ('es' if shape.endswith('s') else 's')}"


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def make_meta(tag, include, prompt, **more):
    return dict(tag=tag, include=include, **more, prompt=f"a photo of {prompt}")


def sample_meta(tag, rng, unseen=False):
    """One prompt with its GenEval metadata; rng is a random.Random.

    tag: one of TAGS, or `text`, `reason`, or `scene` (every object of a scene, in full)."""
    a, b = rng.sample(SHAPES, 2)
    if tag == "single_object":
        return make_meta(tag, [{"class": a, "count": 1}], article(a))
    if tag == "two_object":
        return make_meta(tag, [{"class": a, "count": 1}, {"class": b, "count": 1}],
                         f"{article(a)} and {article(b)}")  # fmt: skip
    if tag == "counting":
        n = rng.randint(2, 4)
        if unseen:
            a, n = UNSEEN_COUNT
        elif (a, n) == UNSEEN_COUNT:
            n = rng.randint(2, 3)
        return make_meta(tag, [{"class": a, "count": n}], plural(n, a),
                         exclude=[{"class": a, "count": n + 1}])  # fmt: skip
    if tag == "colors":
        c = seen_color(a, rng, unseen)
        return make_meta(tag, [{"class": a, "count": 1, "color": c}], article(f"{c} {a}"))
    if tag == "position":  # as GenEval: include[0] is the reference B, include[1] is A
        rel = rng.choice(RELATIONS)
        return make_meta(tag, [{"class": b, "count": 1},
                               {"class": a, "count": 1, "position": [rel, 0]}],
                         f"{article(a)} {rel} {article(b)}")  # fmt: skip
    if tag == "color_attr":
        while True:
            c, d = seen_color(a, rng, unseen), seen_color(b, rng, unseen)
            if c != d:
                return make_meta(tag, [{"class": a, "count": 1, "color": c},
                                       {"class": b, "count": 1, "color": d}],
                                 f"{article(f'{c} {a}')} and {article(f'{d} {b}')}")  # fmt: skip
    if tag == "text":
        text = "".join(rng.choices(list(GLYPHS), k=rng.randint(1, 4)))
        return make_meta(tag, [], f'a sign "{text}"', text=text)
    if tag == "reason":
        if rng.random() < 0.5:
            s, n = rng.choice(list(SIDES.items()))
            if (a, n) == UNSEEN_COUNT:
                a = b
            return make_meta(tag, [{"class": a, "count": n}],
                             f"as many {plural(2, a).split()[1]} as {article(s)} has sides",
                             exclude=[{"class": a, "count": n + 1}],
                             reasoning=f"{article(s)} has {NUMBERS[n]} sides",
                             answer=f"a photo of {plural(n, a)}")  # fmt: skip
        c = rng.choice([c for c in MIXES if (c, a) not in UNSEEN_PAIRS] or ["orange"])
        if (c, a) in UNSEEN_PAIRS:
            return sample_meta(tag, rng, unseen)
        x, y = MIXES[c]
        return make_meta(tag, [{"class": a, "count": 1, "color": c}],
                         f"{article(a)} in the color of {x} mixed with {y}",
                         reasoning=f"{x} mixed with {y} is {c}",
                         answer=f"a photo of {article(f'{c} {a}')}")  # fmt: skip
    if tag == "scene":
        things = [(seen_color(s, rng), s) for s in rng.sample(SHAPES, rng.randint(1, 4))]
        return make_meta(tag, [{"class": s, "count": 1, "color": c} for c, s in things],
                         ", ".join(article(f"{c} {s}") for c, s in things))  # fmt: skip
    raise ValueError(f"unknown tag {tag!r}; known: {', '.join(TAGS)}, text, reason, scene")


def scene_for(meta, rng):
    """A scene that satisfies meta; what the prompt leaves open is drawn at random."""
    while True:
        if "text" in meta:
            return place([{"text": meta["text"]}], rng)
        things, wants = [], None
        for group in meta["include"]:
            if "position" in group:
                wants = group["position"][0]
            for _ in range(group["count"]):
                s = group["class"]
                things.append(dict(shape=s, color=group.get("color") or seen_color(s, rng),
                                   size=rng.choice(SIZES)))  # fmt: skip
        ok = (lambda sc: relation(box(sc[1]), box(sc[0])) == {wants}) if wants else lambda sc: True
        scene = place(things, rng, ok=ok)
        if scene:
            return scene


def mistaken(meta, rng):
    """A copy of meta with one fact wrong, as a careless captioner's photo would have it."""
    meta = json.loads(json.dumps(meta))
    if "text" in meta:
        t, i = meta["text"], rng.randrange(len(meta["text"]))
        meta["text"] = t[:i] + rng.choice([c for c in GLYPHS if c != t[i]]) + t[i + 1 :]
        return meta
    inc = meta["include"]
    g = rng.choice(inc)
    faults = ["shape"]
    faults += ["color"] * 2 if "color" in g else []
    faults += ["count"] * 4 if "exclude" in meta else []
    faults += ["missing"] if len(inc) > 1 else []
    faults += ["relation"] * 4 if meta["tag"] == "position" else []
    faults += ["binding"] * 4 if meta["tag"] == "color_attr" else []
    fault = rng.choice(faults)
    if fault == "relation":
        inc[1]["position"][0] = rng.choice([r for r in RELATIONS if r != inc[1]["position"][0]])
    elif fault == "binding":
        inc[0]["color"], inc[1]["color"] = inc[1]["color"], inc[0]["color"]
    elif fault == "missing":
        inc.remove(g)
        inc[0].pop("position", None)
    elif fault == "count":
        g["count"] = rng.choice([n for n in (1, 2, 3, 4) if abs(n - g["count"]) == 1])
    elif fault == "color":
        g["color"] = rng.choice([c for c in COLORS if c != g["color"]])
    else:
        g["class"] = rng.choice([s for s in SHAPES if s not in [i["class"] for i in inc]])
    for g in inc:  # a mistake must not leak what is held out
        if (g.get("color"), g["class"]) in UNSEEN_PAIRS:
            g["color"] = seen_color(g["class"], rng)
        if (g["class"], g["count"]) == UNSEEN_COUNT:
            g["count"] -= 1
    return meta


def phrase(meta):
    """The words of a prompt, rebuilt from its metadata (after a mistake they differ)."""
    if "text" in meta:
        return f'a sign "{meta["text"]}"'
    words = [plural(g["count"], g["class"]) if "exclude" in meta
             else article(" ".join(w for w in (g.get("color"), g["class"]) if w))
             for g in meta["include"]]  # fmt: skip
    if "position" in meta["include"][-1]:
        return f"{words[1]} {meta['include'][1]['position'][0]} {words[0]}"
    return (", " if meta["tag"] == "scene" else " and ").join(words)


def holds(meta, scene):
    """Does the scene show what the metadata asks?  GenEval's rule, on the truth."""
    if "text" in meta:
        return any(t.get("text") == meta["text"] for t in scene)
    groups = []
    for g in meta["include"]:
        groups.append([t for t in scene if t.get("shape") == g["class"]
                       and g.get("color") in (None, t["color"])])  # fmt: skip
        rel, ref = g.get("position", (None, 0))
        if len(groups[-1]) < g["count"] or rel and not all(
                rel in relation(box(a), box(b)) for a in groups[-1] for b in groups[ref]):
            return False
    many = meta.get("exclude", [])
    return all(sum(t.get("shape") == g["class"] for t in scene) < g["count"] for g in many)


# Share of each kind of caption among the training images.
MIXTURE = dict(single_object=1, two_object=2, counting=3, colors=2, position=4, color_attr=4,
               scene=2, text=1.5, reason=0.5)  # fmt: skip


def training_pair(rng, error=CAPTION_ERROR):
    """(meta, scene): a caption and what its image really shows."""
    meta = sample_meta(rng.choices(list(MIXTURE), MIXTURE.values())[0], rng)
    return meta, scene_for(mistaken(meta, rng) if rng.random() < error else meta, rng)


# ---------------------------------------------------------------------------------------------
# Edits: a source scene, a target scene that differs in exactly one thing, and how to say it.

KINDS = ["add", "remove", "recolor", "move", "replace"]


def named(thing):
    return f"{thing['color']} {thing['shape']}"


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
# What the VLM is asked and answers: captions, thoughts, critiques, questions.

IMAGE = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"  # 64 px: 4x4 merged patches
DRAW = "Generate an image: {}"
THINK = "Think, then generate an image: {}"
SHOWS = IMAGE + "Does the image show {}?"
MATCH = IMAGE + "Does the image match the prompt: {}?"
WHICH = IMAGE + IMAGE + "Which image shows {}?"
THINK_ERROR = 0.5  # of riddles, the share whose answer is wrong


def caption(scene):
    """All that a scene shows, from left to right: one right answer, so it is learned sooner."""
    if "text" in scene[0]:
        return f'a sign "{scene[0]["text"]}"'
    names = [article(named(t)) for t in sorted(scene, key=lambda t: 2 * t["x"] + t["size"])]
    shapes = {t["shape"] for t in scene}
    if len(scene) > 1 and len(shapes) == 1:
        return plural(len(scene), *shapes)
    return (" and " if len(scene) == 2 else ", ").join(names)


def picture(meta, rng, right):
    """A scene that shows meta or, half of them narrowly, does not."""
    while True:
        other = meta
        if not right:
            other = mistaken(meta, rng) if rng.random() < 0.5 else sample_meta(meta["tag"], rng)
        scene = scene_for(other, rng)
        if holds(meta, scene) == right:
            return scene


def think(meta, rng):
    """Reasoning and refined prompt, and the metadata that these words describe.  Riddles come out
    wrong at the rate of THINK_ERROR: RL has work to do."""
    if meta["tag"] != "reason":
        return f"<think>draw {phrase(meta)}</think><answer>{meta['prompt']}</answer>", meta
    told = meta
    if rng.random() < THINK_ERROR:
        told = dict(mistaken(meta, rng), reasoning=sample_meta("reason", rng)["reasoning"])
    return f"<think>{told['reasoning']}</think><answer>a photo of {phrase(told)}</answer>", told


def critique(scene, right):
    """What is said of a picture that was to match a prompt."""
    return "yes" if right else f"no, the image shows {caption(scene)}"


def split_picture(meta, rng, right, test=False):
    """picture on one side of the split of scenes; None: the few that show so little may all be on
    the other."""
    scenes = (picture(meta, rng, right) for _ in range(500))
    return next((scene for scene in scenes if held(scene) == test), None)


PICTURE_KINDS = ["exists", "color", "count", "relation", "caption"]


def picture_question(kind, rng, test=False):
    """A question about a picture that has one short answer, in words that the VLM was taught, but
    for "one" as a count; yes and no come equally often. -> tag, question, answer, scene"""
    yes = rng.random() < 0.5
    answer = "yes" if yes else "no"
    while True:
        tag = dict(relation="position", count=rng.choice(["single_object"] + ["counting"] * 3))
        scene = scene_for(sample_meta(tag.get(kind, "scene"), rng), rng)
        places = {2 * t["x"] + t["size"] for t in scene}  # one above the other: no left to right
        if held(scene) == test and (kind != "caption" or len(places) == len(scene)):
            break
    t, shapes = rng.choice(scene), {t["shape"] for t in scene}
    absent = rng.choice([s for s in SHAPES if s not in shapes])
    if kind == "exists":
        ask = f"Is there {article(t['shape'] if yes else absent)}?"
    elif kind == "color":
        color = t["color"] if yes else rng.choice([c for c in COLORS if c != t["color"]])
        ask = f"Is there {article(named(dict(t, color=color)))}?"
    elif kind == "count":
        shape = t["shape"] if rng.random() < 0.8 else absent
        ask = f"How many {plural(2, shape).split()[1]} are there?"
        answer = NUMBERS[sum(t["shape"] == shape for t in scene)]
    elif kind == "relation":
        b, a = scene
        true = relation(box(a), box(b))
        rel = rng.choice([r for r in RELATIONS if (r in true) == yes])
        what = f"{article(a['shape'])} {rel} {article(b['shape'])}"
        ask = SHOWS.removeprefix(IMAGE).format(what)
    else:
        ask, answer = "Describe the image.", f"a photo of {caption(scene)}"
    return dict(tag=kind, question=ask, answer=answer, scene=scene)


def text_question(rng):
    """A riddle, also of kinds that the VLM was never taught: sums, colors in the other order.
    -> tag, question, answer: the refined prompt"""
    tag, shape = rng.choice(["sides", "sum", "mixed", "and"]), rng.choice(SHAPES)
    if tag in ("sides", "sum"):
        of, n = rng.choice([(f"{article(s)} has sides", n) for s, n in SIDES.items()])
        if tag == "sum":
            a, b = rng.choice([(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1)])
            of, n = f"{NUMBERS[a]} and {NUMBERS[b]}", a + b
        ask, answer = f"as many {plural(2, shape).split()[1]} as {of}", plural(n, shape)
        fine = (shape, n) != UNSEEN_COUNT
    else:
        c = rng.choice(list(MIXES))
        x, y = rng.sample(MIXES[c], 2)
        by = "mixed with" if tag == "mixed" else "and"
        ask, answer = f"{article(shape)} in the color of {x} {by} {y}", article(f"{c} {shape}")
        fine = (c, shape) not in UNSEEN_PAIRS
    if not fine:
        return text_question(rng)
    return dict(tag=tag, question=THINK.format(f"a photo of {ask}"), answer=f"a photo of {answer}")
