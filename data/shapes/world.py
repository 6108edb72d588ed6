"""The classroom world: a universe small enough to know completely.

A scene is a JSON list of coloured shapes, or of one sign to read, and everything else is derived
from it, so the truth is known. What is said of scenes: captions.py; their edits: edits.py; what the
VLM is asked about them: talk.py; how a picture is judged: judge.py.
"""

import math

import numpy as np

# The world is made once and then frozen, so that figures compare. Results of its benchmarks name
# this version, and the config of a checkpoint the one that stages 1 and 2 learned from.
# 1: until 2026-11-29. 2: captions.MIXTURE has more relations, counts, and colours of two things
VERSION = 2
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


def named(thing):
    return f"{thing['color']} {thing['shape']}"
