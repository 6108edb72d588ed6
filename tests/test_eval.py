"""Judges are tested against the truth: the scene that was rendered, or boxes written by hand."""

import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage

import data.shapes.bench as bench_py
import eval as eval_py
from common.show import grid, mean_and_error, spread
from data.shapes.bench import bench_shapes, seam
from data.shapes.judge import check, evaluate, extra_objects, read_sign, text_match
from data.shapes.captions import sample_meta, scene_for
from data.shapes.world import SHAPES, TAGS, VERSION, place, relation, render
from eval import (Scores, check_scored, held_out_score, main, parse_weights, read_rows,
                  read_weights, score)
from rewards.prompts import read_prompts
from rewards import REWARDS


def thing(name, color="red", x=0, y=0, score=0.9, size=10):
    return dict(color=color, score=score, box=(x, y, x + size, y + size), **{"class": name})


def want(name, count=1, **more):
    return dict(count=count, **more, **{"class": name})


def row(tag, *include, **more):
    return dict(tag=tag, include=list(include), **more)


def torch_images(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def pixels(x):
    return np.clip(x + 0.5, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# GenEval's rule on boxes written by hand


def test_position_rule():
    b = (0, 0, 10, 10)
    assert relation((4, 0, 14, 10), b) == set()           # within the dead zone
    assert relation((4.1, 0, 14.1, 10), b) == {"right of"}
    assert relation(b, (4.1, 0, 14.1, 10)) == {"left of"}
    assert relation(b, b) == set()
    assert relation((20, 20, 30, 30), b) == {"right of", "below"}      # a diagonal is both
    assert relation((0, -20, 10, -10), b) == {"above"}


RED = row("colors", want("ring", color="red"))
ROUND, BOTH = want("circle"), [want("circle"), want("square")]
LEFT = row("position", want("square"), want("circle", position=["left of", 0]))
THREE = row("counting", want("star", 3), exclude=[want("star", 4)])
RED_BLUE = row("color_attr", want("circle", color="red"), want("square", color="blue"))


@pytest.mark.parametrize("name, meta, found, correct, strict, partial", [
    ("single", row("single_object", ROUND), [thing("circle")], 1, 1, 1),
    ("single, absent", row("single_object", ROUND), [], 0, 0, 0),
    ("single, another class", row("single_object", ROUND), [thing("square")], 0, 0, 0),
    ("single, unsure", row("single_object", ROUND), [thing("circle", score=0.5)], 0, 0, 0),
    ("single, one too many", row("single_object", ROUND), [thing("circle")] * 2, 1, 0, 0),
    ("single, five: clipped, not -3", row("single_object", ROUND), [thing("circle")] * 5, 1, 0, 0),
    ("two", row("two_object", *BOTH), [thing("square"), thing("circle")], 1, 1, 1),
    ("two, one missing", row("two_object", *BOTH), [thing("square")], 0, 0, 1 / 2),
    ("counting", THREE, [thing("star")] * 3, 1, 1, 1),
    ("counting, one less", THREE, [thing("star")] * 2, 0, 0, 2 / 3),
    ("counting, one more", THREE, [thing("star")] * 4, 0, 0, 2 / 3),
    ("counting, unsure at 0.7", THREE, [thing("star")] * 2 + [thing("star", score=0.7)],
     0, 0, 2 / 3),
    ("counting, other classes do not count", THREE, [thing("star")] * 3 + [thing("ring")], 1, 1, 1),
    ("colors", RED, [thing("ring")], 1, 1, 1),
    ("colors, wrong", RED, [thing("ring", "blue")], 0, 0, 1 / 2),
    ("colors, absent", RED, [], 0, 0, 0),
    ("colors, the surest decides", RED,
     [thing("ring", "blue", score=0.8), thing("ring", "red", score=0.9)], 1, 0, 0),
    ("colors, one of two", row("colors", want("ring", 2, color="red")),
     [thing("ring"), thing("ring", "blue")], 0, 0, 3 / 4),
    ("color_attr", RED_BLUE, [thing("circle"), thing("square", "blue")], 1, 1, 1),
    ("color_attr, swapped", RED_BLUE, [thing("circle", "blue"), thing("square")], 0, 0, 1 / 2),
    ("position", LEFT, [thing("circle"), thing("square", x=20)], 1, 1, 1),
    ("position, swapped: 0 once", LEFT, [thing("square"), thing("circle", x=20)], 0, 0, 2 / 3),
    ("position, same place", LEFT, [thing("circle"), thing("square")], 0, 0, 2 / 3),
    ("position, no target", LEFT, [thing("circle")], 0, 0, 1 / 3),
    ("position, two targets", LEFT,
     [thing("circle"), thing("square", x=20), thing("square", x=40, score=0.8)], 1, 0, 1 / 3),
    ("position, nothing", LEFT, [], 0, 0, 0),
    ("position waits for its target's colour",
     row("position", want("square", color="blue"), want("circle", position=["left of", 0])),
     [thing("circle"), thing("square", "red", x=20)], 0, 0, 1 / 2),
    ("excluded class", row("two_object", ROUND, exclude=[want("star")]),
     [thing("circle"), thing("star")], 0, 0, 1),
    ("only an excluded class", dict(include=[], exclude=[want("star")]), [], 1, 1, 0),
])  # fmt: skip
def test_geneval_rule(name, meta, found, correct, strict, partial):
    v = evaluate(found[::-1], meta)  # the order of detections does not matter, their scores do
    assert (v["correct"], v["strict"]) == (correct, strict)
    assert v["partial"] == pytest.approx(partial)


def test_thresholds_of_another_detector():
    found = [thing("star", score=0.8)] * 3
    assert evaluate(found, THREE)["correct"] and not evaluate(found, THREE, (0.3, 0.9))["correct"]


def test_extra_objects():
    assert extra_objects([thing("star")] * 3, THREE) == 0
    assert extra_objects([thing("star", score=0.6)] * 4 + [thing("ring")], THREE) == 2
    assert extra_objects([thing("circle")], LEFT) == 0      # a missing object is not an extra one
    assert extra_objects([thing("ring", score=0.4)], LEFT) == 0
    sign = [thing("square", "white"), thing("cross", "black")]
    assert extra_objects(sign, row("text", text="A")) == 0
    assert extra_objects(sign + [thing("ring")], row("text", text="A")) == 1


# ---------------------------------------------------------------------------------------------
# On rendered scenes


def drawn(tag, n, seed=0, unseen=False):
    rng = random.Random(seed)
    metas = [sample_meta(tag, rng, unseen) for _ in range(n)]
    return metas, [render(scene_for(m, rng)) for m in metas]


@pytest.mark.parametrize("tag", [*TAGS, "text", "reason", "scene"])
def test_a_right_scene_is_right(tag):
    for meta, image in zip(*drawn(tag, 60)):
        want = dict(correct=True, strict=True, partial=1, extra=0)
        assert check(image, meta) == want, meta


def test_an_extra_object():
    rng = random.Random(1)
    for tag, correct in [("single_object", True), ("counting", False)]:
        meta, scene = sample_meta(tag, rng), None
        while scene is None:                                     # until there is room for another
            scene = scene_for(meta, rng)
            scene = place([dict(scene[0], size=16)], rng, keep=scene)
        v = check(render(scene), meta)
        assert (v["correct"], v["strict"], v["extra"]) == (correct, False, 1)


def test_swapped_objects():
    rng = random.Random(2)
    meta = sample_meta("position", rng)
    a, b = scene_for(meta, rng)
    v = check(render([dict(a, shape=b["shape"]), dict(b, shape=a["shape"])]), meta)
    assert v == dict(correct=False, strict=False, partial=pytest.approx(2 / 3), extra=0)


def test_nothing_scores_nothing_and_a_collage_is_seen():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    blank = np.stack([np.full((64, 64, 3), c, np.uint8) for c in (0, 90, 128, 255)])
    for tag in [*TAGS, "text"]:
        meta = sample_meta(tag, random.Random(3))
        for image in [*noise, *blank]:
            assert check(image, meta) == dict(correct=False, strict=False, partial=0, extra=0)
    collage = render([dict(shape=s, color="red", size=16, x=2 + 20 * (i % 3), y=2 + 20 * (i // 3))
                      for i, s in enumerate(SHAPES)])
    v = check(collage, sample_meta("two_object", random.Random(4)))
    assert v["correct"] and v["strict"] and v["extra"] == 6      # only `extra` notices


def test_text():
    for read, expect in [("HELLO WORLD", 1), ("Helo World", 0.9), ("", 0), ("x" * 40, 0)]:
        assert text_match(read, "Hello World") == pytest.approx(expect)
    metas, images = drawn("text", 500)
    assert [read_sign(i) for i in images] == [m["text"] for m in metas]
    noise = np.random.default_rng(0).normal(0, 20, (64, 64, 3))
    stretch = (1, 1.06, 1)

    def blur(image):
        return ndimage.gaussian_filter(image.astype(np.float32), (0.8, 0.8, 0))
    for worse in (lambda i: i + noise, blur, lambda i: blur(i) + noise,
                  lambda i: 128 + 0.6 * (i - 128.0), lambda i: np.roll(i, 1, 2) * 1.0,
                  lambda i: ndimage.zoom(i.astype(np.float32), stretch, order=1)):
        right = [read_sign(pixels(worse(i))) == m["text"] for i, m in zip(images[:100], metas)]
        assert np.mean(right) >= 0.97
    assert not any(read_sign(i) for i in drawn("scene", 100)[1])


# ---------------------------------------------------------------------------------------------
# Rewards

MODELLED = {"clip", "clip_direction", "pickscore", "aesthetic", "hpsv2", "preference", "judge",
            "edit", "clip_image", "edit_judge", "edit_model"}    # see test_rewards, test_edit_eval


def test_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    images = torch_images([np.full((512, 512, 3), 128, np.uint8), noise])
    scores = score(images, [{}, {}], {"*": {n: 1 for n in REWARDS if "jpeg" in n}})
    R = scores.values
    assert scores.names == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert R[:, 0].tolist() == pytest.approx([-0.0094, -0.62], rel=0.02)
    assert R[:, 1].tolist() == pytest.approx([4.7, 310], rel=0.02)            # kB


def test_a_reward_that_is_not_finite_has_failed(monkeypatch):
    """One place turns it into NaN, so that it moves nothing and is counted."""
    monkeypatch.setitem(REWARDS, "odd", lambda images, metas: torch.tensor(
        [math.inf, -math.inf, math.nan, 2.0]))
    scores = score(torch_images([np.zeros((64, 64, 3), np.uint8)] * 4), [{}] * 4,
                   {"*": dict(odd=1.0)})
    R, W = scores.values, scores.weights
    assert R[:, 0].isnan().tolist() == [True] * 3 + [False] and R[3, 0] == 2
    assert check_scored(scores, 0.8, 0, "its.jsonl") == dict(reward_odd=2.0, failed_odd=0.75)
    assert held_out_score(scores) == dict(score=2.0)
    assert held_out_score(Scores(R[:3], W[:3], scores.names)) == {}


def test_a_weight_below_0_counts_against():
    """A better policy has a better score, or ckpt/best keeps the worst."""
    R = torch.tensor([[0.2, 0.5], [0.8, 0.5]])
    for weights, want in (([-1.0, 0.0], -0.5), ([1.0, -1.0], 0.0), ([3.0, -1.0], 0.25)):
        W = torch.tensor([weights] * 2)
        assert held_out_score(Scores(R, W, ["f", "g"])) == dict(score=pytest.approx(want))


def test_a_reward_gives_no_gradient(monkeypatch):
    weight = torch.ones((), requires_grad=True)
    monkeypatch.setitem(REWARDS, "net", lambda images, metas: images.float().mean((1, 2, 3))
                        * weight)
    scores = score(torch_images([np.ones((64, 64, 3), np.uint8)] * 2), [{}] * 2,
                   {"*": dict(net=1.0)})
    assert scores.values.tolist() == [[1.0], [1.0]] and not scores.values.requires_grad
    monkeypatch.setitem(REWARDS, "net", lambda images, metas: torch.full(      # nor has it a graph
        (len(images),), float((weight * 2).requires_grad)))
    assert score(torch_images([np.ones((64, 64, 3), np.uint8)]), [{}],
                 {"*": dict(net=1.0)}).values.tolist() == [[0.0]]


def test_an_endpoint_is_at_fault_for_its_own_rewards_alone():
    """Also where images were scored a part at a time."""
    part = Scores(torch.tensor([[math.nan, 1.0]] * 2), torch.ones(2, 2), ["geneval", "judge"],
                  dict(judge=[("yes", 1.0)] * 2), "http://h gave HTTP 500")
    for scores in (part, Scores.cat([part, part])):
        with pytest.raises(SystemExit, match="failed for 100% .* does its.jsonl hold what it"):
            check_scored(scores, 0.5, 0, "its.jsonl")


def mixed(seed=0):
    """Prompts of every tag in groups of two; each third image shows another prompt."""
    metas = [m for tag in [*TAGS, "text"] for m in drawn(tag, 1, seed)[0] for _ in range(2)]
    images = [render(scene_for(m, random.Random(i))) for i, m in enumerate(metas)]
    for i in range(0, len(images), 3):
        images[i] = images[i - 2]
    return torch_images(images), metas


def test_rewards_do_not_depend_on_batch_order_or_dtype():
    images, metas = mixed()
    weights = {"*": dict.fromkeys(REWARDS.keys() - MODELLED, 1.0)}
    scores = score(images, metas, weights)
    R, W, names = scores.values, scores.weights, scores.names
    assert R.shape == W.shape == (len(metas), 5) and R.dtype == torch.float32 and W.all()
    assert 0 < R[:, names.index("geneval")].mean() < 1           # some right, some wrong
    same = dict(rtol=0, atol=0, equal_nan=True)
    floats = score(images / 255, metas, weights).values
    torch.testing.assert_close(floats, R, **same)
    order = torch.randperm(len(metas), generator=torch.Generator().manual_seed(0))
    shuffled = score(images[order], [metas[i] for i in order], weights).values
    torch.testing.assert_close(shuffled, R[order], **same)
    alone = torch.cat([score(images[i : i + 1], metas[i : i + 1], weights).values
                       for i in range(len(metas))])
    torch.testing.assert_close(alone, R, **same)


def test_score_weights():
    images, metas = mixed()
    weights = {"*": {"geneval": 0.8, "ocr": 0.0}, "text": {"ocr": 0.7, "geneval": 0.3},
               "counting": {"jpeg_compressibility": 1.0}}
    scores = score(images, metas, weights)
    R, W = scores.values, scores.weights
    assert scores.names == ["geneval", "ocr", "jpeg_compressibility"]
    tags = [m["tag"] for m in metas]
    for tag, expect in [("colors", [0.8, 0, 0]), ("text", [0.3, 0.7, 0]), ("counting", [0, 0, 1])]:
        i = tags.index(tag)
        assert W[i].tolist() == pytest.approx(expect)
        assert R[i].isnan().tolist() == [w == 0 for w in expect]     # run only where it counts
    metas[0] = dict(metas[0], category="text")                       # category before tag
    assert score(images, metas, weights).weights[0].tolist() == pytest.approx([0.3, 0.7, 0])
    # What cannot be judged is NaN with its weight on, not 0.
    scores = score(images[:2], [{"prompt": "a cat"}, metas[1]], {"*": {"geneval": 1, "ocr": 1}})
    assert scores.values.isnan().tolist() == [[True, True], [False, True]]
    assert scores.weights.all()


def test_score_refuses():
    images, metas = mixed()
    n = len(metas)
    for weights, rows, words in [({"*": {"beauty": 1}}, n, "beauty.*geneval, geneval_strict"),
                                 ({"text": {"ocr": 1}}, n, "single_object"),
                                 ({"*": {"geneval": 1}}, 4, f"{n} images, 4 prompts")]:
        with pytest.raises(ValueError, match=words):
            score(images, metas[:rows], weights)


def test_parse_weights():
    assert parse_weights("geneval") == {"geneval": 1.0}
    assert parse_weights("geneval:0.8, ocr:.2") == {"geneval": 0.8, "ocr": 0.2}
    for text, words in [("beauty", "valid: geneval"), ("geneval:x", "not a number"),
                        ("geneval:nan", "not a number"), ("", "unknown"), ("ocr:0", "is 0"),
                        ("ocr,ocr", "twice")]:
        with pytest.raises(ValueError, match=words):
            parse_weights(text)


# ---------------------------------------------------------------------------------------------
# The benchmark


def test_seams():
    tiles = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((16, 16)))            # a chess board
    board = np.repeat((255 * tiles)[..., None], 3, 2).astype(np.uint8)
    assert seam(board) == 1 and seam(np.roll(board, 8, (0, 1))) < 0 == seam(0 * board)
    assert 0 < seam((board // 255 + 127).astype(np.uint8)) < 0.01


def test_mean_and_error():
    def rows(*names):                                            # "a1" is prompt 1 of tag a
        return [dict(tag=n[0], prompt=n) for n in names]
    values = np.array([[1, 1.0], [0, 0], [1, 0], [1, 1]])
    mean, error = mean_and_error(values, rows("a1", "a2", "a3", "b1"))
    assert mean == pytest.approx((0.5 + 1) / 2)                  # of tags, not of images
    assert error == pytest.approx(math.sqrt(0.25 / 3) / 2)       # prompts are the units: 1, 0, 0.5
    # A prompt that fills two rows is one unit still, not two.
    twice = np.repeat(values[:3], 2, 0)
    names = rows("a1", "a1", "a2", "a2", "a3", "a3")
    assert mean_and_error(twice, names) == pytest.approx((0.5, math.sqrt(0.25 / 3)))
    one = mean_and_error(np.array([[1, 0], [1, 0.0]]), rows("b1", "b1"))
    assert one == pytest.approx((0.5, math.sqrt((1 / 3) / 4)))   # one prompt: its images are


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    rng = random.Random(0)
    rows = {"eval": [sample_meta(t, rng) for t in TAGS for _ in range(5)],
            "unseen": [sample_meta(t, rng, unseen=True) for t in ("colors", "counting")]}
    for name, r in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(m) + "\n" for m in r))
    monkeypatch.setattr(bench_py, "PROMPTS", tmp_path)
    return rows


def test_bench(prompts, tmp_path, capsys, monkeypatch):
    by_prompt = {m["prompt"]: m for split in prompts.values() for m in split}
    drawn = []

    def draw(texts, seeds):                              # a painter who never draws a square right
        drawn.extend(zip(texts, seeds))
        return torch_images([np.full((64, 64, 3), 128, np.uint8) if "square" in t else
                             render(scene_for(by_prompt[t], random.Random(s)))
                             for t, s in zip(texts, seeds)])
    full = bench_shapes(draw, png=tmp_path / "grid.png")
    right = [["square" not in m["prompt"] for m in prompts["eval"] if m["tag"] == t] for t in TAGS]
    assert full["score"] == full["strict"] == pytest.approx(np.mean(right))
    assert full["world"] == VERSION
    assert full["position"] == pytest.approx(np.mean(right[TAGS.index("position")]))
    assert full["images"] == 30 * 4 and full["unseen"]["images"] == 2 * 4
    assert full["unseen"]["counting"] == 1 and full["extra_rate"] == 0
    assert full["score_se"] > 0 and 0 < full["diversity"] < 1 and 0.3 < full["jpeg_kb"] < 5
    assert 0.45 < full["brightness"] < 0.55             # of a ground of 128
    assert len(set(drawn)) == len(drawn) == 128 and (tmp_path / "grid.png").stat().st_size > 1000

    class Painter:
        load = classmethod(lambda cls, *path, **parts: cls())
        to, bf16 = lambda self, device: self, False
        draw = staticmethod(lambda *args: draw(*args[:2]))
    monkeypatch.setattr(eval_py, "Unified", Painter)
    monkeypatch.setattr("sys.argv", ["eval.py", "--out", str(tmp_path / "run")])
    main()                                               # the command line finds the same
    said = capsys.readouterr().out
    assert said.startswith(f"world {VERSION} ") and "extra_rate" in said
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved | full == saved and saved["guidance"] == 1
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"results.json", "samples.png"}

    images = set(drawn)                                  # drawn twice, and the same
    assert len(images) == 128
    drawn.clear()
    quick = bench_shapes(draw, n_per_prompt=1, limit=20)         # 3 of each of six tags
    assert quick["images"] == len(drawn) == 18 and "unseen" not in quick
    assert set(drawn) <= images                                  # the full run's very images
    drawn.clear()
    assert bench_shapes(draw, 1, 20) == quick
    assert spread(prompts["eval"], 2)[:4] == [0, 2, 5, 7]


@pytest.mark.parametrize("row, columns, want", [
    (dict(text="a sign"), "", dict(prompt="a sign")),
    (dict(prompt="a sign", text="OPEN"), "", dict(prompt="a sign", text="OPEN")),
    (dict(mine="a sign", text="OPEN"), "caption=mine", dict(prompt="a sign", text="OPEN")),
    (dict(caption="a sign", text="OPEN"), "caption=caption", dict(prompt="a sign", text="OPEN")),
    (dict(caption="a sign", text="OPEN"), "", dict(prompt="OPEN"))])
def test_a_text_beside_the_prompt_is_of_the_sign(tmp_path, row, columns, want):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (got,) = read_prompts(tmp_path / "p.jsonl", columns)
    assert {k: got[k] for k in ("prompt", "text") if k in got} == want


def test_prompts_that_geneval_cannot_score(tmp_path, capsys):
    """It is said before anything is loaded, not after a rollout; one row with `include` will do."""
    file, rows = tmp_path / "p.txt", partial(read_rows, reward="geneval", photos=True)
    file.write_text("a cat\na dog\n")
    with pytest.raises(SystemExit, match="p.txt: no row has `include`, which the reward geneval"):
        rows(file, {"*": dict(geneval=1.0)})
    assert len(rows(file, {"*": dict(geneval=0.0, jpeg_compressibility=1.0)})) == 2
    assert "p.txt: 2 prompts, the first: 'a cat'" in capsys.readouterr().out


def test_bad_prompt_line(tmp_path):
    for bad in ['{"prompt": ', "[]", "3", '{"tag": "x"}', '{"prompt": "a", "include": [{}]}']:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n' + bad + "\n")
        with pytest.raises(ValueError, match="line 2"):
            read_prompts(tmp_path / "p.jsonl")


def test_grid(tmp_path):
    images = torch.zeros(3, 3, 512, 768, dtype=torch.uint8)
    grid(images, ["a photo of a wide cat " * 20, "", "b"], tmp_path / "a.png", [True, False, None])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]     # no temporary file is left


def test_command_line(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    for argv, words in [(["--bench", "shape"], "there are: shapes"),
                        (["--init", "no/such/folder"], "no/such/folder"),
                        (["--out", str(tmp_path)], "another run"),
                        (["--init", "", "--preset", "flow-grpo"], "'flow-grpo' draws photos"),
                        (["--bench", "wise", "--out", str(tmp_path / "a"), "--bench-dir",
                          str(tmp_path), "--n", "2"], "wise has one picture of each prompt"),
                        (["--ini", "x"], "--ini")]:              # no abbreviations
        monkeypatch.setattr("sys.argv", ["eval.py", *argv])
        with pytest.raises(SystemExit, match=words):
            main()


def test_a_reward_of_a_users_file(tmp_path):
    """file.py:function, mixed with a built-in one; what is wrong with it is said in one line."""
    file = tmp_path / "mine.py"
    file.write_text("def dark(images, rows):\n"
                    "    return 1 - images.float().mean((1, 2, 3)) / 255\n"
                    "def flat(images, rows):\n    return images.float().mean()\n"
                    "def geneval(images, rows):\n    return [0.5] * len(rows)\nconstant = 3\n")
    weights = read_weights(f"{file}:dark:0.25,jpeg_compressibility")
    assert weights == {"*": {f"{file}:dark": 0.25, "jpeg_compressibility": 1.0}}
    images = torch.stack([torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (0, 255)])
    scores = score(images, [{}, {}], weights)
    assert scores.names == ["dark", "jpeg_compressibility"]
    assert scores.values[:, 0].tolist() == [1, 0] and scores.weights[:, 0].tolist() == [0.25] * 2
    assert score(images, [{}, {}], read_weights(f"{file}:geneval")).values.tolist() == [[0.5]] * 2
    with pytest.raises(SystemExit, match="flat' returned .* for 2 images: it must return one"):
        score(images, [{}, {}], read_weights(f"{file}:flat"))
    (tmp_path / "later.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Setting:\n    value: float = 0.5\n"
        "def half(images, rows):\n    return [Setting().value] * len(rows)\n")
    assert score(images, [{}, {}], read_weights(f"{tmp_path}/later.py:half")).values.sum() == 1
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    for text, words in ((f"{file}:bright", "has no 'bright'"),
                        (f"{file}:constant", "has no 'constant'"),
                        (f"{tmp_path}/gone.py:f", "there is no file"),
                        (f"{broken}:f", "cannot be loaded, ModuleNotFoundError"),
                        (f"{file}:dark,{file}:dark", "'dark' is given twice"),
                        (f"geneval,{file}:geneval", "'geneval' is given twice")):
        with pytest.raises(ValueError, match=words):
            parse_weights(text)
    (tmp_path / "other.py").write_text("def dark(images, rows):\n    return [0.0]\n")
    with pytest.raises(ValueError, match="'.*mine.py:dark' and '.*other.py:dark' have one name"):
        read_weights(json.dumps({"text": f"{file}:dark", "*": f"{tmp_path}/other.py:dark"}))
    assert read_weights(json.dumps({"text": f"{file}:dark:2", "*": f"{file}:dark"}))


def test_a_short_name_is_a_whole_name():
    """cycle_edit.py's `judge` stands for edit_judge, and no part of another name for anything."""
    short = dict(cycle="clip:4,clip_image:1", judge="edit_judge")
    assert read_weights("cycle,jpeg_compressibility:0.5", short)["*"] == dict(
        clip=4.0, clip_image=1.0, jpeg_compressibility=0.5)
    assert read_weights(" judge:2", short) == read_weights("edit_judge:2", short)
    with pytest.raises(ValueError, match="judge.py:cycle: there is no file judge.py"):
        read_weights("judge.py:cycle", short)
