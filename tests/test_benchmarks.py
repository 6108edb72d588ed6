"""The official benchmarks, from miniature releases to a table: a tiny model draws, a server that
misbehaves judges. Scores are those of each benchmark's own rule, written down a second time."""

import ast
import importlib
import io
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ranks
import releases
import tiny
import torch
from PIL import Image
from test_foreign import complaint
from test_judges import GOOD, Server
from test_rewards import ocr_folders  # noqa: F401
from transformers import AutoModelForImageTextToText, AutoProcessor

import benchmarks
import benchmarks.drawing as drawing
import benchmarks.judging as judging
import benchmarks.tables as benchmarks_tables
import common.presets as presets_py
import eval as eval_py
import model
import rewards.ocr as ocr_py
import rewards.shared as shared_py
import sample
from benchmarks.judging import score_all
from common.presets import Config
from common.read import to_bucket
from benchmarks.layers import heard
from benchmarks.tables import joined
from rewards.judge import Judge, without_thoughts

ASKED = [n for n in releases.NAMES if hasattr(benchmarks.find(n), "questions")]
assert len(ASKED) == 8


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make(folder)
    return folder


@pytest.fixture
def run(parts, monkeypatch):
    """run(*flags): eval.py on the tiny model -> what results.json says"""
    monkeypatch.setitem(presets_py.PRESETS, "shapes", presets_py.Config(
        **json.loads((parts / "config.json").read_text())))
    monkeypatch.setattr(model, "has_bf16", lambda: False)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(eval_py, "Judge", partial(Judge, timeout=8.0, retries=4, pause=0.01))

    def main(out, *flags):
        flags = ["--init", parts / "sft", "--steps", 1, "--out", out, *flags]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        eval_py.main()
        return json.loads((out / "results.json").read_text())
    return main


@pytest.fixture
def serve():
    servers = []
    yield lambda plan: servers.append(Server(plan)) or servers[-1]
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def says(text):
    return json.dumps(dict(choices=[dict(message=dict(content=text))])).encode()


def usable(text, k):
    """An answer such as the benchmark that asks so wants, another for another k"""
    if "Answer only yes" in text or text.startswith("Prompt: "):
        return ("Yes.", "no")[k % 2]
    if "「" in text:
        return f"<analysis>['a', 'b']</analysis>\n<score>[{k % 2}, 1]</score>"
    if "Aesthetic" in text:
        return f"**Consistency**: {k % 3}\nRealism: 1\nAesthetic Quality: 2"
    if text.startswith("Rate "):
        return f"Brief reasoning: x: y\nPrompt Compliance: {1 + k % 5}\nSeams: 3\nDetail: 5"
    if "You are an artist" in text:
        return f'```json\n{{"score" : [{k % 11}, 9], "reasoning" : "x"}}\n```'
    return f"Because.\n**Final Score:** **{1 if 'logical' in text else 1 + k % 5}**"


def text_of(body):
    return next(p["text"] for p in json.loads(body)["messages"][-1]["content"]
                if p["type"] == "text")


def drawn(out):
    """{picture: when it was written} of what the model has drawn"""
    return {f: f.stat().st_mtime_ns for f in out.rglob("*.png")
            if "SRCIMG" not in f.name and f.name != "sheet.png"}


def well(h, k):
    h.reply(200, says(usable(text_of(h.server.seen[k][1]), k)))


@pytest.mark.parametrize("name", ASKED)
def test_from_release_to_table(name, run, serve, tmp_path, capsys):
    """Drawn, judged by a server that is late, refuses, breaks off and talks nonsense, and joined to
    a table beside the papers' rows. A second run of the same folder draws and asks nothing."""
    replies = [lambda h: h.reply(429, b"", Retry_After="0"), lambda h: h.reply(500, b"oops"),
               lambda h: h.reply(200, says('{"score": [3, I would rather ')),
               lambda h: h.reply(200, GOOD[: len(GOOD) // 2]),
               lambda h: well(h, 4) if name != "wise" else time.sleep(8.3)]
    server = serve(lambda h, k: replies[k](h) if k < len(replies) else well(h, k))
    release, out = releases.write(name, tmp_path / "release"), tmp_path / "out"
    flags = ("--bench", name, "--bench-dir", release, "--judge-url", server.url, "--judge", "m",
             "--max-failed", 1)
    result = run(out, *flags)
    bench = benchmarks.find(name)
    items = bench.items(str(release))
    files = {s.file for s in drawing.shots_of(bench, items, bench.ABOUT.n)}
    assert files == {p.relative_to(out).as_posix() for p in drawn(out)}
    assert {json.loads(line)["file"] for line in open(out / "manifest.jsonl")} == files
    assert result["images"] == len(items) * bench.ABOUT.n and result["judge"] == "m"
    assert result["unparsed"] >= 1 and result["questions"] > result["unparsed"]
    assert 0 < len([*open(out / "results.jsonl")]) == result["images"]
    assert Image.open(out / "sheet.png").width > 200
    said = f"{result['unparsed']} |"
    table = joined([out])
    assert said in table and f"**{name}**" in table and bench.ABOUT.judge in table
    assert "DeepGen 1.0 (RL)" in table
    before, asked = drawn(out), len(server.seen)
    (out / "results.json").unlink()
    again = run(out, *flags)
    assert len(server.seen) - asked == result["unanswered"] <= 1
    assert drawn(out) == before
    assert again["unanswered"] == 0 and again["unparsed"] == result["unparsed"]
    body = json.loads(server.seen[-1][1])["messages"]
    kinds = [p["type"] for p in body[-1]["content"]]
    assert kinds[0 if bench.ABOUT.text_first else -1] == "text" and "image_url" in kinds
    assert (body[0]["role"] == "system") == ("system" in items[0])


@pytest.mark.parametrize("name", ["cvtg", "reconstruction"])
def test_from_release_to_table_without_a_judge(name, run, ocr_folders,  # noqa: F811
                                               tmp_path, monkeypatch):
    """A thin reader, and the classroom's CLIP; --score-only says the same of the same pictures."""
    for part in ("det", "rec"):
        monkeypatch.setitem(shared_py.MODELS, f"ocr-{part}", str(ocr_folders / part))
    monkeypatch.setattr(ocr_py, "text_boxes", lambda p, h, w: [(2, 2, 62, 20), (2, 30, 62, 50)])
    release, out = releases.write(name, tmp_path / "release"), tmp_path / "out"
    result = run(out, "--bench", name, "--bench-dir", release)
    assert result["images"] == (8 if name == "cvtg" else 3) == len(drawn(out))
    assert "judge" not in {k for k in result if result[k]} and 0 <= result["score"] <= 1
    assert {"clip", "ned" if name == "cvtg" else "psnr"} <= result.keys()
    again = run(tmp_path / "again", "--bench", name, "--bench-dir", release, "--score-only", out)
    assert {k: again[k] for k in again if k not in ("score_only", "bench")}.items() <= (
        result.items())
    next(iter(drawn(out))).unlink()
    assert "--n says how many" in complaint(lambda: run(
        tmp_path / "b", "--bench", name, "--bench-dir", release, "--score-only", out))
    assert f"**{name}**" in joined([out])


def test_what_a_release_lacks(run, tmp_path):
    for name in releases.NAMES[:-1]:
        (tmp_path / name).mkdir()
        said = complaint(lambda: run(tmp_path / "out", "--bench", name, "--bench-dir",
                                     tmp_path / name, "--judge-url", "http://localhost:9/v1"))
        assert f"--bench-dir {tmp_path / name} has no " in said, (name, said)
        said = complaint(lambda: run(tmp_path / "out", "--bench", name, "--judge-url",
                                     "http://localhost:9/v1"))
        assert "needs --bench-dir, its official release: " in said
        assert benchmarks.find(name).ABOUT.release in said
    release = releases.write("imgedit", tmp_path / "broken")
    (release / "Benchmark/Basic/basic_edit.json").write_text('{"1": {"id": "animal/0.png"}}')
    assert "is no release of imgedit as it is known here: KeyError, 'prompt'" in complaint(
        lambda: run(tmp_path / "out", "--bench", "imgedit", "--bench-dir", release, "--judge-url",
                    "http://localhost:9/v1"))
    assert not [*tmp_path.glob("out/*.json")]


def test_what_has_no_answer_ends_the_run_and_is_asked_again(run, serve, tmp_path):
    release, out = releases.write("wise", tmp_path / "release"), tmp_path / "out"
    server = serve(lambda h, k: well(h, k) if k != 3 else h.reply(404, b"gone"))
    flags = ("--bench", "wise", "--bench-dir", release, "--judge-url", server.url, "--judge", "m",
             "--parallel", 1)
    said = complaint(lambda: run(out, *flags))
    assert "1 of 7 questions have no answer" in said and "HTTP 404" in said
    assert not (out / "results.json").exists()
    assert run(out, *flags)["unanswered"] == 0 and len(server.seen) == 8


def test_ranks_share_the_drawing_and_one_asks(run, serve, tmp_path):
    """Two draw the pictures of one, each some; one asks, also about pictures that are there, and
    one alone runs the classroom's."""
    server = serve(well)
    release, flags = releases.write("wise", tmp_path / "release"), ["--bench", "wise"]
    flags += ["--bench-dir", release, "--judge-url", server.url, "--judge", "m"]

    def on_two(out, *flags):
        def work():
            with suppress(FileNotFoundError):            # rank 1 does not wait for results.json
                run(out, *flags)
        ranks.together(2, work, tmp_path / f"{out.name} said")
        return json.loads((out / "results.json").read_text())
    one, two = run(tmp_path / "one", *flags), on_two(tmp_path / "two", *flags)
    assert len(server.seen) == one["questions"] + two["questions"]
    alone, shared = ({f.name: np.array(Image.open(f)).astype(int) for f in drawn(tmp_path / out)}
                     for out in ("one", "two"))
    assert alone.keys() == shared.keys()
    assert max(np.abs(alone[f] - shared[f]).max() for f in alone) <= 1
    on_two(tmp_path / "again", *flags, "--score-only", tmp_path / "two")
    assert len(server.seen) == 3 * one["questions"]
    assert on_two(tmp_path / "shapes", "--bench", "shapes", "--n", 1)["images"] == 360


@pytest.mark.parametrize("name", ["dpg", "gedit"])
def test_killed_at_any_moment(name, run, serve, tmp_path):
    """SIGKILL while it draws, and while it asks: what is there is neither drawn nor asked again,
    but for the question that was under way."""
    server = serve(lambda h, k: time.sleep(0.1) or well(h, k))
    release, out = releases.write(name, tmp_path / "release"), tmp_path / "out"
    flags = ("--bench", name, "--bench-dir", release, "--judge-url", server.url, "--judge", "m",
             "--parallel", 1)

    def killed_when(reached):
        if not (child := os.fork()):
            try:
                run(out, *flags)
            finally:
                os._exit(0)
        while not reached():
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert not (out / "results.json").exists()
    killed_when(lambda: len(drawn(out)) == 1)
    before = drawn(out)
    killed_when(lambda: len(server.seen) == 2)
    assert before.items() <= drawn(out).items()
    before = drawn(out)
    killed_when(lambda: len(server.seen) == 4)
    with open(out / "answers.jsonl", "a") as f:                  # cut short while it was written
        f.write('{"key": "ab')
    result = run(out, *flags)
    assert drawn(out) == before and result["unanswered"] == 0
    asked = Counter(body for _, body in server.seen)
    assert result["questions"] <= len(server.seen) <= result["questions"] + 2
    assert len(asked) == result["questions"] and max(asked.values()) <= 3


# ---------------------------------------------------------------------------------------------
# Each benchmark's rule, by hand


class Says:
    """A judge with prepared answers, by question: (id of the item, name of the question)."""
    tokens, system, text_first, error, model = 9, "", False, "", "m"

    def __init__(self, bench, items, answers):
        self.by_text, self.asked = {}, 0
        for item in items:
            for q, (_, text) in bench.questions(item, np.zeros((64, 64, 3), np.uint8)).items():
                self.by_text.setdefault(text, []).append(answers[item["id"], q])

    def name(self):
        return "m"

    def ask_all(self, questions, heard):
        for i, (_, text) in enumerate(questions):
            self.asked += 1
            heard(i, self.by_text[text].pop(0))


def scored(name, tmp_path, answers, n=1):
    """-> metrics, rows, counts of a benchmark whose judge gives these answers"""
    bench = benchmarks.find(name)
    items = bench.items(str(releases.write(name, tmp_path / "release")))
    shots = drawing.shots_of(bench, items, n)
    for i, its in enumerate(drawing.by_file(shots)):
        size = (64, 64) if len(its) == 1 else (128, 64 * -(-len(its) // 2))
        releases.picture(tmp_path / "out" / its[0].file, 1000 + i, size)
    judge = Says(bench, items, answers)
    rows, counts = score_all(bench, shots, tmp_path / "out", judge, tmp_path / "answers.jsonl", 1)
    return bench.table(rows), rows, counts


def test_rule_of_dpg(tmp_path):
    """A question counts where its parents were answered yes; categories before that rule."""
    said = {("a", 1): "no", ("a", 2): "Yes", ("a", 3): "yes, it is", ("b", 1): "Yes."}
    t, rows, _ = scored("dpg", tmp_path, said)
    assert t["score"] == pytest.approx(100 * (0 + 1) / 2)
    assert t["attribute"] == t["relation"] == t["global"] == 100 and t["entity"] == 0
    said["a", 1], said["a", 2] = "yes", "no"
    t, rows, _ = scored("dpg", tmp_path / "2", said)
    assert t["score"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    said["a", 2] = "perhaps"
    t, rows, counts = scored("dpg", tmp_path / "3", said)
    assert counts == dict(questions=4, unparsed=1, unanswered=0)
    assert t["score"] == 100 and "score" not in rows[0]          # what was not scored has no 0
    four = {k: ["yes", "no", "yes", "yes"] for k in said}        # four pictures in one file
    said = {(item, q): v for (item, q), v in four.items()}
    assert len(said) == 4


def test_rule_of_unigenbench(tmp_path):
    def answer(*scores):
        return f"<analysis>['x']</analysis><score>{list(scores)}</score>"
    t, _, _ = scored("unigenbench", tmp_path, {("0", "points"): answer(1, 0),
                                               ("7", "points"): answer(1, 1)})
    assert t["score"] == 75 and t["Style"] == 100 and t["Attribute"] == pytest.approx(200 / 3)
    assert t["dimensions"] == pytest.approx((100 + 200 / 3) / 2)
    for odd in (answer(1), answer(1, 2), "<score>[1, 1]", "<score>[1, 'a']</score>", ""):
        t, _, counts = scored("unigenbench", tmp_path / f"{abs(hash(odd))}", {
            ("0", "points"): odd, ("7", "points"): answer(0, 1)})
        assert counts["unparsed"] == 1 and t["score"] == 50


def test_rule_of_wise(tmp_path):
    marks = {"1": (2, 2, 2), "400": (0, 0, 0), "401": (1, 2, 0), "700": (2, 0, 1), "701": (0, 1, 2),
             "801": (2, 1, 1), "1000": (1, 1, 1)}
    said = {(i, "marks"): f"**Consistency:** {c}\nRealism: {r}\n*Aesthetic Quality*: {a}"
            for i, (c, r, a) in marks.items()}
    t, _, counts = scored("wise", tmp_path, said)
    score = {i: (0.7 * c + 0.2 * r + 0.1 * a) / 2 for i, (c, r, a) in marks.items()}
    parts = [(score["1"] + score["400"]) / 2, *(score[i] for i in ("401", "700", "701", "801",
                                                                  "1000"))]
    assert counts["unparsed"] == 0 and t["culture"] == pytest.approx(0.5)
    assert t["score"] == pytest.approx(sum(w * x for w, x in zip(
        (0.4, 0.167, 0.133, 0.1, 0.1, 0.1), parts)))
    said["801", "marks"] = "Consistency: 2\nRealism: 3"
    t, _, counts = scored("wise", tmp_path / "2", said)
    assert counts["unparsed"] == 1 and "score" not in t and "physics" not in t


def test_rule_of_corebench(tmp_path):
    tasks = benchmarks.find("corebench").TASKS
    said = {(f"{task}-001", i): "no" for task in tasks for i in range(2)}
    said["R-LR-001", 0], said["C-MI-001", 1] = "Yes", '<think>no</think>\n"yes"'
    said["R-HR-001", 0], said["R-HR-001", 1] = "yes", "unsure"   # the answered ones count
    t, _, counts = scored("corebench", tmp_path, said)
    assert counts["unparsed"] == 1 and t["R-HR"] == 100 and t["R-LR"] == t["C-MI"] == 50
    assert t["reasoning"] == pytest.approx(150 / 8) and t["score"] == pytest.approx(200 / 12)


def test_rule_of_imgedit(tmp_path):
    said = {("10", "marks"): "Brief reasoning: good.\nA: 5\nB & C: 4\nD: 4",     # add: 4.33
            ("11", "marks"): "A: 1\nB: 2\nC: 3",                                 # alter: 2
            ("12", "marks"): "A: 3\nB: 3\nC: 3"}                                 # add: 3
    t, _, _ = scored("imgedit", tmp_path, said)
    assert t["add"] == pytest.approx((4.33 + 3) / 2) and t["alter"] == 2
    assert t["score"] == pytest.approx((t["add"] + t["alter"]) / 2)
    said["11", "marks"] = "A: 1\nB: 2\nC: 5."
    t, _, counts = scored("imgedit", tmp_path / "2", said)
    assert counts["unparsed"] == 1 and "alter" not in t


def test_rule_of_gedit(tmp_path):
    said = {("key0", "SC"): '{"score": [4, 9], "reasoning": ""}',
            ("key0", "PQ"): '{"score": [9, 9]}',
            ("key1", "SC"): '{"score": [0, 10]}', ("key1", "PQ"): 'so {"score": 7} it is',
            ("key3", "SC"): '{"score": [8, 8]}', ("key3", "PQ"): '{"score": [2, 5]}'}
    t, _, _ = scored("gedit", tmp_path, said)
    assert t["color_alter"] == pytest.approx((6 + 4) / 2) and t["subject-add"] == 0
    assert t["score"] == pytest.approx(2.5) and t["SC"] == 3 and t["PQ"] == (5.5 + 7) / 2
    for odd in ('{"score": [11, 1]}', '{"score": [1', "[1, 2]", '{"score": "high"}',
                '{"mark": [1]}', '{"score": []}', '{"score": [NaN, 1]}'):
        said["key1", "SC"] = odd
        t, _, counts = scored("gedit", tmp_path / f"{abs(hash(odd))}", said)
        assert counts["unparsed"] == 1 and "subject-add" not in t and t["score"] == 5


@pytest.mark.parametrize("size", [(300, 220), (1024, 1024), (64, 96)])
def test_what_gedit_shows_its_judge(size):
    """Source and edit, each in its own shape, of 512 x 512 pixels."""
    bench, png = benchmarks.find("gedit"), io.BytesIO()
    Image.new("RGB", size, "red").save(png, "PNG")
    asked = bench.questions(dict(source=png.getvalue(), SC="", PQ=""),
                            np.zeros((768, 512, 3), np.uint8))
    (source, edited), (alone,) = asked["SC"][0], asked["PQ"][0]
    assert edited is alone and edited.shape[:2] == (627, 418) and not edited.any()
    (h, w), shape = source.shape[:2], size[0] / size[1]
    assert w == int((512 * 512 * shape) ** 0.5) and h == int((512 * 512 * shape) ** 0.5 / shape)


def test_rule_of_rise(tmp_path):
    """Right is a picture where every mark that applies is 5; of logic marks are 0 or 1."""
    bench = benchmarks.find("rise")
    items = bench.items(str(releases.write("rise", tmp_path / "r")))
    asked = {item["id"]: set(item["asked"]) for item in items}
    three, logical = {"consistency", "reasoning", "quality"}, {"consistency", "reasoning"}
    assert [asked[i["id"]] for i in items] == [three, three, three - {"consistency"}, three, three,
                                               logical, logical]
    assert [re.sub(" .*", "", i["asked"]["reasoning"]) for i in items] == [
        "reasoning", "reasoning_w_input", "reasoning", "spatial_ref_img", "spatial_ref_w_input",
        "logical_txt", "logical_img"]
    assert [i["beside"] for i in items] == [False, True, False, True, True, False, True]
    said = {(i["id"], q): f"**Final Score:** **{1 if 'logical' in i['tag'] else 5}**"
            for i in items for q in i["asked"]}
    said[items[0]["id"], "quality"] = "Final Score: 4"
    said[items[1]["id"], "reasoning"] = "Final Scores: **1**"
    said[items[5]["id"], "consistency"] = "**Final Score**: 0"
    t, rows, _ = scored("rise", tmp_path, said)
    assert t["score"] == pytest.approx(400 / 7) and t["temporal"] == 0 and t["causal"] == 50
    assert t["spatial"] == 100 and t["logical"] == 50
    assert t["consistency"] == pytest.approx(500 / 6) and t["reasoning"] == pytest.approx(600 / 7)
    said[items[5]["id"], "reasoning"] = "Final Score: 5"                        # off its scale
    assert scored("rise", tmp_path / "2", said)[2]["unparsed"] == 1


def test_rule_of_uniredit(tmp_path):
    said = {("0", "consistency"): "Final Score: 5", ("0", "reasoning"): "Final Score: 3",
            ("0", "quality"): "Final Score: 4", ("1", "consistency"): "Final Score: 5",
            ("1", "reasoning"): "Final Score: 5", ("1", "quality"): "Final Score: 5"}
    said |= {("2", q): "Final Score: none" for q in ("consistency", "reasoning", "quality")}
    t, _, _ = scored("uniredit", tmp_path, said)
    mark = 25 * (0.3 * 5 + 0.5 * 3 + 0.2 * 4 - 1)
    assert t["real"] == t["physics"] == pytest.approx(mark) and t["games"] == 100
    assert t["score"] == pytest.approx((mark + 100) / 2) and t["right"] == 50


def test_rule_of_cvtg(monkeypatch, tmp_path):
    bench = benchmarks.find("cvtg")
    items = bench.items(str(releases.write("cvtg", tmp_path)))[:2]
    monkeypatch.setattr(bench, "clip", lambda images, rows: np.array(
        [0.3 if rows[0]["prompt"].startswith("A photo depicts a sign") else 9]))
    lines = iter([["BIG", "sale shop 2"], ["bog"]])
    monkeypatch.setattr(bench, "read_lines", lambda images: [next(lines)])
    shots = drawing.shots_of(bench, items, 1)
    verdicts = bench.measure(shots, [np.zeros((64, 64, 3), np.uint8)] * 2)
    t = bench.table([dict(v, prompt=i["prompt"], tag=i["tag"]) for v, i in zip(verdicts, items)])
    assert [v["score"] for v in verdicts] == [1, 0] and t["score"] == 0.5
    near = [1, 1, 1, 1] + [2 / 3, 0, 0.25, 0]     # big ~ bog; sale, 2: nothing alike; shop ~ bog
    assert t["ned"] == pytest.approx(sum(near) / 8) and t["clip"] == pytest.approx(0.75)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_pictures_in_one_file(tmp_path, n):
    images = [np.full((4, 6, 3), 10 * i, np.uint8) for i in range(1, n + 1)]
    Image.fromarray(drawing.tiled(images)).save(tmp_path / "a.png")
    shots = [drawing.Shot({}, k, k, "a.png") for k in range(n)]
    for a, b in zip(images, judging.pictures_of(None, shots, tmp_path), strict=True):
        assert np.array_equal(a, b)


def test_thoughts_are_no_answers(tmp_path):
    """Neither those behind which an answer stands nor those that were cut off."""
    for said, words in (("<think>Surely no.</think> Yes", "Yes"), ("no, yes?</think>\nNo", "No"),
                        ("<think>I must say yes or no", ""), ("Yes", "Yes")):
        assert without_thoughts(said).strip() == words
    said = {("a", 1): "<think>It may be no", ("a", 2): "<think>no</think> Yes", ("a", 3): "yes",
            ("b", 1): "<think>no</think>Yes."}
    _, _, counts = scored("dpg", tmp_path, said)
    assert counts == dict(questions=4, unparsed=1, unanswered=0)


def test_errors_go_by_what_is_drawn():
    """Equal words about different pictures are not one prompt; pictures of one prompt are."""
    rng = np.random.default_rng(0)
    rows = [dict(tag="t", id=f"{i}", item=f"t/{i}", prompt="remove it", score=x)
            for i, x in enumerate(rng.random(100))]
    _, error = benchmarks_tables.mean(rows, "score")
    assert error == pytest.approx(np.std([r["score"] for r in rows], ddof=1) / 10)
    twice = [dict(r, k=k) for r in rows for k in range(2)]
    assert benchmarks_tables.mean(twice, "score")[1] == pytest.approx(error)


def test_reconstruction(tmp_path, monkeypatch):
    bench = benchmarks.find("reconstruction")
    items = bench.items(str(releases.write("reconstruction", tmp_path)))
    shots = drawing.shots_of(bench, items, 1)
    same = [drawing.source_array(item) for item in items]
    noisy = [np.clip(x.astype(int) + 16 * np.sign(x - 127.5), 0, 255).astype(np.uint8)
             for x in same]
    for pictures, low, high in ((same, 0.9999, 1.0001), (noisy, 0.8, 0.9999), (same[1:], -1, 0.2)):
        rows = bench.measure(shots, pictures)
        t = bench.table([dict(r, item=str(i)) for i, r in enumerate(rows)])
        assert low <= t["score"] <= high and t["clip"] <= 1.0001
    error = np.mean((same[0].astype(float) - noisy[0]) ** 2)
    assert bench.measure(shots[:1], noisy[:1])[0]["psnr"] == pytest.approx(
        10 * np.log10(255**2 / error))
    # What the model is shown of a picture is cut to its size's shape: that, kept, is perfect.
    monkeypatch.setattr(bench, "clip_image", lambda *_: torch.ones(1))       # knows squares alone
    cfg = Config(mmdit=tiny.MMDIT)
    for size in ((300, 220), (100, 160)):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "wide.png")
        shown = to_bucket([Image.fromarray(noise)], cfg)[0].permute(1, 2, 0).numpy()
        shot = drawing.Shot(dict(id="wide", source=tmp_path / "wide.png"), 0, 0, "wide.png")
        assert bench.measure([shot], [shown])[0]["score"] == pytest.approx(1)
    a, b = np.full((32, 32, 3), 100.0), np.full((32, 32, 3), 150.0)    # flat: luminance alone
    assert bench.ssim(a, b) == pytest.approx((2 * 100 * 150 + 6.5025) / (1e4 + 22500 + 6.5025))


# ---------------------------------------------------------------------------------------------
# Tables, layers, and what the page says


def test_tables_join_runs(run, tmp_path, capsys, monkeypatch):
    """Runs of one benchmark stand in one table, others in another; the shapes' figures are those of
    bench_shapes."""
    bench = benchmarks.find("shapes")
    real, found = bench.bench_shapes, []
    monkeypatch.setattr(bench, "bench_shapes", lambda draw, n, png: (
        found.append(real(draw, 1, 6, png)) or found[-1]))
    for name in ("a", "b"):
        result = run(tmp_path / name, "--bench", "shapes", "--seed", int(name == "b"))
        assert found[-1].items() <= result.items()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--table", str(tmp_path / "a"), "--table",
                                      str(tmp_path / "b")])
    capsys.readouterr()
    eval_py.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("**shapes**")
    assert said[2].startswith("| run | world | steps | guidance | n |")
    assert [line.split(" | ")[0] for line in said[4:6]] == [f"| {tmp_path / x}" for x in "ab"]
    assert f"{found[0]['score']:.3f} ± {found[0]['score_se']:.3f}" in said[4]
    nested = {f"guidance {g}": dict(score=g / 10, score_se=0.1, images=5) for g in (1, 3)}
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits/results.json").write_text(json.dumps(dict(bench="shapes-edit") | nested))
    table = joined([tmp_path / "edits"]).splitlines()
    assert [row.split(" | ")[1:] for row in table[4:]] == [["1", "5", "0.100 ± 0.100 |"],
                                                           ["3", "5", "0.300 ± 0.100 |"]]
    (tmp_path / "c").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/results.json").write_text('{"bench": "shapes-vqa", "score": 1}')
    monkeypatch.setattr(sys, "argv", ["eval.py", "--table", str(tmp_path / "old")])
    assert "no benchmark that there is: shapes, geneval" in complaint(eval_py.main)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--table", str(tmp_path / "c")])
    assert "results.json" in complaint(eval_py.main)


def test_published_rows_are_of_benchmarks():
    rows = json.loads(benchmarks_tables.PUBLISHED.read_text())
    assert {r["bench"] for r in rows} == {"geneval", *ASKED, "cvtg"}
    for r in rows:
        assert r.keys() - {"judge"} == {"bench", "model", "paper", "where", "values"}
        assert "score" in r["values"] or "reasoning" in r["values"]


@pytest.mark.parametrize("bridge", ["lim", "scb"])
def test_layers_are_heard_alone(parts, bridge):
    """All of them: the condition as ever. Of lim it is the mean of those of single layers."""
    cfg = presets_py.Config(**json.loads((parts / "config.json").read_text()) | dict(bridge=bridge))
    m = tiny.build(cfg)
    tiny.randomise(m.bridge)
    whole, seen = m.encode(["a red circle", "two"]).ctx, []
    with heard(m, cfg.layers, seen):
        assert torch.equal(m.encode(["a red circle", "two"]).ctx, whole)
    assert seen[0].shape == (3, 2, cfg.n_query, cfg.vlm_dim)
    single = []
    for i in cfg.layers:
        with heard(m, [i]):
            single.append(m.encode(["a red circle", "two"]).ctx)
        assert (single[-1] - whole).abs().max() > 1e-3
    assert torch.equal(m.encode(["a red circle", "two"]).ctx, whole)
    if bridge == "lim":
        torch.testing.assert_close(torch.stack(single).mean(0), whole, atol=1e-5, rtol=1e-5)


def test_descriptions_are_short():
    """Forty lines of code at most: neither blank, nor imports, nor what is said in words."""
    for name in benchmarks.NAMES:
        file = Path(benchmarks.find(name).__file__)
        tree, text = ast.parse(file.read_text()), file.read_text().splitlines()
        said = set()
        for node in ast.walk(tree):
            words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if words or isinstance(node, (ast.Import, ast.ImportFrom)):
                said |= {*range(node.lineno, node.end_lineno + 1)}
        code = [t for i, t in enumerate(text, 1) if t.strip() and i not in said
                and not t.strip().startswith("#")]
        assert len(code) <= (60 if name == "layers" else 40), (name, len(code))


def test_the_page_and_help_name_each(monkeypatch, capsys):
    monkeypatch.syspath_prepend(tiny.ROOT / "docs")
    index = importlib.import_module("index")
    page = (tiny.ROOT / "docs/benchmarks.md").read_text()
    assert index.with_benchmarks(page) == page, "PYTHONPATH=. python docs/index.py"
    monkeypatch.setattr(sys, "argv", ["eval.py", "--help"])
    with pytest.raises(SystemExit):
        eval_py.main()
    said = capsys.readouterr().out
    for name in benchmarks.NAMES:
        about = benchmarks.find(name).ABOUT
        assert f"| `--bench {name}" in page and f"\n  {name} " in said
        assert about.measures in page and about.measures in said and about.judge in said
        assert about.release in page and about.release in said


def test_the_exported_language_model_loads(parts, tmp_path, monkeypatch):
    """What lmms-eval and VLMEvalKit take: a folder for transformers' Auto classes."""
    cfg = presets_py.Config(**json.loads((parts / "config.json").read_text()))
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--init", str(parts / "sft"), "--export",
                                      str(tmp_path / "out")])
    sample.main()
    vlm = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/vlm")
    feed = AutoProcessor.from_pretrained(tmp_path / "out/vlm")
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    x = feed(text=["<|vision_start|><|image_pad|><|vision_end|>a red circle?"], images=[image],
             return_tensors="pt")
    said = vlm.generate(**x, max_new_tokens=3, do_sample=False)
    assert said.shape[1] > x["input_ids"].shape[1]
