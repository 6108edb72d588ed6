"""GenEval (arXiv 2310.11513) of photos: 553 prompts, six tags. rewards/photos.py confesses how its
detector departs; with --detections the boxes are another's, such as mmdet's. What was found stands
in results.jsonl, which --detections takes as well.
"""

import json

from benchmarks import About
from benchmarks.drawing import Shot
from common.run import fail
from data.shapes.bench import geneval_table
from rewards.geneval import check, is_photo
from rewards.photos import COCO_THRESHOLDS, detect_coco, judge_photo, look
from rewards.prompts import geneval_prompts, read_prompts

ABOUT = About("{id}/samples/{k:04d}.png", "things, counts, colours, places, by a detector", 2212,
              n=4)


def items(release):
    """The official prompts; release: or a file of one's own in their schema"""
    rows = read_prompts(release) if release else [*map(json.loads, geneval_prompts())]
    for row in rows:
        if not (row.get("tag") and row.get("include")):
            raise ValueError(f"{row['prompt']!r} has no tag or include")
    return [dict(row, id=f"{i:05d}", line=json.dumps(row) + "\n") for i, row in enumerate(rows)]


def files(item):
    return {f"{item['id']}/metadata.jsonl": lambda: item["line"].encode()}


def shots_in(folder):
    """Anybody's pictures, as many of each prompt as there are, by their own metadata.jsonl."""
    shots = []
    for about in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        files = sorted(about.parent.glob("samples/[0-9]*.png"))
        try:
            (row,) = read_prompts(about)
        except (OSError, ValueError) as e:
            fail(f"{about}: {e}")
        if not (row.get("tag") and row.get("include") and files):
            fail(f"{about.parent}: no tag or include in metadata.jsonl, or no samples/0000.png")
        shots += [Shot(dict(row, id=about.parent.name), k, len(shots) + k,
                       str(f.relative_to(folder))) for k, f in enumerate(files)]
    return shots or fail(f"{folder} holds no images in GenEval's layout: 00000/samples/0000.png")


def measure(shots, images):
    return [seen(shot, image) for shot, image in zip(shots, images)]


def seen(shot, image):
    """-> GenEval's verdict of a picture, and what it was found on"""
    if not is_photo(shot.item):
        return check(image, shot.item)
    found = detect_coco(image[None])[0] if shot.found is None else shot.found
    things = look(image, shot.item, found)
    return judge_photo(things, shot.item, shot.item.get("thresholds") or COCO_THRESHOLDS) | dict(
        detections=[{k: v for k, v in t.items() if k != "mask"} for t in things])


def table(rows):
    """GenEval's rule: the mean of the tags' means; standard errors of prompts."""
    return geneval_table(rows, [[row] for row in rows])[0]
