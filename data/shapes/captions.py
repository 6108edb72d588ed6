"""Prompts of the classroom with metadata in GenEval's schema, the scenes that satisfy them, and
captions as the web has them: they err at a stated rate.
"""

import json

from data.shapes.world import (COLORS, GLYPHS, MIXES, NUMBERS, RELATIONS, SHAPES, SIDES, SIZES,
                               TAGS, UNSEEN_COUNT, UNSEEN_PAIRS, box, place, relation,
                               seen_color)

# Captions contradict their image this often (a wrong shape, colour, count, relation, or a missing
# object).  A model trained to its plateau then draws correctly about as often as its data was
# right; what is missing can be learned from reward, not from more of the same data.
CAPTION_ERROR = 0.2


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
    """A copy of meta with one fact wrong, as a careless captioner's photo would have it (in one of
    a hundred what is held out is put right again below)."""
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
MIXTURE = dict(single_object=1, two_object=3, counting=4, colors=3, position=10, color_attr=6,
               scene=2, text=1.5, reason=0.5)  # fmt: skip


def training_pair(rng, error=CAPTION_ERROR):
    """(meta, scene): a caption and what its image really shows."""
    meta = sample_meta(rng.choices(list(MIXTURE), MIXTURE.values())[0], rng)
    return meta, scene_for(mistaken(meta, rng) if rng.random() < error else meta, rng)
