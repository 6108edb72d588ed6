"""Edits and their scores, from which a judge of edits learns (labs/edit_reward.py)."""

import random
from pathlib import Path

import numpy as np
from scipy import stats

from common.layouts import all_records, lookup, pictures_in
from common.read import UNREADABLE, as_text, read_image, regular, to_bucket
from common.run import fail
from data.shapes.edits import scored_edit

SCORE_NOISE = 0.1  # standard deviation: who scores edits by the thousand wavers
HELD_OUT = 400     # edits, at most


def scored_edits(data, preset):
    """data: see read_scored; empty: the classroom's -> scored edits to learn from, None = the
    classroom's, made anew; and held-out ones"""
    if not data:
        if not preset.startswith("shapes"):
            fail(f"preset {preset!r} sees photos: give --data of its own")
        rng = random.Random("held out")
        return None, [scored_edit(rng) for _ in range(HELD_OUT)]
    try:
        rows = read_scored(data)
    except (OSError, ValueError) as e:
        fail(e)
    if len(rows) < 20:
        fail(f"{data} holds {len(rows)} scored edits: too few, a tenth is held out")
    random.Random(0).shuffle(rows)
    n = min(len(rows) // 10, HELD_OUT)                   # they are kept in memory
    return rows[n:], rows[:n]


def opened(examples, cfg, broken):
    """Examples whose images are arrays or files -> those that can be read, with arrays, of the size
    that the preset draws; the others are named and counted."""
    found = []
    for old, new, *about in examples:
        try:
            if not isinstance(new, np.ndarray):
                old, new = (x.permute(1, 2, 0).numpy() for x in to_bucket(
                    [read_image(old), read_image(new)], cfg))
        except UNREADABLE as e:
            broken(f"the edit {new}", e)
            continue
        broken.good += 1
        found.append((old, new, *about))
    return found


def draw_scored(rows, n, rng, cfg, broken):
    """n examples (source, edited, instruction, score)"""
    if not rows:
        return [(*e, score + rng.gauss(0, SCORE_NOISE))
                for *e, score in (scored_edit(rng) for _ in range(n))]
    found = []
    while len(found) < n:
        found += opened(rng.choices(rows, k=n - len(found)), cfg, broken)
    return found


def read_scored(path):
    """jsonl of source, edited (images beside it), instruction, score -> list of examples, as
    scored_edit's but with what read_image takes for images; a bad line raises ValueError with its
    number."""
    rows = []
    for where, row, folder in all_records(path):
        try:
            files = [*pictures_in(lookup(row, "source"), folder),
                     *pictures_in(lookup(row, "edited"), folder)]
            for file in files:
                if isinstance(file, Path):
                    regular(file)
            score = row.get("score")
            if len(files) != 2 or type(score) not in (int, float) or not abs(score) < 1e9:
                raise ValueError("`score` is a number, `source` and `edited` are a picture each")
            rows.append((*files, as_text(lookup(row, "instruction"), "instruction"), score))
        except (*UNREADABLE, LookupError) as e:
            raise ValueError(f"{where}: not a JSON object with `source` and `edited`, files in its "
                             f"folder, `instruction` and a number `score` ({e})") from None
    return rows


def spearman(a, b):
    """Rank correlation in [-1,1]; equal values share their mean rank, 0 where all are equal."""
    if not (np.ptp(a) and np.ptp(b)):
        return 0.0
    return float(stats.spearmanr(a, b).statistic)
