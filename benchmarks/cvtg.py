"""CVTG-2K (TextCrafter, arXiv 2503.23461): several texts in one picture.

Departs from the official scorer in its reader, PP-OCRv5 in place of PaddleOCR's. What is to be read
is what single quotes enclose, as there: an apostrophe within breaks it.
"""

import re
from collections import Counter

import torch

from benchmarks import About
from benchmarks.release import json_of
from benchmarks.tables import metrics
from data.shapes.judge import edit_distance
from rewards.clip import clip
from rewards.ocr import read_lines

ABOUT = About("{id}.png", "several texts in one picture", 2000,
              "huggingface.co/datasets/dnkdnk/CVTG-2K")


def items(release):
    return [dict(id=f"{kind}/{area}/{row['index']}", prompt=row["prompt"], tag=kind)
            for area in (2, 3, 4, 5) for kind in ("CVTG", "CVTG-Style")
            for row in json_of(release, f"{kind}/{area}.json")["data_list"]]


def words(item):
    return " ".join(re.findall("'(.*?)'", item["prompt"])).lower().split()


def near(a, b):
    """Likeness of two words in [0,1]: 1 - edit distance / length of the longer"""
    return 1 - edit_distance(a, b) / max(len(a), len(b))


def measure(shots, images):
    out = []
    for item, image, lines in zip([s.item for s in shots], images, [
            read_lines(x[None])[0] for x in images]):
        seen, wanted = [w for line in lines for w in line.lower().split()], words(item)
        left = Counter(seen)
        right = [left[w] > 0 and not left.subtract([w]) for w in wanted]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        cosine = clip(pixels, [dict(prompt=f"A photo depicts {item['prompt']}")]).item()
        out.append(dict(score=sum(right) / max(1, len(wanted)), clip=2.5 * max(cosine, 0), words=[
            (float(r), max((near(w, s) for s in seen), default=0.0))
            for w, r in zip(wanted, right)]))
    return out


def table(rows):
    """Of words in [0,1]: `score`, the share that is read, and `ned`; of pictures: `clip`."""
    marks = [dict(prompt=r["prompt"], score=a, ned=b) for r in rows for a, b in r["words"]]
    return metrics(marks, score="score", ned="ned") | metrics(rows, clip="clip")
