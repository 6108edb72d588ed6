"""GenEval as a reward: of the classroom's pictures by its detector, of photos by models. One rule
for both: evaluate, in data/shapes/judge.py.
"""

import math

import torch

from common.read import arrays
from data.shapes.judge import check as check_shapes
from data.shapes.world import SHAPES
from rewards.photos import check_photos
from rewards.shared import classroom


def is_photo(meta):
    """Which world a prompt speaks of: a class that is no shape of the classroom is COCO's."""
    return any(want["class"] not in SHAPES for want in meta["include"])


def check(image, meta):
    """One image (H,W,3) -> dict(correct, strict, partial, extra)."""
    return check_photos(image[None], [meta])[0] if is_photo(meta) else check_shapes(image, meta)


def checked(images, rows, what):
    """check()'s verdict `what` where the meta has `include`, else NaN; photos eight at a time."""
    x = arrays(images)
    photos = [i for i, m in enumerate(rows) if m.get("include") and is_photo(m)]
    found, signs = {}, classroom(images)                 # a sign of a photo is --reward ocr's
    for b in (photos[a : a + 8] for a in range(0, len(photos), 8)):
        found |= zip(b, check_photos(x[b], [rows[i] for i in b]))
    found |= {i: check(x[i], m) for i, m in enumerate(rows)
              if i not in found and (m.get("include") or m.get("include") == [] and signs)}
    return torch.tensor([float(found[i][what]) if i in found else math.nan for i in range(len(x))])


def geneval(images, rows):
    """Partial GenEval score in [0,1]; of a sign, how well it reads."""
    return checked(images, rows, "partial")


def geneval_strict(images, rows):
    """1 where every count, colour and position is exact (of a sign, every character), else 0."""
    return checked(images, rows, "strict")
