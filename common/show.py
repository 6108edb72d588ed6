"""What people look at: grids, tables, trade-offs; and the statistics in them."""

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.read import arrays
from common.run import replacing, write


def by_tag(rows):
    """-> {tag: indices of its rows}, in the order of the file."""
    tags = {}
    for i, row in enumerate(rows):
        tags.setdefault(row["tag"], []).append(i)
    return tags


def mean_and_error(values, rows):
    """values (P,n) of n images for each of P rows -> mean of tag means, its standard error.

    Images of one prompt correlate, and rows repeat prompts, so distinct prompts are the independent
    units: with e an image's difference from its tag's mean, a tag of N images of C prompts has
    SE_t^2 = C/(C-1) sum_prompts (sum_images e)^2 / N^2, and T tags SE = sqrt(sum_t SE_t^2) / T.
    Where C = 1 (unseen counting: four stars) that one prompt is meant, and its images are units."""
    means, variances = [], []
    for mine in by_tag(rows).values():
        e = values[mine] - values[mine].mean()  # (P_t,n)
        means.append(values[mine].mean())
        sums = {}
        for i, row_sum in zip(mine, e.sum(1)):
            sums[rows[i]["prompt"]] = sums.get(rows[i]["prompt"], 0) + row_sum
        units = np.array(list(sums.values())) if len(sums) > 1 else e.ravel()
        variances.append((units**2).sum() / e.size**2 * len(units) / max(1, len(units) - 1))
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(means))


def spread(rows, k):
    """Indices of (at most) k rows of every tag, evenly spaced: always the same choice."""
    tags = by_tag(rows).values()
    return [of[a * len(of) // min(k, len(of))] for of in tags for a in range(min(k, len(of)))]


def word_table(rows, **columns):
    """Columns of n values for each of P rows, in a row -> {name: mean, name_se: its error}."""
    out = {}
    for name, values in columns.items():
        values = np.array(values, np.float64).reshape(len(rows), -1)
        out[name], out[name + "_se"] = mean_and_error(values, rows)
    return out


def plot_trade_off(curves, path):
    """Success against preservation, one line per {name: {label of a point: results}}, with standard
    errors (UniRL-Zero fig. 7, whose axes are CLIP similarities)."""
    fig, ax = plt.subplots(figsize=(5, 4))
    for name, points in curves.items():
        x, xe, y, ye = zip(*[[r[k] for k in ("success", "success_se", "preservation",
                                             "preservation_se")] for r in points.values()])
        ax.errorbar(x, y, ye, xe, fmt="o-", ms=4, lw=1, capsize=2, label=name)
        for at, label in zip(zip(x, y), points):
            ax.annotate(label, at, (4, 4), textcoords="offset points", fontsize=8)
    ax.set(xlabel="success: the edit is there", ylabel="preservation: all else is as it was")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    with replacing(path) as fresh:
        fig.savefig(fresh, dpi=110, format="png")
    plt.close(fig)


def grid(images, captions, path, frames=None, columns=8, about=None):
    """PNG of images, uint8 (N,3,H,W) torch or (N,H,W,3) numpy, captions below; frames: N of True
    (green), False (red) or None; about: what the file says of itself, JSON in its text chunk
    "parameters"."""
    images = arrays(images) if torch.is_tensor(images) else images
    H, W = images.shape[1:3]
    zoom, font = max(1, 128 // W), ImageFont.load_default(11)
    text = ["\n".join(line for part in c.split("\n") for line in textwrap.wrap(
        part, max(8, zoom * W // 6))) for c in captions]
    lines = max(t.count("\n") + 1 for t in text)
    w, h, columns = zoom * W + 12, zoom * H + 12 + 14 * lines, min(columns, len(images))
    page = Image.new("RGB", (columns * w, -(-len(images) // columns) * h), "white")
    pen = ImageDraw.Draw(page)
    for i, image in enumerate(images):
        x, y = i % columns * w + 6, i // columns * h + 6
        if frames is not None and frames[i] is not None:
            color = (30, 160, 60) if frames[i] else (220, 40, 40)
            pen.rectangle((x - 3, y - 3, x + zoom * W + 2, y + zoom * H + 2), fill=color)
        page.paste(Image.fromarray(image).resize((zoom * W, zoom * H), Image.NEAREST), (x, y))
        pen.multiline_text((x, y + zoom * H + 4), text[i], "black", font, spacing=2)
    info = PngInfo()
    if about is not None:
        info.add_text("parameters", json.dumps(about))
    with replacing(path) as fresh:
        page.save(fresh, "PNG", pnginfo=info)


def show_answers(questions, said, right, path):
    """What has no picture to stand below, as a table: path with .md in place of .png."""
    rows = [f"| {q} | {t} | {'yes' if ok else 'no'} |".replace("\n", " ")
            for q, t, ok in zip(questions, said, right)]
    write(Path(path).with_suffix(".md"), "\n".join(
        ["| question | answer | right |", "|---|---|---|", *rows, ""]))


def show_table(runs):
    """{name: results} side by side, each with what it holds of others, such as its unseen split,
    behind it."""
    columns = [(f"{name} {kind}".strip(), r) for name, results in runs.items()
               for kind, r in [("", results), *results.items()] if isinstance(r, dict)]
    keys = dict.fromkeys(k for _, r in columns for k in r if k + "_se" in r)
    wide = max([15, *(len(k) + 1 for k in keys)])
    world = next((f"world {r['world']}" for _, r in columns if "world" in r), "")
    print(f"{world:{wide}}" + "".join(f"{name:>17}" for name, _ in columns))
    for k in keys:
        cells = [f"{r[k]:9.3f} ± {r[k + '_se']:5.3f}" if k in r else "" for _, r in columns]
        print(f"{k:{wide}}" + "".join(f"{c:>17}" for c in cells))
