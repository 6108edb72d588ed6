"""GenEval on real images: the real classes, small and random, against slow and separate arithmetic;
the rule against a second writing of it; prompts, folders and everything a user can get wrong."""

import hashlib
import json
import random
import sys
from types import SimpleNamespace
from collections import Counter

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import complaint
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

import common.presets as presets_py
import benchmarks.drawing as drawing_py
from benchmarks import geneval as bench_py
from benchmarks.judging import score_all
import eval as eval_py
import model
import rewards.geneval as geneval_py
import rewards.photos as photos_py
from data.shapes.judge import evaluate
from data.shapes.captions import article
from data.shapes.world import COLORS, MASKS, PALETTE, RELATIONS, TAGS, render
from eval import score
from rewards.prompts import geneval_prompts, read_prompts
from rewards.geneval import check
from rewards.photos import COCO_THRESHOLDS, mask2former
from rewards.prompts import COCO


# ---------------------------------------------------------------------------------------------
# The rule, with GenEval's thresholds


def thing(name, x=0, y=0, color="red", score=0.95, size=10):
    return dict(color=color, score=score, box=(x, y, x + size, y + size), **{"class": name})


def row(tag, *include, **more):
    """include: (class, count, color or [relation, target])"""
    groups = []
    for name, count, *extra in include:
        groups.append({"class": name, "count": count})
        for e in extra:
            groups[-1]["position" if isinstance(e, list) else "color"] = e
    return dict(tag=tag, include=groups, **more)


DOG_CAT = row("position", ("cat", 1), ("dog", 1, ["below", 0]))
TWO_CUPS = row("counting", ("cup", 2), exclude=[{"class": "cup", "count": 3}])


@pytest.mark.parametrize("name, meta, found, correct", [
    ("just unsure", row("single_object", ("cat", 1)), [thing("cat", score=0.3)], False),
    ("just sure", row("single_object", ("cat", 1)), [thing("cat", score=0.301)], True),
    ("counting asks for more", TWO_CUPS, [thing("cup"), thing("cup", score=0.9)], False),
    ("what counting doubts is not there", TWO_CUPS,
     [thing("cup"), thing("cup"), thing("cup", score=0.9)], True),
    ("a third cup that is sure", TWO_CUPS, [thing("cup")] * 3, False),
    ("the surest dog decides, right", DOG_CAT,
     [thing("cat"), thing("dog", y=30), thing("dog", y=-30, score=0.5)], True),
    ("the surest dog decides, wrong", DOG_CAT,
     [thing("cat"), thing("dog", y=-30), thing("dog", y=30, score=0.5)], False),
    ("the surest cat is the target", DOG_CAT,
     [thing("cat", y=60, score=0.5), thing("cat"), thing("dog", y=30)], True),
    ("above is not below", DOG_CAT, [thing("cat"), thing("dog", y=-30)], False),
    ("a diagonal is both", DOG_CAT, [thing("cat"), thing("dog", x=30, y=30)], True),
    ("both dogs must be below", row("position", ("cat", 1), ("dog", 2, ["below", 0])),
     [thing("cat"), thing("dog", y=30), thing("dog", x=30)], False),
    ("of both cats", row("position", ("cat", 2), ("dog", 1, ["below", 0])),
     [thing("cat"), thing("cat", y=30), thing("dog", y=20)], False),
    ("colours exchanged", row("color_attr", ("cat", 1, "red"), ("dog", 1, "blue")),
     [thing("cat", color="blue"), thing("dog")], False),
    ("one class missing of color_attr", row("color_attr", ("cat", 1, "red"), ("dog", 1, "blue")),
     [thing("cat")], False),
])  # fmt: skip
def test_rule(name, meta, found, correct):
    assert evaluate(found[::-1], meta, COCO_THRESHOLDS)["correct"] == correct


def related(rel, a, b):
    """A second writing of the position rule, in arrays."""
    a, b = (np.array(t["box"], float).reshape(2, 2) for t in (a, b))
    offset, reach = a.mean(0) - b.mean(0), 0.1 * (np.ptp(a, 0) + np.ptp(b, 0))
    free = np.where(np.abs(offset) > reach, offset - np.sign(offset) * reach, 0)
    if np.abs(free).max() < 1e-3:
        return False
    axis, sign = dict(zip(RELATIONS, [(0, -1), (0, 1), (1, -1), (1, 1)]))[rel]
    return free[axis] * sign > 0.5 * np.linalg.norm(offset)


def official(found, meta):
    """A second writing of evaluate_images.py's rule."""
    least = 0.9 if meta["tag"] == "counting" else 0.3
    best = {name: sorted((t for t in found if t["class"] == name and t["score"] > least),
                         key=lambda t: t["score"], reverse=True) for name in COCO}
    right, kept = True, []
    for want in meta["include"]:
        mine = best[want["class"]][:want["count"]]
        good = len(mine) == want["count"]
        if good and "color" in want:
            good = all(t["color"] == want["color"] for t in mine)
        if good and "position" in want:
            rel, k = want["position"]
            good = kept[k] is not None and all(related(rel, a, b) for a in mine for b in kept[k])
        kept.append(mine if good else None)
        right = right and good
    for no in meta.get("exclude", []):
        right = right and len(best[no["class"]]) < no["count"]
    return right


def test_rule_against_a_second_writing():
    rng, outcomes = random.Random(0), Counter()
    lines = list(map(json.loads, eval_py.geneval_prompts()))
    for _ in range(6000):
        meta = rng.choice(lines)
        names = [w["class"] for w in meta["include"]] * 2 + ["zebra"]
        colors = [w.get("color", "red") for w in meta["include"]] + ["white"]
        found = [thing(rng.choice(names), rng.randint(0, 40), rng.randint(0, 40),
                       rng.choice(colors), rng.choice([0.2, 0.8, 0.91, 0.92, 0.93, 0.94])
                       + rng.random() / 100, rng.randint(4, 30)) for _ in range(rng.randint(0, 5))]
        correct = evaluate(found, meta, COCO_THRESHOLDS)["correct"]
        assert correct == official(found, meta), (meta, found)
        outcomes[meta["tag"], correct] += 1
    assert len(outcomes) == 12 and min(outcomes.values()) >= 25, outcomes


# ---------------------------------------------------------------------------------------------
# Mask2Former


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """A folder like the Hub's: written before transformers 5, with index tables and without the
    backbone's last norm."""
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4,
                      out_features=[f"stage{i}" for i in range(1, 5)])
    net = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, num_attention_heads=2, encoder_layers=1,
        decoder_layers=2, num_queries=60, num_labels=80))
    torch.manual_seed(38)         # a net on which the cases below occur, however it was built
    for name, p in net.named_parameters():
        if p.ndim > 1 and "sampling_offsets" not in name:
            p.data.normal_(0, p[0].numel() ** -0.5)
    masks = net.model.pixel_level_module.decoder.mask_projection    # masks of every size, sharp
    masks.weight.data.normal_(0, 12 * 32**-0.5)
    masks.bias.data.normal_(0, 8)
    net.class_predictor.weight.data.normal_(0, 12 * 32**-0.5)       # sure of few classes
    net.class_predictor.bias.data[80] = 33                          # "nothing" is often likely
    folder = tmp_path_factory.mktemp("mask2former")
    net.save_pretrained(folder)
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items()
               if "swin.layernorm" not in k}
    assert len(tensors) == len(net.state_dict()) - 2
    for k in [k for k in tensors if k.endswith("self.relative_position_bias_table")]:
        tensors[k.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def real(detector, monkeypatch):
    """The real path with small parts: the tiny detector, the classroom's CLIP."""
    monkeypatch.setattr(photos_py, "DETECTOR", str(detector))
    monkeypatch.setattr(photos_py, "COLOR_CLIP", (f"local-dir:{tiny.ROOT}/data/shapes/clip", None))


@pytest.fixture
def small(real, monkeypatch):
    """The same at 96 pixels in place of 800, where only speed matters."""
    see = mask2former(photos_py.DETECTOR)[0]
    monkeypatch.setattr(see, "size", type(see.size)(shortest_edge=96, longest_edge=160))


def blocks(h, w, seed, side=10):
    """An image of random coloured blocks."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (-(-h // side), -(-w // side), 3), dtype=np.uint8)
    return np.kron(colors, np.ones((side, side, 1), np.uint8))[:h, :w]


def weights_of(n, m):
    """(n,m): each of n outputs is a mix of two of m inputs, pixel centres aligned."""
    A = np.zeros((n, m))
    for i in range(n):
        at = max((i + 0.5) * m / n - 0.5, 0)
        k = int(at)
        A[i, k] += 1 - (at - k)
        A[i, min(k + 1, m - 1)] += at - k
    return A


def slow_detect(names, masks, seen, padded, size):
    """names (Q,81), masks (Q,h,w) logits -> [(score, class, mask)], best first, in float64."""
    found = []
    A, B = weights_of(padded[0], masks.shape[1]), weights_of(padded[1], masks.shape[2])
    C, D = weights_of(size[0], seen[0]), weights_of(size[1], seen[1])
    for logits, mask in zip(names.astype(float), masks.astype(float)):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        full = C @ (A @ mask @ B.T)[:seen[0], :seen[1]] @ D.T
        if (full > 0).any():
            sure = np.mean(1 / (1 + np.exp(-full[full > 0])))
            found += [(p[k] * sure, k, full > 0) for k in range(80) if p[k] * sure > 0.3]
    found.sort(key=lambda f: -f[0])
    taken = Counter()
    for f in found:
        taken[f[1]] += 1
        if taken[f[1]] <= 16:
            yield f


def test_detector_against_slow_arithmetic(real):
    """Padding, both resizes, thresholds, the 16 best: at the real 800 and 1333 pixels."""
    see, net = mask2former(photos_py.DETECTOR)
    kept, everything = [], []
    hook = net.register_forward_hook(lambda m, a, kw, out: kept.append((kw["pixel_values"], out)),
                                     with_kwargs=True)
    for (H, W), seen, padded in [((64, 90), (800, 1125), (800, 1152)),
                                 ((120, 30), (1333, 333), (1344, 352))]:
        images = np.stack([blocks(H, W, 0)])
        (found,) = photos_py.detect_coco(images)
        x, out = kept.pop()
        assert x.shape[2:] == padded
        # The network sees the picture, resized, in ImageNet's units, and zeros to the right, below.
        big = np.array(Image.fromarray(images[0]).resize(seen[::-1], Image.BILINEAR)) / 255
        big = (big - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        part = x[0, :, :seen[0], :seen[1]].permute(1, 2, 0).numpy()
        assert np.abs(part - big).max() < 3 / 255 / 0.22 and np.abs(part - big).mean() < 0.01
        assert not x[0, :, seen[0]:].any() and not x[0, :, :, seen[1]:].any()
        slow = list(slow_detect(out.class_queries_logits[0].numpy(),
                                out.masks_queries_logits[0].numpy(), seen, padded, (H, W)))
        assert [f["class"] for f in found] == [COCO[k] for _, k, _ in slow]
        for f, (s, _, mask) in zip(found, slow):
            assert f["score"] == pytest.approx(s, abs=2e-4)
            ys, xs = np.nonzero(mask)
            assert np.mean(f["mask"] != mask) < 1e-3
            assert np.abs(np.subtract(f["box"], (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
                          ).max() <= (f["mask"] != mask).any()
        everything += found
    hook.remove()
    scores = np.array([f["score"] for f in everything])
    shares = np.array([f["mask"].mean() for f in everything])
    # The cases that matter did occur.
    assert (scores > 0.9).sum() >= 3 and ((scores > 0.3) & (scores < 0.9)).sum() >= 10
    assert 16 in Counter(f["class"] for f in found).values()
    assert (shares < 0.2).sum() >= 5 and (shares > 0.5).sum() >= 2


def test_a_photo_is_judged_by_what_is_detected(small):
    """Counts, thresholds and places of the verdict are those of the detections."""
    image = blocks(64, 64, 1)
    (found,) = photos_py.detect_coco(image[None])
    sure = Counter(f["class"] for f in found if f["score"] > 0.9)
    seen = Counter(f["class"] for f in found)
    name = next(k for k in seen if 2 <= seen[k] and 1 <= sure[k] < seen[k])
    n = sure[name]

    def count(n):
        return row("counting", (name, n), exclude=[{"class": name, "count": n + 1}], prompt="")
    assert check(image, count(n)) == dict(correct=True, strict=True, partial=1,
                                          extra=len(found) - n)
    assert not check(image, count(n + 1))["correct"]               # the unsure do not count ...
    v = check(image, row("two_object", (name, seen[name])))
    assert v["strict"] and v["extra"] == len(found) - seen[name]   # ... outside `counting`, they do
    absent = next(c for c in COCO if c not in seen)
    v = check(image, row("two_object", (name, seen[name]), (absent, 1)))
    assert not v["correct"] and v["partial"] == 0.5


def test_rewards_of_both_worlds_in_one_batch(small):
    """A prompt's classes choose its detector; neighbours and float images change nothing."""
    photos = [blocks(64, 64, s) for s in (1, 2)]
    found = photos_py.detect_coco(np.stack(photos))
    metas = [row("two_object", (f[0]["class"], sum(g["class"] == f[0]["class"] for g in f)))
             for f in found]
    metas.insert(1, row("single_object", ("star", 1)))
    images = [photos[0], render([dict(shape="star", color="red", size=20, x=20, y=20)]), photos[1]]
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    weights = {"*": {"geneval": 1, "geneval_strict": 1}}
    assert score(images, metas, weights).values.tolist() == [[1, 1]] * 3
    assert score(images / 255, metas, weights).values.tolist() == [[1, 1]] * 3
    swapped = score(images.flip(0), metas, weights).values
    assert swapped[1].tolist() == [1, 1] and swapped[:, 1].tolist() == [0, 1, 0]
    bare = score(images, [{"prompt": "a cat"}, *metas[1:]], weights).values
    assert bare[0].isnan().all() and bare[1:].tolist() == [[1, 1]] * 2


def test_photos_keep_their_places(monkeypatch):
    """Twenty photos among other prompts, eight at a time: each gets its own verdict."""
    sizes = []

    def judged(images, metas):
        sizes.append(len(images))
        assert all(m["k"] == x[0, 0, 0] for x, m in zip(images, metas))
        return [dict(partial=m["k"] / 100) for m in metas]
    monkeypatch.setattr(geneval_py, "check_photos", judged)
    metas = [dict(row("single_object", ("cat", 1)), k=k) if k % 3 else dict(k=k) for k in range(30)]
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 3, 64, 64)
    R = geneval_py.geneval(images, metas)
    assert sizes == [8, 8, 4] and R.isnan().tolist() == [k % 3 == 0 for k in range(30)]
    assert all(R[k] == pytest.approx(k / 100) for k in range(30) if k % 3)


def test_nothing_detected(small, monkeypatch):
    """No query above the threshold: no objects, and nothing breaks."""
    net = mask2former(photos_py.DETECTOR)[1]
    monkeypatch.setitem(net.class_predictor._parameters, "bias", torch.nn.Parameter(
        torch.cat([torch.zeros(80), torch.full((1,), 1e3)])))
    image = blocks(64, 64, 1)
    assert photos_py.detect_coco(image[None]) == [[]]
    v = check(image, row("colors", ("cat", 1, "red")))
    assert v == dict(correct=False, strict=False, partial=0, extra=0)


def test_a_detector_that_does_not_fit(detector, tmp_path):
    tensors = load_file(detector / "model.safetensors")
    (tmp_path / "config.json").write_text((detector / "config.json").read_text())
    save_file({k: v for k, v in tensors.items() if k != "class_predictor.bias"},
              tmp_path / "model.safetensors", {"format": "pt"})
    assert "class_predictor.bias" in complaint(mask2former, str(tmp_path))
    config = json.loads((detector / "config.json").read_text())
    config["id2label"] = {str(i): str(i) for i in range(79)}
    config["label2id"] = {str(i): i for i in range(79)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({k: v[:80] if "class_predictor" in k else v[:80] if "empty" in k else v
               for k, v in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "knows 79 classes, not COCO's 80" in complaint(mask2former, str(tmp_path))


# ---------------------------------------------------------------------------------------------
# Colours


def painted(shape, color, x, y, image, size=24):
    """Puts a shape into an image -> what a detector would say of it, but for the colour."""
    inside = MASKS[shape, size][:, :, 0] > 0.5
    mask = np.zeros(image.shape[:2], bool)
    mask[y : y + size, x : x + size] = inside
    image[mask] = PALETTE[color]
    return dict(score=0.9, box=(x, y, x + size, y + size), mask=mask, **{"class": shape})


def test_colors_against_slow_arithmetic(real):
    clip, _, prepare = open_clip.create_model_and_transforms(photos_py.COLOR_CLIP[0])
    words = open_clip.get_tokenizer(photos_py.COLOR_CLIP[0])
    names, truth = [], []
    rng = random.Random(0)
    for k, color in enumerate(COLORS * 2):
        shape = ("square", "circle")[k // 10]
        image = blocks(80, 120, k)                     # loud, but none of it is the thing
        things = [painted(shape, color, rng.randint(0, 30), rng.randint(0, 50), image),
                  painted(shape, rng.choice(COLORS), rng.randint(60, 90), 40, image)]
        photos_py.name_colors(image, things)
        truth.append(color)
        names.append(things[0]["color"])
        with torch.no_grad():
            about = []
            for c in COLORS:
                texts = [f"a photo of a {c} {shape}", f"a photo of a {c}-colored {shape}",
                         f"a photo of a {c} object"]
                e = [clip.encode_text(words([t]))[0] for t in texts]
                about.append(sum(v / v.norm() for v in e) / 3)
            for t in things:
                x0, y0, x1, y1 = t["box"]
                crop = Image.new("RGB", (x1 - x0, y1 - y0), "#999")
                for y in range(y0, y1):
                    for x in range(x0, x1):
                        if t["mask"][y, x]:
                            crop.putpixel((x - x0, y - y0), tuple(map(int, image[y, x])))
                v = clip.encode_image(prepare(crop)[None])[0]
                fits = torch.stack([v @ a / a.norm() for a in about])
                assert t["color"] == COLORS[fits.argmax()]
    # The classroom's CLIP never saw a thing alone on #999; by chance it would name a tenth.
    assert np.mean([a == b for a, b in zip(names, truth)]) >= 0.5, list(zip(truth, names))


def test_colors_of_a_photo(real, monkeypatch):
    """Only asked colours are named, of every thing of that class; the verdict follows them. (Things
    and words are those that the classroom's CLIP knows.)"""
    image, asked = np.full((64, 64, 3), 90, np.uint8), []
    a, b, c = (painted(*about, image, size=16) for about in [
        ("square", "green", 4, 4), ("circle", "pink", 36, 4), ("circle", "purple", 36, 40)])
    found, name_colors = [a, b], photos_py.name_colors
    monkeypatch.setattr(photos_py, "detect_coco", lambda images: [
        [dict(t) for t in found] for _ in images])
    monkeypatch.setattr(photos_py, "name_colors", lambda image, things: (
        asked.extend(t["class"] for t in things), name_colors(image, things)))

    def judged(tag, *include):
        return photos_py.check_photos(image[None], [row(tag, *include)])[0]
    assert judged("two_object", ("square", 1), ("circle", 1))["strict"] and asked == []
    assert judged("colors", ("square", 1, "green"))["strict"] and asked == ["square"]
    assert judged("color_attr", ("square", 1, "green"), ("circle", 1, "pink"))["strict"]
    v = judged("color_attr", ("square", 1, "pink"), ("circle", 1, "green"))
    assert not v["correct"] and v["partial"] == 0.5
    found.append(dict(c, score=0.8))                 # less sure: the rule ignores it, partial not
    asked.clear()
    v = judged("colors", ("circle", 1, "pink"))
    assert v["correct"] and not v["strict"] and v["partial"] == 0 and asked == ["circle"] * 2
    assert judged("colors", ("circle", 2, "pink"))["partial"] == 0.75
    for thing in found:                              # as a file of detections may have it
        thing["color"] = None
    assert judged("colors", ("square", 1, "green"))["strict"]


def test_a_sign_is_the_classrooms_alone():
    """Its reader knows 64 x 64 pixels: of a photo the reward says nothing, which is not 0."""
    sign = dict(prompt="HAT", include=[], text="HAT")
    small, large = (geneval_py.geneval(torch.zeros(1, 3, side, side, dtype=torch.uint8), [sign])
                    for side in (64, 512))
    assert small.item() == 0 and large.isnan().all()


def test_the_real_clip_has_its_gelu():
    name, tag = photos_py.COLOR_CLIP
    assert open_clip.get_model_config(name)["quick_gelu"]
    assert tag == "openai" and tag in open_clip.list_pretrained_tags_by_model(name)


def test_names_are_cocos_with_three_renamed():
    """By index: the checkpoint's own names are mmdet's (tvmonitor, sofa, ...)."""
    assert len(COCO) == len(set(COCO)) == 80
    for i, name in {0: "person", 3: "motorcycle", 4: "airplane", 10: "fire hydrant", 38:
                    "tennis racket", 57: "couch", 58: "potted plant", 60: "dining table", 62: "tv",
                    64: "computer mouse", 65: "tv remote", 66: "computer keyboard", 67:
                    "cell phone", 79: "toothbrush"}.items():
        assert COCO[i] == name


# ---------------------------------------------------------------------------------------------
# Prompts


def test_test_prompts(tmp_path, capsys):
    path = tmp_path / "test.jsonl"
    eval_py.write_prompts("geneval", str(path))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")
    assert "553 prompts" in capsys.readouterr().out
    assert Counter(r["tag"] for r in read_prompts(path)) == dict(zip(TAGS, (
        80, 99, 80, 94, 100, 100)))


@pytest.fixture(scope="session")
def training(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    eval_py.write_prompts("geneval-train", str(path))
    return path


def swaps(r):
    """The words of a test prompt and of everything that is the same pair in another order."""
    a, b = (r["include"] * 2)[:2]
    x, y = (article(w["class"]) for w in (a, b))
    if r["tag"] == "two_object":
        return {f"{x} and {y}", f"{y} and {x}"}
    if r["tag"] == "position":
        return {f"{p} {rel} {q}" for rel in RELATIONS for p, q in ((x, y), (y, x))}
    if r["tag"] == "color_attr":
        pairs = [(article(f"{c} {a['class']}"), article(f"{d} {b['class']}"))
                 for c, d in ((a["color"], b["color"]), (b["color"], a["color"]))]
        return {f"{p} and {q}" for pair in pairs for p, q in (pair, pair[::-1])}
    return {r["prompt"].removeprefix("a photo of ")}


def test_training_prompts(training):
    rows = read_prompts(training)
    assert len(rows) == 50_000
    tags = Counter(r["tag"] for r in rows)
    for tag, share in dict(position=7, counting=5, color_attr=3, colors=1, two_object=1).items():
        assert abs(tags.pop(tag) - 50_000 * share / 17) <= 7
    assert not tags                                              # no single_object
    words = {r["prompt"] for r in rows}
    tested = [swaps(json.loads(line)) for line in eval_py.geneval_prompts()]
    assert sum(map(len, tested)) > 1500
    assert not words & {f"a photo of {t}" for ts in tested for t in ts}
    assert len({r["prompt"] for r in rows if r["tag"] == "counting"}) == 240 - 80   # all others
    for r in rows[::50]:
        assert not any(w["class"] == "person" and "color" in w for w in r["include"])
        if r["tag"] == "position":
            b, a = r["include"]
            assert r["prompt"] == (f"a photo of {article(a['class'])} {a['position'][0]} "
                                   f"{article(b['class'])}") and a["position"][1] == 0
    first = Counter(r["tag"] for r in rows[:5000])               # shuffled: any part is a sample
    assert abs(first["position"] / 5000 - 7 / 17) < 0.03
    assert hashlib.sha256(training.read_bytes()).hexdigest() == (        # and always the same
        "e9143143f00c7c823e3c27fcc91518a2fafe492726a1e86ab95f5579ce2bb359")


def test_prompts_of_ones_own(tmp_path):
    """--bench-dir; the official ones are written as GenEval has them, byte for byte."""
    assert "".join(item["line"] for item in bench_py.items("")) == "".join(geneval_prompts())
    mine = dict(tag="counting", include=[{"class": "cat", "count": 2}], prompt="two cats")
    (tmp_path / "p.jsonl").write_text(json.dumps(mine) + "\n")
    (item,) = bench_py.items(tmp_path / "p.jsonl")
    assert mine.items() <= item.items() and item["id"] == "00000"
    (tmp_path / "p.jsonl").write_text('{"prompt": "two cats"}\n')
    with pytest.raises(ValueError, match="'two cats' has no tag or include"):
        bench_py.items(tmp_path / "p.jsonl")


def test_write_prompts_refuses(tmp_path, monkeypatch):
    old = tmp_path / "old.jsonl"
    old.write_text("mine")
    for argv, words in [(["geneval", old], "exists"), (["geneva", tmp_path / "x"], "geneval-train"),
                        (["geneval"], "and a file"), ([], "takes one of"),
                        (["geneval", tmp_path / "no/x"], "no folder"),
                        (["geneval", tmp_path / "x", "--seed"], "takes one of")]:
        monkeypatch.setattr(sys, "argv", ["eval.py", "--write-prompts", *map(str, argv)])
        assert words in complaint(eval_py.main)
    assert old.read_text() == "mine" and list(tmp_path.iterdir()) == [old]


def test_training_on_geneval_is_measured_by_its_test(small, parts, training, tmp_path, monkeypatch):
    """Of photos; not where another reward is trained, nor by a test prompt that is trained, too."""
    monkeypatch.setitem(presets_py.PRESETS, "photos", presets_py.Config(
        **json.loads((parts / "config.json").read_text()) | dict(preset="photos")))
    tests = list(map(json.loads, eval_py.geneval_prompts()))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(training.read_text().splitlines(True)[:3]) + json.dumps(tests[0]) + "\n")
    seen, real = [], eval_py.score

    def score(*inputs):
        seen.append(inputs)
        return real(*inputs)
    monkeypatch.setattr(eval_py, "score", score)
    flags = ["--preset", "photos", "--init", parts / "dit", "--steps", 1, "--prompts", few,
             "--B", 2, "--G", 2]
    log = tiny.play(parts, tmp_path / "a", *flags, "--reward", "geneval")
    looks = [inputs[1] for inputs in seen if not any("group" in m for m in inputs[1])]
    assert len(looks) == 2 and len(looks[0]) == 16 and looks[0] == looks[1]
    assert all(m in tests[1:] for m in looks[0]) and {m["tag"] for m in looks[0]} == {*TAGS}
    assert all(0 <= r["score"] <= 1 for r in log)
    log = tiny.play(parts, tmp_path / "b", *flags, "--reward", "jpeg_incompressibility")
    assert not any("score" in r for r in log)


# ---------------------------------------------------------------------------------------------
# The benchmark's folders


def four(monkeypatch):
    """GenEval of four prompts, one per line."""
    lines = eval_py.geneval_prompts()
    lines = [lines[i] for i in (0, 200, 300, 500)]
    monkeypatch.setattr(bench_py, "geneval_prompts", lambda: lines)
    return lines


class Painter(drawing_py.Tested):
    """Who draws blocks, another for each seed."""

    def __init__(self, log, recipe):
        self.args, self.log, self.drawn = SimpleNamespace(seed=5), log, recipe

    def draw(self, prompts, numbers):
        seeds = self.keys(numbers)
        self.log.extend(zip(prompts, seeds))
        return torch.from_numpy(np.stack([blocks(64, 64, s) for s in seeds])).permute(0, 3, 1, 2)

    def recipe(self):
        return self.drawn


def test_folders_and_resume(tmp_path, monkeypatch):
    lines, drawn = four(monkeypatch), []
    recipe = dict(size=64, steps=3, guidance=1.5)

    def draw(out, rank=0, world=1, **changes):
        drawn.clear()
        drawing_py.draw_all(bench_py, bench_py.items(""), 4, Painter(drawn, recipe | changes), out,
                            rank, world)
    out = tmp_path / "a"
    draw(out)
    names = {f"{i:05d}/samples/{j:04d}.png" for i in range(4) for j in range(4)}
    names |= {f"{i:05d}/metadata.jsonl" for i in range(4)} | {"manifest.jsonl"}
    files = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert files.keys() == names                                 # no temporary file is left
    plan = [json.loads(line) for line in (out / "manifest.jsonl").open()]
    assert [(p["prompt"], p["seed"]) for p in plan] == drawn and len(set(drawn)) == 16
    for k, p in enumerate(plan):
        assert p == recipe | dict(file=f"{k // 4:05d}/samples/{k % 4:04d}.png", seed=p["seed"],
                                  prompt=json.loads(lines[k // 4])["prompt"])
        assert np.array_equal(Image.open(out / p["file"]), blocks(64, 64, p["seed"]))
    assert [(out / f"{i:05d}/metadata.jsonl").read_text() for i in range(4)] == lines

    draw(out)                                                    # all is there
    assert drawn == []
    for lost in ("00001/samples/0002.png", "00003/samples/0000.png"):
        (out / lost).unlink()
    draw(out)
    assert [s for _, s in drawn] == [plan[6]["seed"], plan[12]["seed"]]
    assert {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*")
            if f.is_file()} == files
    for change in (dict(steps=4), dict(guidance=1.0), dict(size=128), dict(init="other")):
        assert "drawn otherwise" in complaint(lambda: draw(out, **change))
    (out / "manifest.jsonl").unlink()                            # images of we know not whom
    assert "not by us" in complaint(lambda: draw(out))

    shares = []
    for rank in (0, 1):                                          # two ranks share the work
        draw(tmp_path / "b", rank, 2)
        shares.append(set(drawn))
    assert len(shares[0]) == len(shares[1]) == 8 and not shares[0] & shares[1]
    assert {f.relative_to(tmp_path / "b").as_posix() for f in (tmp_path / "b").rglob("*")
            if f.is_file()} == names


def test_from_the_command_line(small, parts, tmp_path, monkeypatch, capsys):
    """A tiny model draws, the detector judges; the same folder scored once more says the same."""
    four(monkeypatch)
    monkeypatch.setitem(presets_py.PRESETS, "shapes", presets_py.Config(
        **json.loads((parts / "config.json").read_text())))
    monkeypatch.setattr(model, "has_bf16", lambda: False)

    def run(out, *flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--bench", "geneval", "--out",
                                          *map(str, (out, *flags))])
        eval_py.main()
        return json.loads((out / "results.json").read_text())
    out, mine = tmp_path / "run", ("--init", parts / "sft", "--steps", 2)
    first = run(out, *mine)
    assert first["images"] == 16 and first["steps"] == 2 and 0 <= first["score"] <= 1
    plan = [json.loads(line) for line in (out / "manifest.jsonl").open()]
    assert {(p["steps"], p["size"], p["init"]) for p in plan} == {(2, 64, str(parts / "sft"))}
    images = {f: f.read_bytes() for f in out.glob("*/samples/*.png")}
    assert len(images) == 16 and len(set(images.values())) == 16
    assert first["thresholds"] == [0.3, 0.9] and len(plan[0]["weights"]) == 32
    assert "another run" in complaint(lambda: run(out, "--score-only", out))
    again = run(tmp_path / "again", "--score-only", out)
    assert again.keys() - first.keys() == set() and "steps" not in again and again["images"] == 16
    assert {k: first[k] for k in again if k != "score_only"}.items() <= again.items()
    said = capsys.readouterr().out
    assert "geneval" in said and "counts above 0.3, for counting above 0.9" in said
    # Exactly our boxes, as if another detector's, say the same; a higher threshold does not.
    rows = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert sum(len(r["detections"]) for r in rows) > 16
    theirs = run(tmp_path / "theirs", "--score-only", out, "--detections", out / "results.jsonl")
    assert theirs | dict(score_only="") == again | dict(score_only="")
    strict = run(tmp_path / "strict", "--score-only", out, "--detections", out / "results.jsonl",
                 "--thresholds", "0.99,0.995")
    assert strict["thresholds"] == [0.99, 0.995] and strict["extra_rate"] < theirs["extra_rate"]
    assert "--score-only FOLDER" in complaint(lambda: run(
        tmp_path / "x", "--detections", out / "results.jsonl"))
    for bad, words in (("1", "two numbers"), ("0.3,2", "two numbers")):
        assert words in complaint(lambda: run(tmp_path / "x", "--score-only", out, "--thresholds",
                                              bad))
    (tmp_path / "few.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "has nothing of 00000/samples/0001.png" in complaint(lambda: run(
        tmp_path / "x", "--score-only", out, "--detections", tmp_path / "few.jsonl"))
    assert "below 0.3 are for --detections" in complaint(lambda: run(
        tmp_path / "x", "--score-only", out, "--thresholds", "0.1,0.9"))
    thing = {"class": "cat", "score": 0.9, "box": [1.5, -2.5, 30.2, 40.7]}
    for odd, words in (({"class": "mouse"}, "'mouse' is none of GenEval's 80 names"),
                       ({"color": "gray"}, "color 'gray' is none of red"),
                       ({"box": [3, 3, 3, 9]}, "not {file"),
                       ({"box": [0, 0, "1e999", 9]}, "not {file")):
        (tmp_path / "few.jsonl").write_text(json.dumps(
            dict(file="a", detections=[thing | odd])).replace('"1e999"', "1e999") + "\n")
        assert words in complaint(lambda: run(tmp_path / "x", "--score-only", out, "--detections",
                                              tmp_path / "few.jsonl"))
    asked = [json.loads((out / r["file"]).parents[1].joinpath("metadata.jsonl").read_text())
             for r in rows]
    every = [dict(r, detections=[thing | {"class": want["class"]} for want in meta["include"]])
             for r, meta in zip(rows, asked)]            # partly outside: CLIP names colours
    (tmp_path / "float.jsonl").write_text("".join(json.dumps(r) + "\n" for r in every))
    assert run(tmp_path / "float", "--score-only", out, "--detections",
               tmp_path / "float.jsonl")["images"] == 16
    (tmp_path / "few.jsonl").write_text('{"file": "a", "detections": [{"class": "cat"}]}\n')
    assert "few.jsonl, line 1: not {file" in complaint(lambda: run(
        tmp_path / "x", "--score-only", out, "--detections", tmp_path / "few.jsonl"))
    assert not (tmp_path / "x").exists()
    (out / "results.json").unlink()
    assert "drawn otherwise" in complaint(lambda: run(out, *mine, "--guidance", 3))
    assert {f: f.read_bytes() for f in out.glob("*/samples/*.png")} == images
    bare = run(tmp_path / "bare", "--init", "", "--preset", "shapes", "--steps", 1)
    assert bare["images"] == 16 and bare["preset"] == "shapes"      # the preset's parts as they are


def test_scores_are_those_of_the_images(small, tmp_path):
    """Another's folder, with unequal tags: the mean of tag means, clustered by prompt."""
    image = blocks(60, 90, 1)
    (found,) = photos_py.detect_coco(image[None])
    there = found[0]["class"]
    n = sum(f["class"] == there for f in found)
    absent = next(c for c in COCO if c not in [f["class"] for f in found])
    metas = [row("two_object", (there, n), prompt="a"), row("two_object", (absent, 1), prompt="b"),
             row("two_object", (there, 1), prompt="c"),
             row("colors", (absent, 1, "red"), prompt="d")]
    for i, meta in enumerate(metas):
        home = tmp_path / f"{i:05d}"
        (home / "samples").mkdir(parents=True)
        (home / "metadata.jsonl").write_text(json.dumps(meta))   # no line feed, as the original
        for k in range(1 + (i == 0)):
            Image.fromarray(image).save(home / f"samples/{k:04d}.png")
        Image.fromarray(image).save(home / "grid.png")
    (tmp_path / "notes").mkdir()
    def scored():
        out = tmp_path / "notes"
        rows, _ = score_all(bench_py, bench_py.shots_in(tmp_path), tmp_path, None, out / "a")
        return rows, dict(images=len(rows)) | bench_py.table(rows)
    rows, r = scored()
    assert r["images"] == 5 and r["two_object"] == 0.75 and r["colors"] == 0
    assert r["score"] == pytest.approx(0.375)                    # not 3 of 5
    e = np.array([0.5, -0.75, 0.25])                             # of three prompts, a drawn twice
    assert r["two_object_se"] == pytest.approx(np.sqrt((e**2).sum() / 16 * 3 / 2))
    assert [x["correct"] for x in rows] == [True, True, False, True, False]
    assert rows[2]["file"] == "00001/samples/0000.png" and rows[2]["prompt"] == "b"
    # A picture kept on its side (EXIF) is judged upright.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(image).copy()).save(tmp_path / "00000/samples/0000.png", exif=exif)
    assert scored()[1] == r


def test_bad_folders(tmp_path, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--bench", "geneval", *map(str, flags)])
        return complaint(eval_py.main)
    out, home = tmp_path / "x", tmp_path / "x/00000"
    assert "needs --out" in run()
    assert "--score-only FOLDER" in run("--init", "", "--out", out)
    assert not out.exists()
    out.mkdir()
    assert "holds no images in GenEval's layout" in run("--score-only", out)
    home.mkdir()
    good = json.dumps(row("single_object", ("cat", 1), prompt="a cat"))
    for text, words in [("{", "line 1"), ("", "metadata.jsonl"), (f"{good}\n{good}", "metadata"),
                        (good, "no samples"), ('{"prompt": "a"}', "no tag or include")]:
        (home / "metadata.jsonl").write_text(text)
        said = run("--score-only", out)
        assert words in said and "00000" in said
    (home / "metadata.jsonl").write_text(good)
    (home / "samples").mkdir()
    (home / "samples/0000.png").write_bytes(b"not a picture")
    assert "0000.png cannot be read" in run("--score-only", out)
    assert not (out / "results.json").exists()


def test_classes_that_no_detector_knows(tmp_path):
    path = tmp_path / "p.jsonl"
    for bad in (("sofa", 1), ("cat", 1)), (("cat", 1), ("star", 1)):
        path.write_text(json.dumps(row("two_object", *bad, prompt="a")) + "\n")
        with pytest.raises(ValueError, match="line 1: .*GenEval's 80 names"):
            read_prompts(path)
    path.write_text(json.dumps({"prompt": "a", "include": [{"class": ["cat"], "count": 1}]}))
    with pytest.raises(ValueError, match="line 1"):
        read_prompts(path)
