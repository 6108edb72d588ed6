"""What a run shows of itself: index.html, curves.png, and the rows that a tracker gets."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from PIL import Image
from test_cli import complaint

import common.page as page_py
from common.page import health, plot, redraw, read_columns, write_page
from common.track import Tracker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")
EVIL = ["<script>alert(1)</script>", "</script><script>stolen()</script>", "<!--<script>", "-->",
        "\"'><img src=x onerror=alert(1)>", "&lt;b&gt;&amp;", "{{data}}{{title}}", "\\u003cb>",
        "\u2028\u2029\0\x1b", "\ud800", "$&$1", "]]>"]


def row(step, **columns):
    return dict(step=step, at=6.0 * step, **columns)


def write_log(out, rows):
    out.mkdir(exist_ok=True)
    (out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def a_run(out, rows, config=None, pictures=()):
    write_log(out, rows)
    (out / "samples").mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps(config or dict(steps=100, clip=0.002)))
    for i, name in enumerate(pictures):
        Image.new("RGB", (40, 20), (40 * i % 256, 90, 200)).save(out / "samples" / name, "PNG")
    return out


class Reader(HTMLParser):
    """-> tags of a page, its scripts by type, and what it would load"""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.loads = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.kind = dict(attributes).get("type", tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("script", "style", "title"):
            self.texts[self.kind] = self.texts.get(self.kind, "") + data

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)


def shown(out):
    """index.html, parsed -> (Reader, the data in it)"""
    reader = Reader((out / "index.html").read_text())
    return reader, json.loads(reader.texts["application/json"])


def browse(out):
    """-> the page's elements after its script has run in Chromium, without any network"""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         f"--user-data-dir={out}/browser", "--virtual-time-budget=2000", "--enable-logging=stderr",
         "--dump-dom", (out / "index.html").resolve().as_uri()],
        capture_output=True, text=True, timeout=120)
    return done.stdout, [s for s in done.stderr.splitlines() if "CONSOLE" in s]


def test_the_page(tmp_path):
    """All that a look should show is there, and nothing is loaded from elsewhere."""
    names = ["step_00000.png", "step_00020.png", "step_00100.png", "edits_00020.png", "before.png",
             "after.png"]
    rows = [row(0, score=0.4)] + [
        row(i, reward_a=i / 100, grad_norm=1.0, s_rollout=0.5, mine=3, text="x", flag=True,
            **dict(score=0.4 + i / 200) if i % 20 == 0 else {}) for i in range(1, 61)]
    out = a_run(tmp_path / "r\xfcn", rows, dict(steps=100, reward="a", lr=1e-4), names)
    (out / "samples" / "answers_00020.md").write_text("| question |\n|---|\n| <b> |\n")
    write_page(out)
    reader, data = shown(out)
    assert data["name"] == "r\xfcn" and data["flags"] == dict(
        steps="100", reward="a", lr="0.0001")
    assert data["progress"] == dict(step=60, steps=100, minutes=6.0, pace=pytest.approx(0.1))
    assert data["pictures"] == {
        "step": [dict(label=f"update {n}", file=f"step_{n:05}.png") for n in (0, 20, 100)],
        "edits": [dict(label="update 20", file="edits_00020.png")],
        "answers": [dict(label="update 20", text="| question |\n|---|\n| <b> |\n")],
        "before and after": [dict(label="before", file="before.png"),
                             dict(label="after", file="after.png")]}
    panels = {name: panel["title"] for panel in data["panels"] for name in panel["columns"]}
    assert panels.keys() == data["columns"].keys() == {"reward_a", "score", "grad_norm",
                                                       "s_rollout", "mine", "flag"}
    assert panels["score"] == "Held out" and panels["mine"] == "mine"
    assert data["columns"]["score"] == dict(updates=[0, 20, 40, 60], minutes=[0, 2, 4, 6],
                                            value=[0.4, 0.5, 0.6, 0.7])
    assert not reader.loads and "link" not in reader.tags
    page = (out / "index.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|fetch|XMLHttp", page)
    assert not list(out.glob("*.tmp"))


def test_looks_stand_in_the_order_of_updates(tmp_path):
    names = ["step_98000.png", "step_100000.png"]
    out = a_run(tmp_path / "run", [row(0)], {}, names)
    for name in (*(f"answers_{i:05}" for i in range(0, 40_000, 1000)), "before", "after"):
        (out / "samples" / f"{name}.md").write_text(name)
    write_page(out)
    pictures = shown(out)[1]["pictures"]
    assert [look["file"] for look in pictures["step"]] == names
    assert [look["label"] for look in pictures["before and after"]] == ["before", "after"]
    assert [look["text"] for look in pictures["answers"]][-1] == "answers_39000"


@pytest.mark.parametrize("evil", EVIL)
def test_text_is_never_read_as_html(tmp_path, evil):
    """Wherever a user's words stand: a flag's name and value, a column, a picture, a table."""
    rows = [row(i, **{evil: i, f"reward_{evil}": i, f"failed_{evil}": 1}) for i in range(1, 30)]
    file = re.sub(r"[/\0\ud800]", "_", evil) + "_00001.png"
    out = a_run(tmp_path / "run", rows, {evil: evil, "steps": evil, "clip": evil}, [file])
    (out / "samples" / "table_00001.md").write_bytes(evil.encode(errors="replace"))
    write_page(out)
    reader, data = shown(out)
    clean = a_run(tmp_path / "clean", [row(1, x=1)])
    write_page(clean)
    assert reader.tags == shown(clean)[0].tags
    assert data["flags"][evil] == evil and evil in data["columns"]
    assert any(evil in sentence for _, sentence in data["health"])


def test_a_name_that_is_html(tmp_path):
    out = a_run(tmp_path / "<script>alert(1)<b>", [row(1, x=1)])
    write_page(out)
    reader, data = shown(out)
    assert reader.texts["title"] == "<script>alert(1)<b>" == data["name"]
    assert reader.tags.count("script") == 2 and "b" not in reader.tags[:12]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
def test_in_a_browser(tmp_path):
    """The script runs to its end on a common run, on one that has hardly begun, on words that are
    HTML; its pictures are those on disk."""
    rng = random.Random(0)
    rows = [row(i, reward_a=rng.random(), loss=1 / i, **{EVIL[1]: i},
                **{} if i % 20 else dict(score=i / 99)) for i in range(1, 90)]
    flags = {EVIL[0]: EVIL[1], "steps": 100}
    a_run(tmp_path / "a", rows, flags, ["step_00020.png", "step_00040.png"])
    a_run(tmp_path / "b", [row(0)])
    a_run(tmp_path / "c", [row(1, x=math.inf), row(2, x=math.nan), row(3, x=-1e300)])
    for name, panels in (("a", 4), ("b", 0), ("c", 1)):
        write_page(tmp_path / name)
        dom, complaints = browse(tmp_path / name)
        reader = Reader(dom)
        assert not complaints and reader.tags.count("svg") == panels, (name, complaints)
        assert "alert" not in "".join(reader.loads) and reader.tags.count("script") == 2
        assert ("samples/step_00040.png" in reader.loads) == (name == "a")
        assert "NaN" not in dom.split("<main>")[1].split("<script")[0]
    assert "update 89 of 100" in browse(tmp_path / "a")[0]


def test_broken_runs_have_a_page(tmp_path):
    """Whatever a crash or a user left in the folder."""
    for i, (log, config) in enumerate([
            (None, None), (b"", b""), (b"", b"[1]"), (b"\n\n", b"{"), (b"[1]\nnull\n5\n", b"null"),
            (b'{"step": 1, "at": 1}\n{"step": 2, "a', b'{"steps": "many", "clip": null}'),
            (b'{"step": "x", "at": []}\n{"at": 3}\n', b'{"steps": null}'),
            (b"\xff\xfe\x00\n" + b"[" * 100_000 + b"\n", b"\xff"),
            (b'{"step": 1, "at": NaN, "loss": Infinity, "kept": NaN}\n', b'{"clip": NaN}'),
            (b'{"step": 1e999, "at": 1}\n{"step": 2, "at": 1}\n{"step": 2, "at": 1}\n', b"{}"),
            (b'{"step": 5, "at": 9, "x": 1' + b"0" * 4000 + b"}\n", b"{}")]):
        out = tmp_path / str(i)
        out.mkdir()
        if log is not None:
            (out / "log.jsonl").write_bytes(log)
            (out / "config.json").write_bytes(config)
        redraw(out, ["loss"], ["x", "y"])
        text = (out / "index.html").read_text()
        json.loads(Reader(text).texts["application/json"], parse_constant=pytest.fail)
        assert Image.open(out / "curves.png").size == (810, 288)
    torn = dict(read_columns(tmp_path / "5").columns)
    assert [*torn["step"]] == [1.0]
    assert any("cannot be read: 2" in s for _, s in health(read_columns(tmp_path / "6"), {}))


def test_the_log_is_read_on(tmp_path, monkeypatch):
    """A look reads the new rows alone; a row that is half written is read when it is whole; a log
    that was cut or replaced, and another run's, are read from their beginning."""
    out, rows = tmp_path / "a", [row(i, a=i, **dict(b=-i) if i > 3 else {}) for i in range(6)]
    write_log(out, rows)
    assert [*read_columns(out).curve("a")[2]] == [0, 1, 2, 3, 4, 5]
    parsed, real = [], json.loads
    monkeypatch.setattr(page_py.json, "loads",
                        lambda line, **how: parsed.append(line) or real(line, **how))
    with open(out / "log.jsonl", "a") as f:
        f.write(json.dumps(row(6, a=6, c=1)) + '\n{"step": 7, "at"')
    log = read_columns(out)
    assert len(parsed) == 1 and log.n == 7 and log.torn == 0
    with open(out / "log.jsonl", "a") as f:
        f.write(': 42, "a": 7}\n')
    steps, minutes, values = read_columns(out).curve("a")
    assert len(parsed) == 2 and [*values] == [*steps] == [*range(8)] and minutes[7] == 0.7
    assert [*read_columns(out).curve("b")[0]] == [4, 5]
    assert [*read_columns(out).curve("c")[0]] == [6]
    write_log(out, rows[:3])                                     # shorter
    assert [*read_columns(out).curve("a")[2]] == [0, 1, 2]
    write_log(tmp_path / "b", [row(9, a=9)] * 9)
    (tmp_path / "b" / "log.jsonl").replace(out / "log.jsonl")    # another file, and longer
    assert [*read_columns(out).curve("a")[2]] == [9] * 9
    write_log(tmp_path / "b", [row(8, a=8)])
    assert [*read_columns(tmp_path / "b").curve("a")[2]] == [8]
    assert not len(read_columns(tmp_path / "none").curve("a")[2])


def test_curves_are_true(tmp_path, monkeypatch):
    """What is drawn are the values, or their running mean; nothing stays of the look before."""
    rows = [row(i, a=math.sin(i), **dict(b=i) if i % 10 == 0 else {}) for i in range(1, 101)]
    write_log(tmp_path, rows[:30])
    plot(tmp_path, ["a", "gone"], ["b"])
    write_log(tmp_path, rows)
    plot(tmp_path, ["a", "gone"], ["b"])
    axes, lines = page_py.drawing((("a",), ("b",)))[1:]
    (faint, strong), (none, few) = lines[0, "a"], lines[1, "b"]
    assert np.allclose(faint.get_xydata(), [(r["at"] / 60, r["a"]) for r in rows])
    assert len(strong.get_xdata()) == 96                         # n = 100 // 20 at once
    means = [np.mean([r["a"] for r in rows[i : i + 5]]) for i in range(96)]
    assert np.allclose(strong.get_xydata(), [(rows[i + 2]["at"] / 60, m)
                                             for i, m in enumerate(means)])
    assert few.get_xydata().tolist() == [[i, 10 * i] for i in range(1, 11)]
    assert np.isnan(none.get_ydata()).all() and few.get_marker() == "o"
    assert axes[1].get_xlim()[1] >= 10 and axes[1].get_ylim()[1] >= 100


def test_a_hundred_thousand_rows(tmp_path):
    """A look costs what its new rows cost. Bounds are of processor time, on a busy machine."""
    rng, n = random.Random(0), 100_000
    line = ('{"step": %d, "at": %d.5, "reward_geneval": %f, "grad_norm": %f, "kept": 0.75, '
            '"ratio_off": 1e-7, "s_rollout": %f, "s_update": %f}\n')
    (tmp_path / "config.json").write_text('{"steps": 200000, "clip": 0.002}')
    with open(tmp_path / "log.jsonl", "w") as f:
        f.writelines(line % (i, i, *(rng.random() for _ in range(4))) for i in range(1, n + 1))
    panels, spent = (["reward_geneval"], ["score"], ["grad_norm"]), []
    for k in range(4):
        with open(tmp_path / "log.jsonl", "a") as f:
            f.writelines(line % (i, i, 1, 1, 1, 1) for i in range(n + 20 * k, n + 20 * k + 20))
        begin = time.process_time()
        plot(tmp_path, *panels)
        spent.append(time.process_time() - begin)
    begin = time.process_time()
    write_page(tmp_path)
    print(f"plot {spent[0]:.2f} s at first, then {min(spent[1:]):.3f} s; page "
          f"{time.process_time() - begin:.3f} s", file=sys.stderr)
    assert min(spent[1:]) < 0.3 and time.process_time() - begin < 1
    data = shown(tmp_path)[1]
    assert (tmp_path / "index.html").stat().st_size < 300_000
    for name, column in data["columns"].items():
        assert len(column["value"]) == page_py.BINS and column["updates"][-1] == n + 79
        assert all(a - 1e-4 <= v <= b + 1e-4 for a, v, b in zip(
            column["low"], column["value"], column["high"])), name
    assert data["columns"]["reward_geneval"]["low"][0] < 0.02
    assert data["progress"]["step"] == n + 79


# What a run does, and what is then said of it: one healthy run, and each change of it.
def healthy(i, **changes):
    noise = random.Random(i).gauss(0, 0.02)
    columns = dict(reward_geneval=0.5 + i / 200 + noise, kept=0.7, ratio_off=1e-7, grad_norm=0.01,
                   clipped=0.1, lm_ratio_off=1e-6)
    if i % 10 == 0:
        columns |= dict(score=0.5 + i / 300, extra=0.2 - i / 1000)
    columns |= {name: f(i, noise) for name, f in changes.items()}
    return row(i, **{name: x for name, x in columns.items() if x is not None})


SICK = {
    "reward_geneval does not rise": dict(reward_geneval=lambda i, e: 0.5 + e),
    "reward_geneval does not rise: 0.44 at first, 0.06 now": dict(
        reward_geneval=lambda i, e: 0.5 - i / 200),
    "may be hacking the reward": dict(score=lambda i, e: 0.5 - i / 300 if i % 10 == 0 else None),
    "nothing left to learn": dict(kept=lambda i, e: 0.7 - i / 80 if i < 56 else 0.0),
    "nobody asked for: 20.0% at first, 29.0% lately": dict(
        extra=lambda i, e: 0.2 + i / 1000 if i % 10 == 0 else None),
    "ratio_off is 0.001, not far below --clip": dict(ratio_off=lambda i, e: 1e-3),
    "lm_ratio_off is 0.05, not far below --lm_clip": dict(lm_ratio_off=lambda i, e: 0.05),
    "80% of the ratios are clipped": dict(clipped=lambda i, e: 0.8),
    "not finite: 3": dict(skipped=lambda i, e: 1 if 50 < i < 54 else None),
    "25% of the images could not be scored": dict(failed_geneval=lambda i, e: 0.25),
    "25% of the judge's answers said nothing": dict(unparsed_geneval=lambda i, e: 0.25),
    "loss does not fall": dict(loss=lambda i, e: 1 + e),
}


def said(tmp_path, rows):
    write_log(tmp_path, rows)
    return health(read_columns(tmp_path), dict(clip=0.002, lm_clip=0.2))


def test_a_healthy_run(tmp_path):
    states = said(tmp_path, [healthy(i, loss=lambda i, e: 1 - i / 200 + e) for i in range(101)])
    assert {state for state, _ in states} == {"fine"} and len(states) == 9
    early = said(tmp_path, [healthy(i) for i in range(12)])
    assert {state for state, s in early if "reward" in s or "Held out" in s} == {"early"}
    assert said(tmp_path, []) == []


@pytest.mark.parametrize("words", SICK)
def test_a_sick_run(tmp_path, words):
    states = said(tmp_path, [healthy(i, **SICK[words]) for i in range(101)])
    look = [sentence for state, sentence in states if state == "look"]
    assert len(look) == 1 and words in look[0], states
    assert states[0] == ("look", look[0])                        # first of all


# ---------------------------------------------------------------------------------------------
# Trackers

WANDB = """
calls = []
class Run:
    def log(self, row, step): calls.append(("log", row, step))
def init(**settings): calls.append(("init", settings)); return Run()
def Image(file): return ("image", file)
"""


def test_wandb_gets_rows_and_pictures(tmp_path, monkeypatch):
    """By the calls that wandb 0.31 takes; a resumed run is the same one there."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    out = a_run(tmp_path / "my run", [])
    trackers = [Tracker("wandb", out, dict(lr=1.0)) for _ in range(2)]
    trackers[0].row(row(3, loss=0.5))
    trackers[0].picture("step", out / "x.png", 3)
    (_, first), (_, again), *rest = sys.modules["wandb"].calls
    assert first == again and first["config"] == dict(lr=1.0) and first["name"] == "my-run"
    assert re.fullmatch(r"my-run-[0-9a-f]{8}", first["id"]) and first["resume"] == "allow"
    assert rest == [("log", row(3, loss=0.5), 3),
                    ("log", dict(step=("image", str(out / "x.png"))), 3)]
    other = a_run(tmp_path / "other", [])
    Tracker("wandb", other, {})
    assert sys.modules["wandb"].calls[-1][1]["id"] != first["id"]
    monkeypatch.delitem(sys.modules, "wandb")


def test_a_run_is_tracked(parts, tmp_path, monkeypatch):
    """Each row of the log, and the pictures of its look, as they are written."""
    (tmp_path / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    rows = tiny.play(parts, tmp_path / "run", "--steps", 2, "--eval-every", 2, "--track", "wandb",
                     "--no-final-bench")
    (_, about), *said = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    assert about["config"]["G"] == 4 and [r for _, r, _ in said if "at" in r] == rows
    pictures = [(step, *r) for _, r, step in said if "at" not in r]
    assert pictures == [(0, "step"), (2, "step")]


def test_a_run_asks_first_for_its_tracker(parts, tmp_path):
    assert "--track tensorboard needs tensorboard: pip install" in complaint(
        tiny.play, parts, tmp_path / "run", "--track", "tensorboard")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, module, words", [
    ("wandb", "wandb", "needs wandb: pip install wandb"),
    ("tensorboard", "torch.utils.tensorboard", "needs tensorboard: pip install tensorboard"),
    ("mlflow", "mlflow", "unknown --track 'mlflow'; there are: wandb, tensorboard")])
def test_a_tracker_that_is_not_there(tmp_path, monkeypatch, name, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=words) as error:
        Tracker(name, tmp_path, {})
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())
