"""A run one can watch: index.html, which opens from disk without a server or a network, and
curves.png. Both come from log.jsonl and are rewritten at each look."""

import html
import json
import math
import os
import re
import time
from array import array
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.flags import settings_of
from common.run import replacing, write

PAGE = Path(__file__).with_name("page.html")         # script and style; its text comes from here
MOST = 400                # points of a curve in curves.png, whose panels have so many pixels
BINS = 300                # of a curve in index.html, from twice as many rows on
KEPT = 30                 # tables of words, the latest, that index.html holds
LOSS = r"(?:\w+_)?loss"
# Columns that share a panel; each of the others has its own, which comes first if it is a reward's.
PANELS = (
    ("Held out", "score|edit_score|cot_score|accuracy|corrected|damaged|success|preservation|"
                 "spearman|raw"),
    ("Loss", LOSS),
    ("Gradient norm", r"(?:\w+_)?grad_norm"),
    ("Share of images in groups that disagree", "kept"),
    ("Share of pictures with an object nobody asked for", "extra"),
    ("Largest |ratio - 1| before the update", r"(?:\w+_)?ratio_off"),
    ("Ratio after an update, from 5 % to 95 %", r"(?:\w+_)?ratio_(?:low|high)"),
    ("Share of ratios that are clipped", r"(?:\w+_)?clipped"),
    ("Distance from the policy before, nats", r"(?:\w+_)?kl_old"),
    ("Distance from the initial model", r"(?:\w+_)?kl"),
    ("Failures", r"failed_.*|unparsed_.*|skipped"),
    ("Seconds of an update", r"s_.*"),
)


# ---------------------------------------------------------------------------------------------
# The log


class Columns:
    """log.jsonl as columns of n numbers, NaN where a row has none. What was read once is kept."""

    def __init__(self, inode):
        self.inode, self.read, self.n, self.torn, self.columns = inode, 0, 0, 0, {}

    def more(self, file):
        """Reads on from where it was, to the end of the last whole line."""
        file.seek(self.read)
        for line in file:
            if not line.endswith(b"\n"):                         # still being written
                break
            self.read += len(line)
            try:
                row = json.loads(line, parse_int=float)
                whole = math.isfinite(row["step"]) and math.isfinite(row["at"])
            except (ValueError, LookupError, TypeError, RecursionError):
                whole = False
            if not whole:
                self.torn += 1
                continue
            for name, value in row.items():
                if isinstance(value, (float, bool)):
                    column = self.columns.setdefault(name, array("d"))
                    column.extend([math.nan] * (self.n - len(column)))
                    column.append(value)
            self.n += 1
        for column in self.columns.values():
            column.extend([math.nan] * (self.n - len(column)))
        return self

    def curve(self, name):
        """-> steps, minutes, values (n,) of the rows that have it"""
        if name not in self.columns:
            return (np.zeros(0),) * 3
        step, at, values = (np.array(self.columns[k]) for k in ("step", "at", name))
        there = ~np.isnan(values)
        return step[there], at[there] / 60, values[there]


KNOWN = {}                 # path: Columns, of this process's own run


def read_columns(out):
    """-> Columns of a run's folder, as far as it is written"""
    path = os.path.abspath(out / "log.jsonl")
    try:
        file = open(path, "rb")
    except FileNotFoundError:                                    # nothing is logged yet
        return Columns(0)
    with file:
        about = os.fstat(file.fileno())
        log = KNOWN.get(path)
        if log is None or log.inode != about.st_ino or log.read > about.st_size:
            KNOWN.clear()
            log = KNOWN[path] = Columns(about.st_ino)            # another file: from its beginning
        return log.more(file)


# ---------------------------------------------------------------------------------------------
# curves.png


@lru_cache(1)
def drawing(curves):
    """A figure that is drawn again and again, since making one takes longer than drawing it: a
    panel per tuple of names -> figure, axes, {(panel, name): its faint and its strong line}"""
    figure = Figure(figsize=(4.5 * len(curves), 3.2), dpi=90)
    axes, lines = figure.subplots(1, len(curves), squeeze=False)[0], {}
    figure.subplots_adjust(0.2 / len(curves), 0.15, 1 - 0.03 / len(curves), 0.85, 0.2)
    for i, (ax, names) in enumerate(zip(axes, curves)):
        for k, name in enumerate(names):
            lines[i, name] = (ax.plot([], [], f"C{k}", lw=1, alpha=0.3)[0],
                              ax.plot([], [], f"C{k}", ms=3, lw=1.5, label=name)[0])
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.set_xlabel("minutes")
        ax.grid(alpha=0.3)
        if names:
            ax.legend(fontsize=7, ncols=3, frameon=False, loc="lower left",
                      bbox_to_anchor=(-0.02, 1))                 # above: where is best takes time
    return figure, axes, lines


def thin(x, most=MOST):
    """Of (n,) values at most so many, evenly spaced, with the first and the last"""
    return x[np.linspace(0, len(x) - 1, most).astype(int)] if len(x) > most else x


def plot(out, *curves):
    """curves.png from log.jsonl: one panel per tuple of row names, against minutes."""
    log = read_columns(out)
    there = tuple(tuple(name for name in names if len(log.curve(name)[2])) for names in curves)
    figure, axes, lines = drawing(there)
    for (_, name), (faint, strong) in lines.items():
        _, minutes, values = log.curve(name)
        n = len(values) // 20                                    # many points: their running mean
        many = n > 1
        faint.set_data(thin(minutes), thin(values if many else values * math.nan))
        if many:
            total = np.concatenate([[0], np.cumsum(values)])
            values = (total[n:] - total[:-n]) / n
            minutes = minutes[n // 2 :][: len(values)]
        strong.set_data(thin(minutes), thin(values))
        strong.set_marker("" if many else "o")
    for ax in axes:
        ax.relim()
        ax.autoscale_view()
    with replacing(out / "curves.png") as fresh:
        figure.savefig(fresh, format="png", pil_kwargs=dict(compress_level=1))


# ---------------------------------------------------------------------------------------------
# Is it healthy? The rules of docs/results.md


def finite(log, name):
    values = log.curve(name)[2]
    return values[np.isfinite(values)]


def ends(values, least=5):
    """The first and the last quarter of a noisy curve, `least` to 50 values each -> their means,
    and by how many standard errors the last is above the first"""
    k = max(least, min(50, len(values) // 4))
    a, b = values[:k], values[-k:]
    error = math.sqrt((a.var() + b.var()) / k)
    return a.mean(), b.mean(), (b.mean() - a.mean()) / error if error else 0.0


def of_training(log):
    """Rewards should rise, losses fall. -> sentences, does a reward rise?"""
    said, rises = [], False
    for name in log.columns:
        v, falls = finite(log, name), re.fullmatch(LOSS, name)
        if not falls and not name.startswith("reward_") or not len(v):
            continue
        first, last, by = ends(v)
        by, way = (-by, "fall") if falls else (by, "rise")
        rises |= by > 2 and not falls
        if len(v) < 20:
            said += [("early", f"{name} is {v[-1]:.3g}; it should {way} within 20 updates.")]
        elif by > 2:
            said += [("fine", f"{name} went from {first:.3g} to {last:.3g}.")]
        else:
            said += [("look", f"{name} does not {way}: {first:.3g} at first, {last:.3g} now, in "
                      f"{len(v)} updates.")]
    return said, rises


def of_looks(log, rises):
    """What is held out should follow the rewards. -> sentences"""
    said = []
    for name in ("score", "accuracy", "success", "spearman"):
        if not len(v := finite(log, name)) or said:              # the first of them is the main one
            continue
        last = v[1:][-3:].mean() if len(v) > 1 else v[0]         # one look alone is noisy
        if len(v) < 3:
            said += [("early", f"Held out, {name} is {v[-1]:.3g}; its way shows after more looks.")]
        elif last > v[0]:
            said += [("fine", f"Held out, {name} follows: {v[0]:.3g} at first, {last:.3g} lately.")]
        else:
            why = ": the policy may be hacking the reward, which rises" if rises else ""
            said += [("look", f"Held out, {name} does not rise: {v[0]:.3g} at first, {last:.3g} "
                      f"lately{why}.")]
    if len(v := finite(log, "extra")) > 1:
        first, last = v[0], v[1:][-3:].mean()
        said += [("look" if last > first + 0.02 else "fine", "Pictures with an object nobody asked "
                  f"for: {first:.1%} at first, {last:.1%} lately.")]
    return said


def of_updates(log, config):
    """Is there something to learn from, and are the ratios what they should be? -> sentences"""
    said = []
    if len(v := finite(log, "kept")):
        kept = v[-20:].mean()
        said += [("look", f"Only {kept:.0%} of the images are in groups that disagree: there is "
                  "nothing left to learn from.") if kept < 0.05 else
                 ("fine", f"{kept:.0%} of the images are in groups that disagree.")]
    for part in "", "lm_":
        clip = config.get(part + "clip")
        if len(v := finite(log, part + "ratio_off")) and isinstance(clip, (int, float)):
            off = v[-20:].max()
            said += [("look", f"{part}ratio_off is {off:.1g}, not far below --{part}clip "
                      f"{clip:g}: rollout and update disagree.") if off > clip / 10 else
                     ("fine", f"{part}ratio_off is {off:.1g}, rounding only.")]
        if len(v := finite(log, part + "clipped")):
            share = v[-20:].mean()
            said += [("look" if share > 0.5 else "fine",
                      f"{share:.0%} of the {part}ratios are clipped in later updates.")]
    return said


def of_failures(log):
    """What could not be scored, and what was not finite -> sentences"""
    said = []
    for name in log.columns:
        if re.match("failed_|unparsed_", name):
            share = np.nansum(np.array(log.columns[name])[-20:]) / min(20, log.n)
            what, _, reward = name.partition("_")
            said += [("look" if share > 0.1 else "fine", f"Reward {reward}, last 20 updates: " + (
                f"{share:.0%} of the images could not be scored." if what == "failed" else
                f"{share:.0%} of the judge's answers said nothing usable."))]
    if log.n:
        skipped = int(finite(log, "skipped").sum())
        said += [("look", f"Updates left out, as they were not finite: {skipped}. A lower --lr may "
                  "help.") if skipped else ("fine", "No update was left out.")]
    if log.torn:
        said += [("look", f"Lines of log.jsonl that cannot be read: {log.torn}.")]
    return said


def health(log, config):
    """-> [("look", "fine" or "early", a sentence)], what wants a look first"""
    said, rises = of_training(log)
    said += of_looks(log, rises) + of_updates(log, config) + of_failures(log)
    return sorted(said, key=lambda item: ("look", "fine", "early").index(item[0]))


# ---------------------------------------------------------------------------------------------
# index.html


def numbers(values, digits=5):
    """-> a list for JSON, in few digits, where what is not finite is None"""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values]


def embedded(log, name):
    """-> a column as the page draws it: every value or, of many, means of BINS, least and most"""
    step, minutes, v = log.curve(name)
    if len(v) <= 2 * BINS:
        return dict(updates=numbers(step, 9), minutes=numbers(minutes), value=numbers(v))
    cuts = np.linspace(0, len(v), BINS + 1).astype(int)[:-1]
    sizes = np.diff([*cuts, len(v)])
    return dict(updates=numbers(np.maximum.reduceat(step, cuts), 9),
                minutes=numbers(np.maximum.reduceat(minutes, cuts)),
                value=numbers(np.add.reduceat(v, cuts) / sizes),
                low=numbers(np.minimum.reduceat(v, cuts)),
                high=numbers(np.maximum.reduceat(v, cuts)))


def panels_of(names):
    """Names of columns -> [panel]"""
    rest = [name for name in names if name not in ("step", "at")]
    panels = [dict(title="Reward, while training", columns=[name]) for name in rest
              if name.startswith("reward_")]
    rest = [name for name in rest if not name.startswith("reward_")]
    for title, pattern in PANELS:
        if mine := [name for name in rest if re.fullmatch(pattern, name)]:
            panels.append(dict(title=title, columns=mine))
            rest = [name for name in rest if name not in mine]
    return panels + [dict(title=name, columns=[name]) for name in rest]


def pictures_of(folder):
    """What samples/ holds -> {series: [look]}: step_00020.png is one of series `step`."""
    def order(file):
        number = file.stem.rpartition("_")[2]
        return int(number) if number.isdecimal() else math.inf, file.name
    series, files = {}, sorted(folder.glob("*"), key=order) if folder.is_dir() else []
    tables = [file for file in files if file.suffix == ".md"][-KEPT:]
    for file in files:
        name, _, number = file.stem.rpartition("_")
        if not (name and number.isdecimal()):                    # before.png, after.png
            name, number = "before and after", file.stem
        label = f"update {int(number)}" if number.isdecimal() else number
        if file.suffix == ".png":
            series.setdefault(name, []).append(dict(label=label, file=file.name))
        elif file in tables:
            text = file.read_bytes()[:20_000].decode(errors="replace")
            series.setdefault(name, []).append(dict(label=label, text=text))
    if "before and after" in series:
        series["before and after"].reverse()
    return series


def write_page(out):
    """index.html of a run's folder, from its log, its flags and its samples."""
    out = Path(out)
    log = read_columns(out)
    config = settings_of(out)
    steps = config.get("steps") if isinstance(config.get("steps"), int) else None
    at = [np.array(log.columns[name]) for name in ("step", "at") if log.n]
    pace = np.diff(at[1][-21:]) / np.maximum(1, np.diff(at[0][-21:])) if at else []
    data = dict(
        name=out.resolve().name, written=round(time.time()),
        flags={name: str(value) for name, value in config.items()},
        progress=dict(step=int(at[0][-1]) if at else 0, minutes=at[1][-1] / 60 if at else 0,
                      steps=steps,
                      pace=float(np.median(pace)) / 60 if len(pace) else None),
        health=health(log, config), pictures=pictures_of(out / "samples"),
        panels=panels_of(log.columns),
        columns={name: embedded(log, name) for name in log.columns if name not in ("step", "at")})
    # Inside <script> only "<" could end the data; ">" and "&" go with it.
    text = re.sub("[<>&]", lambda c: f"\\u{ord(c[0]):04x}", json.dumps(data))
    page = PAGE.read_text().replace("{{title}}", html.escape(data["name"]), 1)
    write(out / "index.html", page.replace("{{data}}", text, 1))


def redraw(out, *curves):
    """curves.png and index.html anew, at each look. curves: panels of the first."""
    plot(out, *curves)
    write_page(out)
