"""The classroom's benchmark of drawing: GenEval's tags, at classroom scale, on held-out prompts."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.layouts import all_records
from common.read import arrays, jpeg_kb
from common.show import by_tag, grid, mean_and_error, spread
from data.shapes.judge import check
from data.shapes.world import LATTICE, SIDE, VERSION, render

PROMPTS = Path(__file__).parent / "prompts"


def geneval_table(rows, judged):
    """check()'s dicts, n for each of P rows -> metrics, x_se being the standard error of x, and
    which images are officially correct (P,n)."""
    right, partial, strict, extra = (
        np.array([[float(v[k]) for v in vs] for vs in judged])
        for k in ("correct", "partial", "strict", "extra"))                          # (P,n) each
    out = dict(images=right.size)

    def add(name, values, rows=rows):
        out[name], out[name + "_se"] = mean_and_error(values, rows)

    add("score", right)
    for tag, mine in by_tag(rows).items():
        add(tag, right[mine], [rows[i] for i in mine])
    add("partial", partial)
    add("strict", strict)
    add("extra_rate", np.float64(extra > 0))  # share of images with an object not asked for
    return out, right


def summary(rows, images):
    """As table, of images (P,n,64,64,3) drawn for P rows, with what pixels alone tell."""
    P, n = images.shape[:2]
    out, right = geneval_table(rows, [[check(x, r) for x in xs] for r, xs in zip(rows, images)])

    def add(name, values):
        out[name], out[name + "_se"] = mean_and_error(values, rows)

    if n > 1:  # RMS pixel distance, 0 ... 1, of all pairs of a row's images
        i, j = np.triu_indices(n, 1)
        flat = images.reshape(P, n, -1) / np.float32(255)
        add("diversity", np.stack([np.sqrt(((f[i] - f[j]) ** 2).mean(1)) for f in flat]))
    add("jpeg_kb", np.array([[jpeg_kb(x) for x in xs] for xs in images]))
    # What long runs against a reward are known to do to pictures
    add("brightness", images.mean((2, 3, 4)) / 255)
    add("seams", np.array([[seam(x) for x in xs] for xs in images]))
    return out, right


def seam(image):
    """By how much more colour changes, from a pixel to the next, across the borders of the DiT's
    patches than within them: a grid in the picture. uint8 (64,64,3) -> -1 ... 1"""
    x = image / np.float32(255)
    steps = [np.abs(np.diff(x, axis=axis)).mean((1 - axis, 2)) for axis in (0, 1)]   # (63,) each
    border = np.arange(1, SIDE) % LATTICE == 0
    return float(np.mean([s[border].mean() - s[~border].mean() for s in steps]))


def draw_images(draw, rows, chosen, n, name=""):
    """n images for each rows[i], i in chosen -> numpy (P,n,64,64,3); draw: see bench_shapes."""
    todo = [(rows[i]["prompt"], 1000 * i + j) for i in chosen for j in range(n)]
    images = []
    for a in tqdm(range(0, len(todo), 64), name, unit="batch", disable=None):
        images.append(draw(*map(list, zip(*todo[a : a + 64]))).cpu())
    return arrays(torch.cat(images)).reshape(-1, n, SIDE, SIDE, 3)


def scene_image(scene):
    """-> uint8 (3,64,64)"""
    return torch.from_numpy(render(scene)).permute(2, 0, 1)


def bench_shapes(draw, n_per_prompt=4, limit=None, png=None):
    """GenEval at classroom scale -> flat dict of metrics, with `unseen` for the held-out pairs.

    draw(prompts, seeds) -> uint8 (N,3,64,64).  An image's seed depends on its prompt's line and its
    number among n_per_prompt only, so a limited run draws some of the full run's very images.
    limit: at most so many images, equally many per tag, and no unseen split; n_per_prompt=1 then
    gives the smallest error.  png: a grid of four prompts per tag, right framed green."""
    results = dict(world=VERSION)
    for split in ["eval"] if limit else ["eval", "unseen"]:
        rows = [row for _, row, _ in all_records(PROMPTS / f"{split}.jsonl")]
        k = limit // n_per_prompt // len(by_tag(rows)) if limit else len(rows)
        assert k, f"limit={limit} images do not reach every tag with {n_per_prompt} per prompt"
        chosen = spread(rows, k)
        images = draw_images(draw, rows, chosen, n_per_prompt, split)
        rows = [rows[i] for i in chosen]
        out, right = summary(rows, images)
        results |= out if split == "eval" else {split: out}
        if png and split == "eval":
            show = spread(rows, 4)
            grid(images[show, 0], [rows[i]["prompt"] for i in show], png, right[show, 0] == 1)
    return results
