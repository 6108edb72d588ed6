"""The classroom's detector and sign reader, GenEval's rule, and the check that joins them: is in a
picture what its prompt asks for?
"""

from collections import Counter

import numpy as np
from scipy import ndimage

from data.shapes.world import (COLORS, GLYPHS, GROUND, MARGIN, MASKS, PALETTE, PITCH, PLATE_H,
                               SHAPES, SIZES, relation)


# ---------------------------------------------------------------------------------------------
# The detector: nearest palette colour, connected components, template match.

CANON = 24  # a component is stretched to 24x24 before it is compared: the match ignores size


def stretch(mask):
    """Bool (h,w) -> bool (CANON*CANON,), the mask's bounding box stretched to the full square."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    i = rows[0] + (np.arange(CANON) + 0.5) * (rows[-1] + 1 - rows[0]) / CANON
    j = cols[0] + (np.arange(CANON) + 0.5) * (cols[-1] + 1 - cols[0]) / CANON
    return mask[i.astype(int)[:, None], j.astype(int)].reshape(-1)


TEMPLATES = np.stack([stretch(MASKS[s, SIZES[-1]][:, :, 0] > 0.5) for s in SHAPES])  # (8, 576)
_levels = np.stack(np.meshgrid(*[np.arange(4, 256, 8)] * 3, indexing="ij"), -1)  # (32,32,32,3)
_anchors = np.array([GROUND, *PALETTE.values()])  # (11,3): ground is 0, colours from 1
NEAREST = ((_levels[..., None, :] - _anchors) ** 2).sum(-1).argmin(-1).astype(np.uint8)


def detect_shapes(image):
    """uint8 (64,64,3) -> [{class, color, box (x0,y0,x1,y1), score in [0,1]}], best score first.

    score is the IoU of the component's mask with the template, both stretched to a square."""
    q = image >> 3
    label = NEAREST[q[..., 0], q[..., 1], q[..., 2]]  # (64,64): 0 ground, 1.. colours
    parts, _ = ndimage.label(label > 0)
    found = []
    for k, window in enumerate(ndimage.find_objects(parts), 1):
        part, lab = parts[window] == k, label[window]
        if part.sum() < 40:
            continue
        # Antialiased rims mix with the ground and land on other colours (red on grey reads brown):
        # only pixels whose four neighbours are foreground vote.
        p = np.pad(part, 1)
        core = part & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
        votes = np.bincount(lab[core] if core.any() else lab[part], minlength=len(_anchors))
        colors = np.flatnonzero(votes > 0.25 * votes.sum())
        for c in colors:  # more than one: things that touch, told apart by colour
            mask = part if len(colors) == 1 else part & (lab == c)
            mine = stretch(mask)
            inter = TEMPLATES[:, mine].sum(1)
            iou = inter / (TEMPLATES.sum(1) + mine.sum() - inter)
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if max(ys[-1] - ys[0], xs[-1] - xs[0]) >= 2 * SIZES[-1]:
                continue  # a changed ground, not a thing: else a white page is a white square
            y, x = window[0].start, window[1].start
            found.append(dict(color=COLORS[c - 1], score=float(iou.max()),
                              box=(x + xs[0], y + ys[0], x + xs[-1] + 1, y + ys[-1] + 1),
                              **{"class": SHAPES[iou.argmax()]}))
    return sorted(found, key=lambda f: -f["score"])


# ---------------------------------------------------------------------------------------------
# OCR: find the plate, correlate each cell with every glyph.

GLYPH_NAMES = list(GLYPHS)
LEGIBLE = 0.65  # correlation: glyphs blurred by a pixel reach 0.77 or more, other things 0.59


def unit(x):
    """Last axis to mean 0 and length 1, so that a dot product is a correlation."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


# The paper around a glyph is part of its template: without it, any white corner reads as L.
INK = [np.pad(np.kron(g, np.ones((2, 2))), MARGIN) for g in GLYPHS.values()]  # 16 x (18,14)
ALPHABET = unit(1 - np.stack(INK).reshape(len(INK), -1))  # (16,252), bright paper, dark ink
SHIFTS = np.stack(np.mgrid[-2:3, -2:3], -1).reshape(-1, 2)  # (25,2) dy, dx tried per cell


def read_sign(image):
    """uint8 (64,64,3) -> the characters on its plate, "" if there is none."""
    white = image.min(-1).astype(np.float32)  # the darkest channel: only white is bright here
    # The plate stands out from the ground as paper or as ink; smoothing keeps blur, which mixes
    # them to grey, from cutting it in pieces, and grows it alike on every side.
    parts, n = ndimage.label(ndimage.uniform_filter(np.abs(white - GROUND[0]), 5) > 40)
    if n == 0:
        return ""
    light = np.bincount(parts.ravel(), np.maximum(white - GROUND[0], 0).ravel())
    plate = parts == 1 + light[1:].argmax()
    rows, cols = plate.sum(1), plate.sum(0)
    rows = np.flatnonzero(rows > rows.max() / 2)  # half: specks at the rim do not move the box
    cols = np.flatnonzero(cols > cols.max() / 2)
    width = cols[-1] + 1 - cols[0] - MARGIN
    n = max(1, round(width / PITCH))
    pitch = np.clip(width / n, PITCH - 1, PITCH + 1)  # a drawn plate may be a little stretched
    y = (rows[0] + rows[-1] + 1 - PLATE_H) // 2
    x = np.round((cols[0] + cols[-1] + 1 - MARGIN) / 2 + pitch * (np.arange(n) - n / 2)).astype(int)

    border = 16  # so that a cell may reach over the image's edge
    page = np.pad(white, border, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(page, (PLATE_H, PITCH + MARGIN))
    at = np.clip(y + SHIFTS[:, 0] + border, 0, windows.shape[0] - 1)[:, None]  # (25,1)
    to = np.clip(x + SHIFTS[:, 1:] + border, 0, windows.shape[1] - 1)  # (25,n)
    cells = windows[at, to].reshape(len(SHIFTS), n, -1)  # (25,n,252)
    match = (unit(cells) @ ALPHABET.T).max(0)  # (n,16), each cell at its best shift
    return "".join(GLYPH_NAMES[m.argmax()] for m in match if m.max() > LEGIBLE)


def edit_distance(a, b):
    """Levenshtein: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def text_match(read, target):
    """Flow-GRPO's OCR reward in [0,1]: 1 - min(distance, len) / len, without case and spaces.

    A target inside a longer reading counts as read: PaddleOCR also reports what stands around."""
    read, target = ("".join(s.lower().split()) for s in (read, target))
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


# ---------------------------------------------------------------------------------------------
# GenEval's rule (Ghosh et al. 2023, evaluate_images.py): any detector, one metadata row.

SHAPES_THRESHOLDS = (0.5, 0.7)  # least score, and for `counting` (GenEval's Mask2Former: 0.3, 0.9)


def clauses(objects, meta, exact):
    """One score in [0,1] per thing the prompt asks for; objects come best first.

    exact=False: extra objects are ignored (GenEval); True: they are errors (Flow-GRPO)."""
    terms, groups = [], []
    for want in meta["include"]:
        n = want["count"]
        found = [o for o in objects if o["class"] == want["class"]]
        found = found if exact else found[:n]
        # Departs from Flow-GRPO, whose count term is unbounded: 5 found for 1 asked is 0, not -3.
        terms.append(max(0, 1 - abs(n - len(found)) / n))
        matched = len(found) == n
        if not matched and ("color" in want or "position" in want):
            terms.append(0)
        if matched and "color" in want:
            right = sum(o["color"] == want["color"] for o in found)
            terms.append(right / n)
            matched = right == n
        if matched and "position" in want:
            name, target = want["position"]
            matched = groups[target] is not None and all(
                name in relation(a["box"], b["box"]) for a in found for b in groups[target])
            # Departs from Flow-GRPO, which appends 0 and then also 1 for a wrong position.
            terms.append(float(matched))
        groups.append(found if matched else None)
    return terms


def evaluate(detections, meta, thresholds=SHAPES_THRESHOLDS):
    """Detections [{class, color, box, score}] against one GenEval row -> correct, strict, partial.

    correct  the official rule: per clause the `count` best objects decide, more are ignored unless
             `exclude` names them
    strict   every count exact too; classes that the prompt does not name are still ignored
    partial  Flow-GRPO's training reward in [0,1]: the mean of the exact clauses' scores"""
    least = thresholds[meta.get("tag") == "counting"]
    # Departs from GenEval where scores tie, and where one is float32(.3): here the first of equals
    # comes first, and that score, .30000001, counts.
    objects = sorted((d for d in detections if d["score"] > least), key=lambda d: -d["score"])
    allowed = all(sum(o["class"] == no["class"] for o in objects) < no["count"]
                  for no in meta.get("exclude", []))
    official, exact = (clauses(objects, meta, e) for e in (False, True))
    return dict(correct=allowed and set(official) <= {1}, strict=allowed and set(exact) <= {1},
                partial=sum(exact) / max(1, len(exact)))


def extra_objects(detections, meta, least=SHAPES_THRESHOLDS[0]):
    """How many detected objects the prompt did not ask for, by class; a reward that ignores them
    invites a collage.  The lower threshold also for `counting`: half-hidden things are extra."""
    seen = [d for d in detections if d["score"] > least]
    if "text" in meta and not meta["include"]:  # a sign is itself seen as white and black things
        return sum(d["color"] not in ("white", "black") for d in seen)
    asked = Counter()
    for want in meta["include"]:
        asked[want["class"]] += want["count"]
    return (Counter(d["class"] for d in seen) - asked).total()  # `-` keeps what is above 0


def check(image, meta):
    """One image (64,64,3) -> dict(correct, strict, partial, extra)."""
    detections = detect_shapes(image)
    extra = extra_objects(detections, meta)
    if "text" not in meta:
        return dict(evaluate(detections, meta), extra=extra)
    read = read_sign(image)
    same = read == meta["text"]
    return dict(correct=same, strict=same, partial=text_match(read, meta["text"]), extra=extra)
