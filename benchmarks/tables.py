"""From pictures' verdicts to a benchmark's numbers, and from several runs to one table beside the
papers' own rows. And what one looks at: the worst and the best pictures of each category.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from benchmarks import NAMES, find
from benchmarks.judging import pictures_of
from benchmarks.drawing import by_file
from common.read import UNREADABLE, read_json
from common.run import fail
from common.show import by_tag, grid, mean_and_error

# The papers' own rows: [{bench, model, paper, where, values}], and judge where it is not official
PUBLISHED = Path(__file__).parent / "published.json"


def has(row, column):
    return column in row and not math.isnan(row[column])


def mean(rows, column, tags=False, scale=1.0):
    """The mean of a column over the rows that have it, and its standard error, whose units are
    items: several pictures of a prompt are one, several edits by the same words are not. tags: the
    mean of tags' means instead. -> (mean, error), NaN of no row"""
    mine = [dict(r, prompt=r["item"] if "item" in r else r["prompt"], tag=r["tag"] if tags else "")
            for r in rows if has(r, column)]
    if not mine:
        return math.nan, math.nan
    m, e = mean_and_error(np.array([[float(r[column])] for r in mine]), mine)
    return scale * m, scale * e


def metrics(rows, scale=1.0, **columns):
    """-> {name: mean, name_se: its error} of columns, {name: column or (column, tags)}; what no row
    has is left out"""
    out = {}
    for name, what in columns.items():
        column, tags = what if isinstance(what, tuple) else (what, False)
        m, e = mean(rows, column, tags, scale)
        if not math.isnan(m):
            out[name], out[name + "_se"] = m, e
    return out


def per_tag(rows, column, scale=1.0, name=str):
    """-> {tag: mean of a column, tag_se: its error}; name(tag): what the metric is called"""
    out = {}
    for tag, mine in by_tag(rows).items():
        out |= metrics([rows[i] for i in mine], scale, **{name(tag): column})
    return out


def weighted(rows, column, weights):
    """-> {tag: mean, tag_se: error} of a column and, where no tag is missing, `score`: the sum of
    the means by {tag: weight}"""
    out = per_tag(rows, column)
    if all(tag in out for tag in weights):
        out["score"] = sum(w * out[tag] for tag, w in weights.items())
        out["score_se"] = math.sqrt(sum((w * out[tag + "_se"]) ** 2 for tag, w in weights.items()))
    return dict(sorted(out.items(), key=lambda kv: not kv[0].startswith("score")))


def contact_sheet(bench, shots, folder, rows, png):
    """A row per category: its four worst pictures and its four best, with their verdicts."""
    column = "score" if any("score" in r for r in rows) else "partial"
    shown = [r for its in by_tag(rows).values() for r in ends([rows[i] for i in its], column)]
    wanted, images = {r["file"] for r in shown if r}, {}
    for its in by_file(shots):
        if its[0].file in wanted:
            images |= zip([(s.file, s.k) for s in its], pictures_of(bench, its, folder))
    squares, captions = [], []
    for r in shown:
        x = images[r["file"], r["k"]] if r else np.full((1, 1, 3), 255, np.uint8)
        squares.append(np.array(ImageOps.pad(Image.fromarray(x), (192, 192), color="white")))
        captions.append(f"{r['tag']}: {r['prompt'][:90]}\n" + "  ".join(
            f"{k} {v:.3g}" for k, v in r.items() if type(v) in (int, float, bool) and k != "k")
            if r else "")
    grid(np.stack(squares), captions, png)


def ends(rows, column, each=4):
    """Of one category's rows the worst and the best -> eight, None where it has fewer,
    or none"""
    known = sorted((r for r in rows if has(r, column)), key=lambda r: r[column])
    some = known if len(known) <= 2 * each else known[:each] + known[-each:]
    return some and some + [None] * (2 * each - len(some))


# ---------------------------------------------------------------------------------------------
# Several runs in one table


def read_results(folder):
    """-> what eval.py has left in a folder, or the user's error"""
    try:
        results = read_json(Path(folder) / "results.json")
    except UNREADABLE as e:
        fail(f"--table {folder}: {e}; eval.py --bench ... --out {folder} makes it")
    if not isinstance(results, dict) or results.get("bench") not in NAMES:
        fail(f"--table {folder}: its results.json names no benchmark that there is: "
             + ", ".join(NAMES))
    return results


def joined(folders):
    """Runs' folders -> a Markdown table a benchmark: a row per run, with the judge that was asked,
    n, standard errors and answers that said nothing usable, then the papers' own rows."""
    runs = {}
    for folder in folders:
        results = read_results(folder)
        several = [k for k in results if k.startswith("guidance ")]              # of --guidances
        runs.setdefault(results["bench"], []).extend(
            [(f"{folder}, {k}", results | results[k] | dict(guidance=k.split()[1]))
             for k in several] or [(str(folder), results)])
    return "\n".join(one_table(name, its) for name, its in runs.items())


def one_table(name, runs):
    about = find(name).ABOUT
    columns = [*dict.fromkeys(k for _, r in runs for k in r if k + "_se" in r)]
    asked = ["judge", "unparsed", "unanswered"] * bool(about.judge)
    drawn = [k for k in ("steps", "guidance") if any(k in r for _, r in runs)]
    world = ["world"] * any("world" in r for _, r in runs)       # the classroom's version
    rows = [dict(run=run, n=r.get("images", r.get("answers", ""))) | {
        k: r.get(k, "") for k in world + drawn + asked} | {
        k: f"{r[k]:.3f} ± {r[k + '_se']:.3f}" for k in columns if k in r} for run, r in runs]
    for paper in read_json(PUBLISHED):
        if paper["bench"] == name:
            rows.append(dict(run=f"{paper['model']} ({paper['paper']}, {paper['where']})",
                             judge=paper.get("judge", about.judge)) | paper["values"])
    head = ["run", *world, *drawn, *asked[:1], "n", *columns, *asked[1:]]
    title = f"**{name}**: {about.measures}" + f"; official judge: {about.judge}" * bool(about.judge)
    return "\n".join([title, "", row_of(head), row_of(["---"] * len(head)),
                      *(row_of([row.get(k, "") for k in head]) for row in rows), ""])


def row_of(cells):
    return "| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in cells) + " |"
