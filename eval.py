"""Judges: rewards one trains on and benchmarks one reports are the same functions.

    python eval.py --bench shapes --init data/shapes/sft --out out/eval
    python eval.py --bench geneval --init out/grpo --out out/geneval    # real images: draw, score
    python eval.py --bench geneval --init "" --out FOLDER    # without --preset: score what is there
    python eval.py --bench shapes-edit --init data/shapes/sft-edit --guidances 1,3 --out out/edits
    python eval.py --bench shapes-reason --init out/sft-cot    # also shapes-reflect, shapes-vqa
    python eval.py --write-prompts geneval FILE    # its 553 prompts; geneval-train: 50,000 for RL
"""

import base64
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import textwrap
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from matplotlib import pyplot as plt
from peft.tuners.lora import LoraLayer
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import save_file
from scipy import ndimage, stats
from tqdm import tqdm
from transformers import (AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, CLIPModel,
                          CLIPProcessor, Mask2FormerForUniversalSegmentation,
                          Mask2FormerImageProcessor, PPOCRV5MobileDetForObjectDetection,
                          PPOCRV5MobileRecForTextRecognition)

from data.shapes.prepare import (  # isort: skip
    COLORS, GLYPHS, GROUND, IMAGE, KINDS, MARGIN, MASKS, MATCH, PALETTE, PITCH, PLATE_H, RELATIONS,
    SHAPES, SIDE, SIZES, TAGS, WHICH, article, box, edit_scene, make_meta, plural, relation, render,
    sample_edit, scene_for)
from model import (Unified, all_mean, clip_words, differ, fail, fetch, flag, given_parts, has_bf16,
                   key, parse, pretrained, read_safetensors, setup, spans, special_names,
                   token_rows, verdict, write)

# N images, P prompts, K rewards, C H W a torch image; numpy images are (H,W,3) uint8 RGB

# ---------------------------------------------------------------------------------------------
# The classroom detector: nearest palette colour, connected components, template match.

CANON = 24  # a component is stretched to 24x24 before it is compared: the match ignores size


def stretch(mask):
    """Bool (h,w) -> bool (CANON*CANON,), the mask's bounding box stretched to the full square."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    i = rows[0] + (np.arange(CANON) + 0.5) * (rows[-1] + 1 - rows[0]) / CANON
    j = cols[0] + (np.arange(CANON) + 0.5) * (cols[-1] + 1 - cols[0]) / CANON
    return mask[i.astype(int)[:, None], j.astype(int)].reshape(-1)


TEMPLATES = np.stack([stretch(MASKS[s, SIZES[-1]][:, :, 0] > 0.5) for s in SHAPES])  # (8, 576)

_levels = np.stack(np.meshgrid(*[np.arange(4, 256, 8)] * 3, indexing="ij"), -1)  # (32,32,32,3)
_anchors = np.array([GROUND, *PALETTE.values()])  # (11,3): ground is 0, colours from 1
NEAREST = ((_levels[..., None, :] - _anchors) ** 2).sum(-1).argmin(-1).astype(np.uint8)


def detect_shapes(image):
    """uint8 (64,64,3) -> [{class, color, box (x0,y0,x1,y1), score in [0,1]}], best score first.

    score is the IoU of the component's mask with the template, both stretched to a square."""
    q = image >> 3
    label = NEAREST[q[..., 0], q[..., 1], q[..., 2]]  # (64,64): 0 ground, 1.. colours
    parts, _ = ndimage.label(label > 0)
    found = []
    for k, window in enumerate(ndimage.find_objects(parts), 1):
        part, lab = parts[window] == k, label[window]
        if part.sum() < 40:
            continue
        # Antialiased rims mix with the ground and land on other colours (red on grey reads brown):
        # only pixels whose four neighbours are foreground vote.
        p = np.pad(part, 1)
        core = part & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
        votes = np.bincount(lab[core] if core.any() else lab[part], minlength=len(_anchors))
        colors = np.flatnonzero(votes > 0.25 * votes.sum())
        for c in colors:  # more than one: things that touch, told apart by colour
            mask = part if len(colors) == 1 else part & (lab == c)
            mine = stretch(mask)
            inter = TEMPLATES[:, mine].sum(1)
            iou = inter / (TEMPLATES.sum(1) + mine.sum() - inter)
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if max(ys[-1] - ys[0], xs[-1] - xs[0]) >= 2 * SIZES[-1]:
                continue  # a changed ground, not a thing: else a white page is a white square
            y, x = window[0].start, window[1].start
            found.append(dict(color=COLORS[c - 1], score=float(iou.max()),
                              box=(x + xs[0], y + ys[0], x + xs[-1] + 1, y + ys[-1] + 1),
                              **{"class": SHAPES[iou.argmax()]}))
    return sorted(found, key=lambda f: -f["score"])


# ---------------------------------------------------------------------------------------------
# The classroom OCR: find the plate, correlate each cell with every glyph.

GLYPH_NAMES = list(GLYPHS)
LEGIBLE = 0.65  # correlation: glyphs blurred by a pixel reach 0.77 or more, other things 0.59


def unit(x):
    """Last axis to mean 0 and length 1, so that a dot product is a correlation."""
    x = x - x.mean(-1, keepdims=True)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


# The paper around a glyph is part of its template: without it, any white corner reads as L.
INK = [np.pad(np.kron(g, np.ones((2, 2))), MARGIN) for g in GLYPHS.values()]  # 16 x (18,14)
ALPHABET = unit(1 - np.stack(INK).reshape(len(INK), -1))  # (16,252), bright paper, dark ink
SHIFTS = np.stack(np.mgrid[-2:3, -2:3], -1).reshape(-1, 2)  # (25,2) dy, dx tried per cell


def read_sign(image):
    """uint8 (64,64,3) -> the characters on its plate, "" if there is none."""
    white = image.min(-1).astype(np.float32)  # the darkest channel: only white is bright here
    # The plate stands out from the ground as paper or as ink; smoothing keeps blur, which mixes
    # them to grey, from cutting it in pieces, and grows it alike on every side.
    parts, n = ndimage.label(ndimage.uniform_filter(np.abs(white - GROUND[0]), 5) > 40)
    if n == 0:
        return ""
    light = np.bincount(parts.ravel(), np.maximum(white - GROUND[0], 0).ravel())
    plate = parts == 1 + light[1:].argmax()
    rows, cols = plate.sum(1), plate.sum(0)
    rows = np.flatnonzero(rows > rows.max() / 2)  # half: specks at the rim do not move the box
    cols = np.flatnonzero(cols > cols.max() / 2)
    width = cols[-1] + 1 - cols[0] - MARGIN
    n = max(1, round(width / PITCH))
    pitch = np.clip(width / n, PITCH - 1, PITCH + 1)  # a drawn plate may be a little stretched
    y = (rows[0] + rows[-1] + 1 - PLATE_H) // 2
    x = np.round((cols[0] + cols[-1] + 1 - MARGIN) / 2 + pitch * (np.arange(n) - n / 2)).astype(int)

    border = 16  # so that a cell may reach over the image's edge
    page = np.pad(white, border, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(page, (PLATE_H, PITCH + MARGIN))
    at = np.clip(y + SHIFTS[:, 0] + border, 0, windows.shape[0] - 1)[:, None]  # (25,1)
    to = np.clip(x + SHIFTS[:, 1:] + border, 0, windows.shape[1] - 1)  # (25,n)
    cells = windows[at, to].reshape(len(SHIFTS), n, -1)  # (25,n,252)
    match = (unit(cells) @ ALPHABET.T).max(0)  # (n,16), each cell at its best shift
    return "".join(GLYPH_NAMES[m.argmax()] for m in match if m.max() > LEGIBLE)


def edit_distance(a, b):
    """Levenshtein: the fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def text_match(read, target):
    """Flow-GRPO's OCR reward in [0,1]: 1 - min(distance, len) / len, without case and spaces.

    A target inside a longer reading counts as read: PaddleOCR also reports what stands around."""
    read, target = ("".join(s.lower().split()) for s in (read, target))
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


# ---------------------------------------------------------------------------------------------
# GenEval's rule (Ghosh et al. 2023, evaluate_images.py): any detector, one metadata row.

SHAPES_THRESHOLDS = (0.5, 0.7)  # least score, and for `counting` (GenEval's Mask2Former: 0.3, 0.9)


def clauses(objects, meta, exact):
    """One score in [0,1] per thing the prompt asks for; objects come best first.

    exact=False: extra objects are ignored (GenEval); True: they are errors (Flow-GRPO)."""
    terms, groups = [], []
    for want in meta["include"]:
        n = want["count"]
        found = [o for o in objects if o["class"] == want["class"]]
        found = found if exact else found[:n]
        # Departs from Flow-GRPO, whose count term is unbounded: 5 found for 1 asked is 0, not -3.
        terms.append(max(0, 1 - abs(n - len(found)) / n))
        matched = len(found) == n
        if not matched and ("color" in want or "position" in want):
            terms.append(0)
        if matched and "color" in want:
            right = sum(o["color"] == want["color"] for o in found)
            terms.append(right / n)
            matched = right == n
        if matched and "position" in want:
            name, target = want["position"]
            matched = groups[target] is not None and all(
                name in relation(a["box"], b["box"]) for a in found for b in groups[target])
            # Departs from Flow-GRPO, which appends 0 and then also 1 for a wrong position.
            terms.append(float(matched))
        groups.append(found if matched else None)
    return terms


def evaluate(detections, meta, thresholds=SHAPES_THRESHOLDS):
    """Detections [{class, color, box, score}] against one GenEval row -> correct, strict, partial.

    correct  the official rule: per clause the `count` best objects decide, more are ignored unless
             `exclude` names them
    strict   every count exact too; classes that the prompt does not name are still ignored
    partial  Flow-GRPO's training reward in [0,1]: the mean of the exact clauses' scores"""
    least = thresholds[meta.get("tag") == "counting"]
    # Departs from GenEval where scores tie, and where one is float32(.3): here the first of equals
    # comes first, and that score, .30000001, counts.
    objects = sorted((d for d in detections if d["score"] > least), key=lambda d: -d["score"])
    allowed = all(sum(o["class"] == no["class"] for o in objects) < no["count"]
                  for no in meta.get("exclude", []))
    official, exact = (clauses(objects, meta, e) for e in (False, True))
    return dict(correct=allowed and set(official) <= {1}, strict=allowed and set(exact) <= {1},
                partial=sum(exact) / max(1, len(exact)))


def extra_objects(detections, meta, least=SHAPES_THRESHOLDS[0]):
    """How many detected objects the prompt did not ask for, by class; a reward that ignores them
    invites a collage.  The lower threshold also for `counting`: half-hidden things are extra."""
    seen = [d for d in detections if d["score"] > least]
    if "text" in meta and not meta["include"]:  # a sign is itself seen as white and black things
        return sum(d["color"] not in ("white", "black") for d in seen)
    asked = Counter()
    for want in meta["include"]:
        asked[want["class"]] += want["count"]
    return (Counter(d["class"] for d in seen) - asked).total()  # `-` keeps what is above 0


def judge(image, meta):
    """One image (H,W,3) -> dict(correct, strict, partial, extra)."""
    if is_photo(meta):
        return judge_photos(image[None], [meta])[0]
    detections = detect_shapes(image)
    extra = extra_objects(detections, meta)
    if "text" not in meta:
        return dict(evaluate(detections, meta), extra=extra)
    read = read_sign(image)
    same = read == meta["text"]
    return dict(correct=same, strict=same, partial=text_match(read, meta["text"]), extra=extra)


# ---------------------------------------------------------------------------------------------
# Edits of known scenes: is the change there, by GenEval's rule, and is all else as it was?

NEAR = 5  # pixels between a box's sides: the detector errs by 3, the VAE by 1 more; places are 16
          # apart, sizes 4, so that the next size passes and the next place does not


def near(found, place):
    return max(abs(a - b) for a, b in zip(found["box"], place)) <= NEAR


def asked_of(edit):
    """-> what an edit changes, as GenEval metadata that the source does not meet; what it moves, as
    (class, old box), or None; and what must stay, [(classes, colours, box or None = anywhere)]:
    every thing of the source, a recoloured or replaced one as its old or its new self.
    Shapes are distinct within a scene."""
    old = {t["shape"]: t for t in edit["source"]}
    new = {want["class"]: want for want in edit["target_meta"]["include"]}
    came = [want for s, want in new.items() if s not in old]
    gone = [s for s in old if s not in new]
    if edit["kind"] == "move":
        change, s = edit["target_meta"], edit["target_meta"]["include"][1]["class"]
        moved = s, box(old[s])
    else:
        came += [new[s] for s, t in old.items() if s in new and new[s]["color"] != t["color"]]
        change = dict(include=came, exclude=[{"class": s, "count": 1} for s in gone])
        moved = None
    stay = []
    for s, t in old.items():
        after = new.get(s) or (came and came[0])                 # gone, and one came: replaced
        if after:
            stay.append(({s, after["class"]}, {t["color"], after.get("color", t["color"])},
                         None if moved and s == moved[0] else box(t)))
    return change, moved, stay


def judge_edit(image, edit):
    """One image (H,W,3) and a row of edit_*.jsonl -> dict(success, preservation, extra).

    success       0 or 1: what the instruction changes is there, every count exact (`strict`); what
                  it moves is no longer where it was: a diagonal may seem to hold both relations
    preservation  in [0,1]: of the source's other things, the share still there in shape, colour
                  and, within NEAR, place and size; a thing too many counts as one more that is not
    extra         things too many: of a shape in neither source nor target, or a second of one"""
    change, moved, stay = asked_of(edit)
    found = [f for f in detect_shapes(image) if f["score"] > SHAPES_THRESHOLDS[0]]
    still = moved and any(f["class"] == moved[0] and near(f, moved[1]) for f in found)
    kept = sum(any(f["class"] in classes and f["color"] in colors and (not place or near(f, place))
                   for f in found) for classes, colors, place in stay)
    known = {t["shape"] for t in edit["source"]} | {
        want["class"] for want in edit["target_meta"]["include"]}
    extra = extra_objects(found, dict(include=[{"class": s, "count": 1} for s in known]))
    return dict(success=float(evaluate(found, change)["strict"] and not still),
                preservation=kept / (len(stay) + extra), extra=extra)


# ---------------------------------------------------------------------------------------------
# GenEval on real images: Mask2Former finds things, CLIP names their colours, the rule above judges.
# Departs from the original in its detector's weights, the authors' own in place of mmdet's: 0.9 for
# counting is the sensitive threshold, calibrate before quoting. Flow-GRPO's reward also turns each
# image into a JPEG and swaps red and blue on the way to the detector; here it does neither.

COCO = ("person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
        "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
        "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, "
        "snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis "
        "racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, "
        "orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
        "dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell "
        "phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy "
        "bear, hair drier, toothbrush").split(", ")  # COCO's order, GenEval's names
DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COCO_THRESHOLDS = (0.3, 0.9)
COLOR_CLIP = ("ViT-L-14-quickgelu", "openai")  # `ViT-L-14` builds the wrong GELU and only warns


def is_photo(meta):
    """Which world a prompt speaks of: a class that is no shape of the classroom is COCO's."""
    return any(want["class"] not in SHAPES for want in meta["include"])


@cache
def mask2former(name):
    """-> image processor, model: on the GPU where there is one"""
    # 800, as mmdet, not the 384x384 of this checkpoint's own file; a divisor would stretch the
    # image to multiples of 32, where mmdet pads. Left: torch smooths when it shrinks, mmdet not.
    see = Mask2FormerImageProcessor(size=dict(shortest_edge=800, longest_edge=1333), size_divisor=0)
    model, info = Mask2FormerForUniversalSegmentation.from_pretrained(
        fetch(name), dtype=torch.float32, output_loading_info=True)
    # The file is older than transformers 5: its index tables are computed now (unexpected), and it
    # lacks a last norm, which no mask depends on.
    differ(f"{name} does not fit its config.json",
           [k for k in sorted(info["missing_keys"]) if ".swin.layernorm." not in k]
           + sorted(k[0] for k in info["mismatched_keys"]))
    if model.config.num_labels != len(COCO):
        fail(f"{name} knows {model.config.num_labels} classes, not COCO's {len(COCO)}")
    return see, to_device(model)


@torch.no_grad()
def detect_coco(images):
    """uint8 (N,H,W,3) -> N lists of {class, score, box (x0,y0,x1,y1), mask bool (H,W)}, best first.

    mmdet 2.x's MaskFormerFusionHead.instance_postprocess, then GenEval's 16 best of each class
    without NMS; transformers' own helper cuts the masks out at 384x384."""
    see, model = mask2former(DETECTOR)
    x = see(list(torch.from_numpy(images).permute(0, 3, 1, 2)), input_data_format="channels_first",
            device=model.device, return_tensors="pt")["pixel_values"]                # (N,3,h,w)
    h, w = x.shape[2:]
    x = F.pad(x, (0, -w % 32, 0, -h % 32))
    out, found = model(pixel_values=x), []

    def grow(masks, size):
        return F.interpolate(masks[None], size=tuple(size), mode="bilinear")[0]

    for names, masks in zip(out.class_queries_logits, out.masks_queries_logits):
        p = names.softmax(-1)[:, :-1].flatten()       # (Q*80,), the last class being "nothing"
        p, at = p.topk(min(100, len(p)))              # a query may bear two names: no argmax
        at, p = at[p > COCO_THRESHOLDS[0]], p[p > COCO_THRESHOLDS[0]]   # a mask only lowers p
        things = []
        if len(p):
            masks = grow(masks[at // len(COCO)], x.shape[2:])[:, :h, :w]        # without padding
            masks = grow(masks, images.shape[1:3])                              # (K,H,W) logits
            inside = masks > 0
            score = p * (masks.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
            for s, k, mask in zip(score.tolist(), (at % len(COCO)).tolist(), inside.cpu().numpy()):
                if s > COCO_THRESHOLDS[0]:            # an empty mask has 0
                    (y0, y1), (x0, x1) = (np.flatnonzero(mask.any(a))[[0, -1]].tolist()
                                          for a in (1, 0))
                    things.append(dict(score=s, box=(x0, y0, x1 + 1, y1 + 1), mask=mask,
                                       **{"class": COCO[k]}))
        things.sort(key=lambda t: -t["score"])
        found.append([t for i, t in enumerate(things)
                      if sum(u["class"] == t["class"] for u in things[:i]) < 16])
    return found


@cache
def color_clip(name, tag):
    """-> open_clip model, image transform, tokenizer"""
    try:
        model, _, prepare = open_clip.create_model_and_transforms(name, tag)
    except (OSError, RuntimeError) as e:
        fail(f"GenEval's colour classifier, open_clip {name} {tag}, cannot be loaded: "
             + str(e).strip().splitlines()[0])
    return to_device(model), prepare, open_clip.get_tokenizer(name)


@cache
def color_weights(thing, clip):
    """(D,10): for each colour, the mean of three sentences' normalised embeddings."""
    model, _, words = color_clip(*clip)
    return open_clip.build_zero_shot_classifier(
        model, words, COLORS, [f"a photo of a {{}} {thing}", f"a photo of a {{}}-colored {thing}",
                               "a photo of a {} object"], device=model.logit_scale.device)


@torch.no_grad()
def name_colors(image, things):
    """Gives each of some things of one class its `color`: CLIP sees it alone, on #999."""
    model, prepare, _ = color_clip(*COLOR_CLIP)
    crops = []
    for t in things:
        x0, y0, x1, y1 = t["box"]
        alone = np.where(t["mask"][..., None], image, np.uint8(0x99))
        crops.append(prepare(Image.fromarray(alone[y0:y1, x0:x1])))
    weights = color_weights(things[0]["class"], COLOR_CLIP)
    f = F.normalize(model.encode_image(torch.stack(crops).to(weights.device)), dim=-1)
    for t, k in zip(things, (f @ weights).argmax(1).tolist()):
        t["color"] = COLORS[k]


def judge_photos(images, metas):
    """Real images, uint8 (N,H,W,3), and what each should show -> N dicts, as judge."""
    out = []
    for image, meta, things in zip(images, metas, detect_coco(images)):
        for want in meta["include"]:
            mine = [t for t in things if t["class"] == want["class"]]
            if "color" in want and mine:
                name_colors(image, mine)
        out.append(dict(evaluate(things, meta, COCO_THRESHOLDS),
                        extra=extra_objects(things, meta, COCO_THRESHOLDS[0])))
    return out


def coco_meta(tag, rng):
    """One GenEval prompt about COCO's things; draws from rng as GenEval's create_prompts.py does,
    so that one seed gives its very file. No colours for `person`, COCO[0]."""
    def some(i, count=1, **more):
        return {"class": COCO[i], "count": count, **more}

    if tag == "counting":
        i, n = rng.choice(80), int(rng.integers(2, 4, endpoint=True))
        return make_meta(tag, [some(i, n)], plural(n, COCO[i]), exclude=[some(i, n + 1)])
    if tag == "colors":
        i, c = rng.choice(79) + 1, COLORS[rng.choice(10)]
        return make_meta(tag, [some(i, color=c)], article(f"{c} {COCO[i]}"))
    if tag == "color_attr":
        i, j = rng.choice(79, 2, replace=False) + 1
        c, d = (COLORS[k] for k in rng.choice(10, 2, replace=False))
        return make_meta(tag, [some(i, color=c), some(j, color=d)],
                         f"{article(f'{c} {COCO[i]}')} and {article(f'{d} {COCO[j]}')}")
    i, j = rng.choice(80, 2, replace=False)
    a, b = article(COCO[i]), article(COCO[j])
    if tag == "two_object":
        return make_meta(tag, [some(i), some(j)], f"{a} and {b}")
    rel = RELATIONS[rng.choice(4)]                    # position
    return make_meta(tag, [some(j), some(i, position=[rel, 0])], f"{a} {rel} {b}")


def geneval_prompts():
    """The 553 test prompts, a JSON line each: byte for byte GenEval's evaluation_metadata.jsonl."""
    rng = np.random.default_rng(43)
    rows = [make_meta("single_object", [{"class": COCO[i], "count": 1}], article(COCO[i]))
            for i in rng.choice(80, 80, replace=False)]
    rows += [coco_meta(tag, rng) for tag in TAGS[1:] for _ in range(100)]
    lines = list(dict.fromkeys(json.dumps(row) + "\n" for row in rows))              # each once
    if hashlib.sha256("".join(lines).encode()).hexdigest()[:16] != "5c48e0813e812e3c":
        fail(f"numpy {np.__version__} draws otherwise than GenEval's: these are not its prompts")
    return lines


def geneval_train_prompts(n=50_000):
    """n training prompts in Flow-GRPO's shares, none about what a test prompt is about.

    Departs from Flow-GRPO, which leaves out the test's exact words: here a pair of things (and of
    colours) is out in either order, whatever the relation. Lines repeat: just 160 can count."""
    def about(row):
        return row["tag"], *(frozenset(want.get(k) for want in row["include"])
                             for k in ("class", "count", "color"))

    tested = {about(json.loads(line)) for line in geneval_prompts()}
    shares = dict(position=7, counting=5, color_attr=3, colors=1, two_object=1)
    tags = [tag for tag, share in shares.items() for _ in range(share)]
    rng, rows = np.random.default_rng(0), []
    while len(rows) < n:
        row = coco_meta(tags[len(rows) % len(tags)], rng)
        if about(row) not in tested:
            rows.append(row)
    return [json.dumps(rows[i]) + "\n" for i in rng.permutation(n)]


def write_prompts(name="", path="", *more):
    """--write-prompts NAME FILE; an existing file stays as it is."""
    makers = {"geneval": geneval_prompts, "geneval-train": geneval_train_prompts}
    if name not in makers or not path or more:
        fail(f"--write-prompts takes one of {', '.join(makers)}, and a file")
    if Path(path).exists() or not Path(path).absolute().parent.is_dir():
        fail(f"{path} exists or is in no folder that does: choose another file")
    lines = makers[name]()
    write(path, "".join(lines))
    print(f"{path}: {len(lines)} prompts")


def draw_geneval(draw, out, seed, rank, world, recipe, n=4):
    """n images per prompt in GenEval's folders; ranks share them, what is there is not redrawn.

    draw(prompts, seeds) -> uint8 (B,3,H,W).  manifest.jsonl, how each image is drawn, is written
    first; a folder with another one is refused."""
    rows = geneval_prompts()
    plan = [dict(file=f"{i:05d}/samples/{j:04d}.png", prompt=json.loads(row)["prompt"],
                 seed=key(seed, 0, 1000 * i + j), **recipe)
            for i, row in enumerate(rows) for j in range(n)]
    manifest, text = out / "manifest.jsonl", "".join(json.dumps(p) + "\n" for p in plan)
    foreign = manifest.read_text() != text if manifest.exists() else any(out.glob("*/samples"))
    if foreign:
        fail(f"{out} holds images drawn otherwise, or not by us: --init '' scores them; to draw, "
             "choose another --out")
    all_mean([0])                       # every rank has looked before one writes
    for i, row in enumerate(rows if rank == 0 else []):
        (out / f"{i:05d}/samples").mkdir(parents=True, exist_ok=True)
        write(out / f"{i:05d}/metadata.jsonl", row)
    if rank == 0:
        write(manifest, text)
    all_mean([0])
    todo = [p for p in plan[rank::world] if not (out / p["file"]).exists()]
    batch = max(1, min(64, (2048 // recipe["size"]) ** 2))                # 16 of 512 px, 4 of 1024
    for a in tqdm(range(0, len(todo), batch), "draw", unit="batch", disable=rank > 0 or None):
        now = todo[a : a + batch]
        images = arrays(draw([p["prompt"] for p in now], [p["seed"] for p in now]))
        for file, image in zip([out / p["file"] for p in now], images):
            Image.fromarray(image).save(f"{file}.tmp", "PNG")
            os.replace(f"{file}.tmp", file)
    all_mean([0])                       # rank 0 scores what all have drawn


def score_geneval(folder):
    """GenEval's folders {i:05d}/metadata.jsonl and {i:05d}/samples/{k:04d}.png, whoever drew them
    -> metrics; results.jsonl then says how each image fared."""
    files, rows, judged = [], [], []
    for about in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        mine = sorted(about.parent.glob("samples/[0-9]*.png"))
        try:
            (row,) = read_prompts(about)
        except (OSError, ValueError) as e:
            fail(f"{about}: {e}")
        if not (row.get("tag") and row.get("include") and mine):
            fail(f"{about.parent}: no tag or include in metadata.jsonl, or no samples/0000.png")
        files, rows = files + mine, rows + [row] * len(mine)
    if not files:
        fail(f"{folder} holds no images in GenEval's layout, such as 00000/samples/0000.png")
    for file, row in zip(tqdm(files, "score", unit="image", disable=None), rows):
        try:
            image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        except OSError as e:
            fail(f"{file} cannot be read: {e}")
        judged.append(judge(np.array(image), row))
    write(folder / "results.jsonl", "".join(
        json.dumps(dict(filename=str(f), tag=r["tag"], prompt=r["prompt"], **v)) + "\n"
        for f, r, v in zip(files, rows, judged)))
    return table(rows, [[v] for v in judged])[0]


# ---------------------------------------------------------------------------------------------
# Rewards: reward(images, metas, group) -> float32 (N,) on the CPU; NaN = could not be scored.
# images uint8 (N,3,H,W), prompt-major: N = P * group; float images in [0,1] are rounded to uint8.


def arrays(images):
    """(N,3,H,W) torch, any device -> (N,H,W,3) uint8 numpy."""
    if images.is_floating_point():
        images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def jpeg_kb(image):
    """Size in kB (1000 bytes) as a JPEG of quality 95."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def per_image(f, images, metas, field):
    """f(image, meta) of every image whose meta has what f needs, NaN for the others."""
    return torch.tensor([f(x, m) if m.get(field) is not None else math.nan
                         for x, m in zip(arrays(images), metas)], dtype=torch.float32)


def verdicts(images, metas, what):
    """judge()'s verdict `what` where the meta has `include`, else NaN; photos eight at a time."""
    x = arrays(images)
    photos = [i for i, m in enumerate(metas) if m.get("include") and is_photo(m)]
    found = {}
    for b in (photos[a : a + 8] for a in range(0, len(photos), 8)):
        found |= zip(b, judge_photos(x[b], [metas[i] for i in b]))
    found |= {i: judge(x[i], m) for i, m in enumerate(metas)
              if i not in found and m.get("include") is not None}
    return torch.tensor([float(found[i][what]) if i in found else math.nan for i in range(len(x))])


def geneval(images, metas, group):
    """Partial GenEval score in [0,1]; of a sign, how well it reads."""
    return verdicts(images, metas, "partial")


def geneval_strict(images, metas, group):
    """1 where every count, colour and position is exact (of a sign, every character), else 0."""
    return verdicts(images, metas, "strict")


def jpeg_compressibility(images, metas, group):
    """-kB/500 (Flow-GRPO; DDPO's is -kB): smooth images win. Grey 512x512 -0.0094, noise -0.62."""
    return torch.tensor([-jpeg_kb(x) / 500 for x in arrays(images)])


def jpeg_incompressibility(images, metas, group):
    """kB (DDPO, Flow-GRPO, UniRL-Zero): detail wins. Grey 512x512 4.7, noise 310."""
    return torch.tensor([jpeg_kb(x) for x in arrays(images)])


# ---------------------------------------------------------------------------------------------
# Rewards that are models: loaded on first use, on the GPU where there is one, each with its own
# preprocessing. Images of 64x64 are the classroom's, for which its own small models stand in.

MODELS = {  # a folder, or owner/repo on the Hub; edit to judge by another version
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "pickscore-processor": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",   # PickScore ships none
    "aesthetic": "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",   # on the features of clip
    "hpsv2": "xswu/HPSv2/HPS_v2_compressed.pt",   # HPS_v2.1_compressed.pt: another scale
    "hpsv2-arch": "ViT-H-14",
    "ocr-det": "PaddlePaddle/PP-OCRv5_mobile_det_safetensors",
    "ocr-rec": "PaddlePaddle/PP-OCRv5_mobile_rec_safetensors",
    "judge": "Qwen/Qwen2.5-VL-7B-Instruct",
    "edit_model": "out/reward/ckpt",   # what sft.py --task reward leaves; no public one is known
    "clip-shapes": str(Path(__file__).parent / "data/shapes/clip"),
    "judge-shapes": str(Path(__file__).parent / "data/shapes/vlm"),
}


def classroom(images):
    """Are these (N,3,H,W) pictures of the classroom world? By size: nobody else draws 64x64."""
    return tuple(images.shape[-2:]) == (SIDE, SIDE)


def to_device(model):
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def hub_file(name):
    """A local file, or owner/repo/file on the Hub -> its path."""
    if Path(name).is_file():
        return name
    owner, repo, file = name.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{repo}", file)
    except (OSError, ValueError) as e:
        fail(f"{name} is neither a file nor on the Hub: {str(e).strip().splitlines()[0]}")


def processor(kind, name):
    """A transformers tokenizer, image processor or both, from a folder or the Hub."""
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as e:
        fail(f"{name} has no {kind.__name__}: {str(e).strip().splitlines()[0]}")


@cache
def clip_model(name, words=""):
    """A transformers CLIP (words: where its processor is, if elsewhere). -> see, read, scale:
    see(PIL images) and read(strings) give features (N,D); scale is exp(logit_scale).

    OpenAI's towers need QuickGELU: transformers' config says so; in open_clip it would be
    `ViT-L-14-quickgelu`, and plain `ViT-L-14` would load them without a word."""
    model = to_device(pretrained(CLIPModel, name))
    feed = processor(CLIPProcessor, words or name)
    most = model.config.text_config.max_position_embeddings                      # 77

    def see(images):
        x = feed(images=images, return_tensors="pt").to(model.device)
        return model.get_image_features(**x).pooler_output   # transformers 5: not the tensor itself

    def read(texts):
        rows = token_rows(feed.tokenizer, texts, truncation=True, max_length=most)
        x = feed.tokenizer.pad(dict(input_ids=rows), return_tensors="pt")
        return model.get_text_features(**x.to(model.device)).pooler_output
    return see, read, model.logit_scale.exp().item()


@cache
def open_clip_model(name, weights=None):
    """The same of an open_clip model: "local-dir:FOLDER", or an architecture and its weights."""
    model, _, crop = open_clip.create_model_and_transforms(name, weights and hub_file(weights))
    model, words = to_device(model), clip_words(name)
    device = model.logit_scale.device

    def see(images):
        return model.encode_image(torch.stack([crop(i) for i in images]).to(device))

    def read(texts):
        return model.encode_text(words(texts).to(device))
    return see, read, model.logit_scale.exp().item()


def clip_for(images):
    if classroom(images):
        return open_clip_model("local-dir:" + MODELS["clip-shapes"])
    return clip_model(MODELS["clip"])


@torch.no_grad()
def embed(f, items):
    """f = see or read of a list of images (uint8 numpy) or strings -> (N,D) on the CPU, length 1.
    Equal ones are read once: a group shares its prompt, and its source. In fp32: the models are
    small beside the DiT that they judge."""
    names = [x if isinstance(x, str) else (x.shape, x.tobytes()) for x in items]
    at = {name: i for i, name in enumerate(dict.fromkeys(names))}
    some = [x if isinstance(x, str) else Image.fromarray(x)
            for x in dict(zip(names, items)).values()]
    chunks = [f(some[i : i + 64]).float() for i in range(0, len(some), 64)]
    return F.normalize(torch.cat(chunks), dim=-1).cpu()[[at[name] for name in names]]


def cosine(model, images, metas):
    """Cosine of each image with its own prompt, (N,)."""
    see, read, _ = model
    return (embed(see, arrays(images)) * embed(read, [m["prompt"] for m in metas])).sum(1)


def clip(images, metas, group):
    """Cosine of image and prompt: ViT-L gives 0.15 to 0.35; the prompt is cut at 77 tokens.
    Departs from Flow-GRPO's code, which shrinks images bilinearly: here bicubic, as CLIP does."""
    return cosine(clip_for(images), images, metas)


# What a reward of edits reads of a row, beside metas[i]["source_image"], a uint8 (3,H,W) tensor;
# the checker needs a scene as source, not a file.
EDIT_NEEDS = dict(edit=("kind", "source", "target_meta"), clip_direction=("captions",),
                  clip_image=(), edit_judge=("instruction",), edit_model=("instruction",))


def lacks(reward, row):
    """The first field that a reward of edits needs and a row has not, or None."""
    return next((k for k in EDIT_NEEDS.get(reward, ()) if not row.get(k)
                 or k == "source" and isinstance(row[k], str)), None)


def must_score(rewards, rows):
    """ValueError where one of these rewards can never score one of these rows of edits."""
    for i, row in enumerate(rows, 1):
        for name in rewards:
            if field := lacks(name, row):
                raise ValueError(f"{row.get('where', f'edit {i}')}: reward {name!r} needs "
                                 f"`{field}`" + ", a scene" * (field == "source"))


def able(reward, metas):
    """Indices of the rows that a reward of edits can score."""
    return [i for i, m in enumerate(metas)
            if m.get("source_image") is not None and not lacks(reward, m)]


def sources(metas, rows):
    """-> what was edited, a list of uint8 (H,W,3): sources need not be of one size"""
    return [arrays(metas[i]["source_image"][None])[0] for i in rows]


def clip_direction(images, metas, group):
    """An edit's direction, cos(image - source, target caption - source caption) in [-1,1].

    For metas with `source_image` and `captions`, (source's, target's)."""
    see, read, _ = clip_for(images)
    R = torch.full((len(metas),), math.nan)
    rows = able("clip_direction", metas)
    if not rows:
        return R
    new, old = arrays(images[rows]), sources(metas, rows)
    texts = [metas[i]["captions"] for i in rows]
    d_image = embed(see, new) - embed(see, old)                                  # (n,D)
    d_text = embed(read, [b for _, b in texts]) - embed(read, [a for a, _ in texts])
    R[rows] = F.cosine_similarity(d_image, d_text)
    # Nothing edited, no direction: rounding in another batch must not be taken for an edit.
    same = [i for i, a, b, (s, t) in zip(rows, new, old, texts) if np.array_equal(a, b) or s == t]
    R[same] = 0
    return R


def clip_image(images, metas, group):
    """Cosine of the image and `source_image`: what was there and is there again (UniRL-Zero)."""
    R, rows = torch.full((len(metas),), math.nan), able("clip_image", metas)
    if rows:
        see = clip_for(images)[0]
        R[rows] = (embed(see, arrays(images[rows])) * embed(see, sources(metas, rows))).sum(1)
    return R


def edit(images, metas, group):
    """The strict checker of the known world: success x preservation in [0,1]; no edit earns 0."""
    R, rows = torch.full((len(metas),), math.nan), able("edit", metas)
    for i, x in zip(rows, arrays(images[rows])):
        v = judge_edit(x, metas[i])
        R[i] = v["success"] * v["preservation"]
    return R


def pickscore(images, metas, group):
    """exp(logit_scale) x cosine, about 18 to 24 (Flow-GRPO divides by 26; a z-score forgets it)."""
    model = clip_model(MODELS["pickscore"], MODELS["pickscore-processor"])
    return model[2] * cosine(model, images, metas)


def hpsv2(images, metas, group):
    """Plain cosine, about 0.2 to 0.35, without a logit scale; v2.0 and v2.1 do not compare."""
    return cosine(open_clip_model(MODELS["hpsv2-arch"], MODELS["hpsv2"]), images, metas)


@cache
def aesthetic_head(name):
    return torch.load(hub_file(name), map_location="cpu", weights_only=True)


def aesthetic(images, metas, group):
    """LAION's sac+logos+ava1 predictor, about 3 to 8: five affine layers without activations
    (the other layers of its file, of which 1, 3 and 5 are dropout, hold nothing)."""
    see, head = clip_model(MODELS["clip"])[0], aesthetic_head(MODELS["aesthetic"])
    x = embed(see, arrays(images))
    for k in (0, 2, 4, 6, 7):                       # 768 -> 1024 -> 128 -> 64 -> 16 -> 1
        x = F.linear(x, head[f"layers.{k}.weight"], head[f"layers.{k}.bias"])
    return x[:, 0]


# PP-OCRv5: one network finds lines of text, another reads them. transformers' own step between
# the two needs cv2; ours is axis-aligned, so that text at an angle comes in a looser crop.


def text_boxes(p, H, W):
    """Probability of text p (h,w) -> boxes (x0,y0,x1,y1) in pixels of the (H,W) image, in reading
    order. PaddleOCR's: pixels above 0.3, regions of mean 0.6, grown by 1.5 area / perimeter (its
    second check, 5 pixels when grown, follows from the first)."""
    parts, _ = ndimage.label(p > 0.3, np.ones((3, 3)))
    boxes = []
    for ys, xs in ndimage.find_objects(parts):
        h, w = ys.stop - 1 - ys.start, xs.stop - 1 - xs.start   # between centres of pixels, as cv2
        if min(h, w) < 3 or p[ys, xs].mean() < 0.6:
            continue
        d = 1.5 * h * w / (2 * (h + w))
        y, x = (np.array([[ys.start - d, ys.stop - 1 + d], [xs.start - d, xs.stop - 1 + d]])
                * [[H / p.shape[0]], [W / p.shape[1]]]).round().astype(int)
        (y0, y1), (x0, x1) = y.clip(0, H), x.clip(0, W)
        if x1 > x0 and y1 > y0:
            boxes.append((int(x0), int(y0), int(x1), int(y1)))
    lines = []                                      # a box whose centre is in a line belongs to it
    for b in sorted(boxes, key=lambda b: b[1]):
        line = next((a for a in lines if a[0][1] <= (b[1] + b[3]) / 2 < a[0][3]), None)
        line.append(b) if line else lines.append([b])
    return [b for line in lines for b in sorted(line)]


@cache
def ocr_model(det, rec):
    return (to_device(pretrained(PPOCRV5MobileDetForObjectDetection, det)),
            processor(AutoImageProcessor, det),
            to_device(pretrained(PPOCRV5MobileRecForTextRecognition, rec)),
            processor(AutoImageProcessor, rec))


@torch.no_grad()
def read_text(images):
    """uint8 (N,H,W,3) -> N strings: all lines of an image, joined without a space (Flow-GRPO)."""
    det, look, rec, squeeze = ocr_model(MODELS["ocr-det"], MODELS["ocr-rec"])
    H, W = images.shape[1:3]
    crops, owner = [], []
    for i in range(0, len(images), 16):
        x = look(images=list(images[i : i + 16]), return_tensors="pt")["pixel_values"]
        for n, p in enumerate(det(x.to(det.device)).last_hidden_state[:, 0].cpu().numpy(), i):
            for x0, y0, x1, y1 in text_boxes(p, H, W):
                crop = images[n, y0:y1, x0:x1]
                crop = np.rot90(crop) if y1 - y0 >= 1.5 * (x1 - x0) else crop    # as PaddleOCR
                # One by one: of a list, the processor stretches every crop to the widest's shape.
                crops.append(squeeze(images=np.ascontiguousarray(crop),
                                     return_tensors="pt")["pixel_values"])       # (1,3,48,w)
                owner.append(n)
    texts, widths = [""] * len(images), [c.shape[-1] for c in crops]
    read = [None] * len(crops)
    for w in set(widths):                                        # most are padded to 320
        mine = [k for k, own in enumerate(widths) if own == w]
        for k in torch.tensor(mine).split(64):
            out = rec(torch.cat([crops[j] for j in k]).to(rec.device))
            for j, r in zip(k.tolist(), squeeze.post_process_text_recognition(out)):
                read[j] = r["text"] if r["score"] >= 0.5 else ""  # PaddleOCR's drop_score
    for n, text in zip(owner, read):
        texts[n] += text
    return texts


def wanted_text(meta):
    """What should stand in the picture: the row's `text`, or what its prompt has in "quotes"."""
    return meta.get("text") or (re.findall('"(.+?)"', meta["prompt"]) or [None])[0]


def ocr(images, metas, group):
    """Flow-GRPO's text reward in [0,1], for prompts that quote a text."""
    targets = [wanted_text(m) for m in metas]
    rows = [i for i, t in enumerate(targets) if t]
    R = torch.full((len(metas),), math.nan)
    if rows:
        x = arrays(images[rows])
        read = [read_sign(i) for i in x] if classroom(images) else read_text(x)
        R[rows] = torch.tensor([text_match(r, targets[i]) for i, r in zip(rows, read)])
    return R


# ---------------------------------------------------------------------------------------------
# Judges: any vision-language model that answers questions about images.


@dataclass
class Judge:
    """Which model answers; scripts set the first two from --judge and --judge-url."""
    model: str = ""           # folder or owner/repo, at an endpoint its name; empty: MODELS
    url: str = ""             # OpenAI-compatible, http://host:8000/v1; empty: the model runs here
    tokens: int = 64          # longest answer
    timeout: float = 60.0     # seconds until the endpoint's silence is a failure
    retries: int = 3          # more attempts after a failure,
    pause: float = 1.0        # the first so many seconds later, each next one twice as long
    parallel: int = 16        # most questions at the endpoint at once, per process
    error: str = ""           # the last failure


JUDGE = Judge()


def ask_url(images, text):
    """One question to the endpoint; images are uint8 (H,W,3). -> answer, None after failures."""
    content = []
    for x in images:
        file = io.BytesIO()
        Image.fromarray(x).save(file, "PNG")
        data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content.append(dict(type="image_url", image_url=dict(url=data)))
    content.append(dict(type="text", text=text))
    body = dict(model=JUDGE.model or MODELS["judge"], temperature=0, max_tokens=JUDGE.tokens,
                messages=[dict(role="user", content=content)])
    request = urllib.request.Request(
        JUDGE.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json",
         "Authorization": "Bearer " + os.environ.get("OPENAI_API_KEY", "none")})
    for k in range(JUDGE.retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=JUDGE.timeout) as reply:
                return json.load(reply)["choices"][0]["message"]["content"].strip()
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as e:
            JUDGE.error = f"{type(e).__name__}: {e}"
            # 4xx: a wrong key, model or request stays wrong; but 408 and 429 say "later".
            if getattr(e, "code", 500) < 500 and e.code not in (408, 429):
                return None
        if k < JUDGE.retries:     # a random part, so that what failed together comes back apart
            time.sleep(JUDGE.pause * 2**k * random.uniform(0.5, 1))


@cache
def judge_model(name):
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    feed = processor(AutoProcessor, name)
    feed.tokenizer.padding_side = "left"             # answers begin where the questions end
    return to_device(pretrained(AutoModelForImageTextToText, name, dtype=dtype)), feed


HOLE = "<|\ue000|>"       # nobody's word


def turns(feed, rows):
    """rows: (images uint8 (H,W,3), text), a user's turn each -> a VLM's inputs, padded as `feed`
    pads. A text's special_names are letters: where they stand the tokenizer reads holes, as many as
    those letters have tokens, which then fill them."""
    letters, said = [], partial(feed.tokenizer, add_special_tokens=False, split_special_tokens=True)

    def holes(name):
        ids = said(name[0])["input_ids"]
        letters.extend(ids)
        return HOLE * len(ids)
    names = special_names(feed.tokenizer)
    chats = [[dict(role="user", content=[
        *(dict(type="image", image=Image.fromarray(x)) for x in images),
        dict(type="text", text=names.sub(holes, text))])] for images, text in rows]
    if letters:                                      # a copy: the reward model saves its tokenizer
        feed = copy.copy(feed)
        feed.tokenizer = copy.deepcopy(feed.tokenizer)
        feed.tokenizer.add_tokens(HOLE, special_tokens=True)
    x = feed.apply_chat_template(chats, add_generation_prompt=True, tokenize=True,
                                 return_dict=True, return_tensors="pt",
                                 processor_kwargs=dict(padding=True))
    if letters:
        ids = x["input_ids"]
        ids[ids == feed.tokenizer.convert_tokens_to_ids(HOLE)] = torch.tensor(letters)
    return x


@torch.no_grad()
def ask_all(questions):
    """[(images, text)], images uint8 (H,W,3) -> answers, None where the endpoint failed. All
    judges ask through here, at temperature 0."""
    if JUDGE.url:
        if not JUDGE.url.startswith("http"):
            fail(f"the judge's URL {JUDGE.url!r} must begin with http:// or https://")
        with ThreadPoolExecutor(JUDGE.parallel) as pool:
            return list(pool.map(lambda q: ask_url(*q), questions))
    small = all(x.shape[:2] == (SIDE, SIDE) for images, _ in questions for x in images)
    model, feed = judge_model(JUDGE.model or MODELS["judge-shapes" if small else "judge"])
    answers = []
    for i in range(0, len(questions), 32):
        x = turns(feed, questions[i : i + 32]).to(model.device)
        ids = model.generate(**x, do_sample=False, max_new_tokens=JUDGE.tokens)
        new = ids[:, x["input_ids"].shape[1]:]
        answers += [a.strip() for a in feed.batch_decode(new, skip_special_tokens=True)]
    return answers


def ask(images, text):
    """One question about images, each uint8 (H,W,3). -> answer"""
    return ask_all([(images, text)])[0]


# The classroom's VLM knows its own phrasing only: see TASKS in data/shapes/prepare.py.
BETTER = ('These two images were drawn for the prompt "{}". Which one fits the prompt better and '
          'looks better? Answer only with <answer>first</answer>, <answer>second</answer> or '
          '<answer>tie</answer>.')
IN_A_TAG = "Answer only with the number in a tag, such as <answer>3</answer>."
RATE = ('This image was drawn for the prompt "{}". Rate how well it fits the prompt and how good '
        'it looks, from 1 (bad) to 5 (excellent). ' + IN_A_TAG)


def phrasing(images, ours, theirs):
    """The classroom VLM's own question, or the one for everybody else's."""
    return theirs if JUDGE.model or JUDGE.url or not classroom(images) else ours.replace(IMAGE, "")


# A judge that does not keep to the tag may still state its answer: the last sentence then says
# nothing else. Mere mention is no preference: "the second is worse than the first"; nor is the
# last word of an answer that was cut off: "The first is better in color. The second".
FIRST, SECOND = (f"(?:the )?(?:{one}|(?:image |picture |option )?{n})(?: image| picture| one)?"
                 for one, n in (("first", 1), ("second", 2)))
PREFERENCE = "|".join((
    "(?:my |the )?(?:answer|choice|winner|(?:better|best)(?: image| picture| one)?)(?:: | is )X",
    "X (?:is|looks|fits the prompt|matches the prompt)(?: clearly| much| slightly)? better"
    "(?: than (?:the other(?: one)?|Y))?",
    "i (?:prefer|choose|pick) X(?: (?:over|to) Y)?"))
NUMBER = r"(\d+(?:\.\d+)?)(?: ?(?:/|out of) ?(\d+))?"
SCORE = rf"\b(?:score|rating)(?: \(.*?\))?(?:: ?| is ){NUMBER}(?![\w-])"


def in_the_end(answer):
    """-> in lower case, without emphasis and quotes, what a judge's last <answer> tag holds; where
    there is none, all that stands behind its thoughts."""
    text = re.sub(r"(?s)^.*</think>|<think>.*|[*_`\"]", "", (answer or "").lower())
    return (re.findall(r"(?s)<answer>(.*?)(?:</answer>|$)", text) or [text])[-1].strip()


def choice(answer):
    """-> 1 if the first image is called better, 0 the second, 1/2 for a tie; NaN where the answer
    does not end by stating one of these."""
    text = in_the_end(answer).rstrip(".! ")
    last = re.split(r"(?<=[.!?\n])\s+", text)[-1]
    if re.fullmatch("(?:it is )?(?:a )?tie", last):
        return 0.5
    for value, x, y in ((1.0, FIRST, SECOND), (0.0, SECOND, FIRST)):
        preferred, why = PREFERENCE.replace("X", x).replace("Y", y), "(?:,? because .*)?"
        if re.fullmatch(x + why, text) or re.fullmatch(f"(?:{preferred}){why}", last):
            return value
    return math.nan


def rating(answer):
    """A number of 1 to 5, yes or no -> [0,1]: the whole answer, or the last score that it states.
    NaN where that is off the scale, and where there is none."""
    text = in_the_end(answer).rstrip(".! ")
    if text in ("yes", "no"):
        return float(text == "yes")
    found = re.fullmatch(NUMBER, text) or [None, *re.finditer(SCORE, text)][-1]
    if not found or found[2] not in (None, "5") or not 1 <= float(found[1]) <= 5:
        return math.nan
    return float(found[1]) / 5


def agrees(answer):
    """The classroom's VLM says yes, or no and why -> 1, 0; NaN where it says neither."""
    yes = verdict(answer)[0]
    return math.nan if yes is None else float(yes)


def read_answers(read, answers, said):
    """read(answer) of each, NaN where there is no answer; `said`, a list or None, keeps both."""
    values = [math.nan if a is None else read(a) for a in answers]
    if said is not None:
        said += zip(answers, values)
    return values


def preference(images, metas, group, said=None):
    """Pairwise judge (Pref-GRPO, DeepGen): the share of its group that an image beats, in [0,1].

    Every pair is asked in both orders, so that a judge who likes the first image moves nobody
    (DeepGen asks once), and a group's mean is 1/2. An answer that says nothing usable is a tie. A
    pair of which one answer failed is left out; an image without any pair is NaN.
    said: see score."""
    text, x = phrasing(images, WHICH, BETTER), arrays(images)
    pairs = [(a + i, a + j) for a in range(0, len(x), group)
             for i in range(group) for j in range(group) if i != j]
    for a in range(0, len(x), group):
        assert len({m["prompt"] for m in metas[a : a + group]}) == 1, "a group shares its prompt"
    if group == 1:
        return torch.full((len(x),), 0.5)
    answers = ask_all([([x[i], x[j]], text.format(metas[i]["prompt"])) for i, j in pairs])
    firsts = np.nan_to_num(read_answers(choice, answers, said), nan=0.5)
    answers = dict(zip(pairs, answers))
    won, asked = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x))
    for (i, j), first in zip(pairs, firsts):
        if answers[i, j] is not None and answers[j, i] is not None:
            won[i] += first
            won[j] += 1 - first
            asked[[i, j]] += 1
    return (won / asked).float()                                 # 0 / 0 is NaN


def judged(images, metas, group, said=None):
    """`--reward judge`, pointwise, in [0,1]: a rating from 1 to 5, divided by 5 (Flow-GRPO, which
    makes an answer without a number 0; here it is a failure); the classroom's says yes or no.
    said: see score."""
    text = phrasing(images, MATCH, RATE)
    read = rating if text == RATE else agrees
    answers = ask_all([([x], text.format(m["prompt"])) for x, m in zip(arrays(images), metas)])
    return torch.tensor(read_answers(read, answers, said))


# Two questions, of which the lower answer counts (as VIEScore): an untouched image keeps all, a
# new one may show the change.
DONE = ('The second image should be the first after the edit "{}". Rate how well that was done, '
        "from 1 (not at all) to 5 (perfectly). " + IN_A_TAG)
KEPT = ('The second image should be the first after the edit "{}". Rate how well all that the edit '
        "does not concern stayed the same, from 1 (not at all) to 5 (perfectly). " + IN_A_TAG)


def edit_judge(images, metas, group, said=None):
    """Pointwise judge of edits, in [0,1]: is it done, is all else as it was? The classroom's VLM is
    asked what it has learned, whether the image matches the target's caption, which names every
    thing; where they are it is not asked. said: see score."""
    R, rows = torch.full((len(metas),), math.nan), able("edit_judge", metas)
    texts, read = [phrasing(images, MATCH, t) for t in (DONE, KEPT)], rating
    if texts[0] == texts[1]:                                     # the classroom's
        rows, read = [i for i in rows if metas[i].get("target_meta")], agrees
        asked = [([x], texts[0].format(metas[i]["target_meta"]["prompt"]))
                 for i, x in zip(rows, arrays(images[rows]))]
    else:
        asked = [([old, new], text.format(metas[i]["instruction"])) for text in texts
                 for i, old, new in zip(rows, sources(metas, rows), arrays(images[rows]))]
    if rows:
        rated = torch.tensor(read_answers(read, ask_all(asked), said)).view(-1, len(rows))
        R[rows] = torch.where(rated.isnan().any(0), math.nan, rated.amin(0))
    return R


# ---------------------------------------------------------------------------------------------
# A judge of edits that learns (UniPic2's Skywork-EditReward): a VLM reads source, edited image and
# instruction; of the state after the last token a linear layer makes a score. sft.py trains it.


class EditReward(torch.nn.Module):
    """name: a VLM's folder, or owner/repo on the Hub; with head.safetensors one that save wrote.
    Skywork has published neither template nor head, only "regression loss": these are ours."""

    def __init__(self, name):
        super().__init__()
        # Eager attention on a CPU: the fused kernel's backward is 3 times slower there.
        self.vlm = pretrained(AutoModelForImageTextToText, name, dtype=torch.float32,
                              attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
        self.feed = processor(AutoProcessor, name)
        self.feed.tokenizer.padding_side = "left"                # each row's last token is its last
        self.head = torch.nn.Linear(self.vlm.config.get_text_config().hidden_size, 1)
        [torch.nn.init.zeros_(p) for p in self.head.parameters()]    # on every rank the same
        if (file := Path(name) / "head.safetensors").exists():
            self.head.load_state_dict(read_safetensors(file)[0])

    def forward(self, olds, news, instructions):
        """Lists of N uint8 (H,W,3) images, N strings -> scores (N,) fp32"""
        x = turns(self.feed, list(zip(zip(olds, news), instructions)))
        device = self.head.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16()):
            states = self.vlm.model(**x.to(device), use_cache=False).last_hidden_state
        return self.head(states[:, -1].float())[:, 0]                            # (N,)

    def save(self, folder):
        """A folder of the VLM, a LoRA merged, as transformers has it, and head.safetensors."""
        folder, new = Path(folder), Path(f"{folder}.tmp")
        new.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        vlm = copy.deepcopy(self.vlm)
        for name, layer in list(vlm.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                vlm.set_submodule(name, layer.get_base_layer())
        vlm.save_pretrained(new)
        self.feed.save_pretrained(new)
        save_file(dict(self.head.state_dict()), new / "head.safetensors")
        for f in new.iterdir():
            os.replace(f, folder / f.name)
        new.rmdir()


@cache
def edit_reward(folder):
    if not (Path(folder) / "head.safetensors").exists():
        fail(f"no edit reward model at {folder}: python sft.py --task reward trains one")
    return to_device(EditReward(folder))


@torch.no_grad()
def edit_model(images, metas, group):
    """The score of EditReward, about [0,1], from MODELS["edit_model"]."""
    R, rows = torch.full((len(metas),), math.nan), able("edit_model", metas)
    for some in (rows[a : a + 32] for a in range(0, len(rows), 32)):
        R[some] = edit_reward(MODELS["edit_model"])(
            sources(metas, some), list(arrays(images[some])),
            [metas[i]["instruction"] for i in some]).cpu()
    return R


def scored_edit(rng):
    """One example of the classroom: (source, edited, instruction, score), the score being the
    checker's. Edited by the target itself or, where one must be found wanting: nothing, another
    edit, a redrawn scene, the target with one thing more changed."""
    row = sample_edit(rng)
    shown, made = row["target"], rng.choice(["target", "source", "wrong", "redrawn", "more"])
    while shown is row["target"] and made != "target":
        if made == "source":
            shown = row["source"]
        elif made == "redrawn":
            shown = scene_for(row["target_meta"], rng)
        else:
            start = row["target" if made == "more" else "source"]
            other = edit_scene(start, rng.choice(KINDS), rng)    # None: no room, nothing to move
            shown = other[0] if other else row["target"]
    image = render(shown)
    v = judge_edit(image, row)
    return render(row["source"]), image, row["instruction"], v["success"] * v["preservation"]


def read_scored(path):
    """jsonl of source, edited (images beside it), instruction, score -> list of examples, as
    scored_edit's but with files for images; a bad line raises ValueError with its number."""
    rows = []
    for i, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            files = [Path(path).parent / row[k] for k in ("source", "edited")]
            rows.append((*files, str(row["instruction"]), float(row["score"])))
            good = all(f.is_file() for f in files) and math.isfinite(rows[-1][3])
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise ValueError(f"{path}, line {i}: not a JSON object with `source` and `edited`, "
                             "files in its folder, `instruction` and a number `score`")
    return rows


def spearman(a, b):
    """Rank correlation in [-1,1]; equal values share their mean rank, 0 where all are equal."""
    if not (np.ptp(a) and np.ptp(b)):
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


REWARDS = {f.__name__: f for f in (
    geneval, geneval_strict, ocr, clip, clip_direction, clip_image, pickscore, aesthetic, hpsv2,
    preference, edit, edit_judge, edit_model, jpeg_compressibility, jpeg_incompressibility)} | {
    "judge": judged}
JUDGES = {"preference", "judge", "edit_judge"}                   # they take `said`, see score


def parse_weights(text):
    """ "geneval:0.8,jpeg_compressibility:0.2" -> {"*": {name: weight}}; no number means 1."""
    weights = {}
    for item in text.split(","):
        name, _, number = item.strip().partition(":")
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}; valid: {', '.join(REWARDS)}")
        if name in weights:
            raise ValueError(f"reward {name!r} is given twice")
        try:
            weights[name] = float(number or 1)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"weight of reward {name!r} is not a number: {number!r}")
    if not any(weights.values()):
        raise ValueError(f"every weight in {text!r} is 0: nothing to train on")
    return {"*": weights}


def score(images, metas, group, weights, said=None):
    """-> R (N,K) rewards, W (N,K) their weights, names (K).

    weights {category: {name: weight}}; "*" holds for prompts of any other category (a meta's
    `category`, or its `tag`).  A reward runs only where its weight is not 0; elsewhere, and where
    it fails or is not finite, R is NaN, never 0: check_scored counts R.isnan() & (W != 0).
    said: a dict that gets what judges answer, {reward: [(answer or None, its value or NaN)]}."""
    if len(images) != len(metas) or len(images) % group:
        raise ValueError(f"{len(images)} images, {len(metas)} prompts, groups of {group}")
    names = list(dict.fromkeys(k for w in weights.values() for k, x in w.items() if x))
    if unknown := [k for k in names if k not in REWARDS]:
        raise ValueError(f"unknown reward {unknown[0]!r}; valid: {', '.join(REWARDS)}")
    mine = []
    for m in metas:
        category = m.get("category", m.get("tag"))
        if category not in weights and "*" not in weights:
            raise ValueError(f"no reward weights for category {category!r}, and no '*'")
        mine.append(weights.get(category, weights.get("*")))
    W = torch.tensor([[float(w.get(k, 0)) for k in names] for w in mine])  # (N,K)
    R = torch.full_like(W, math.nan)
    images = images.cpu()  # once, not once per reward
    for k, name in enumerate(names):
        rows = W[:, k].nonzero()[:, 0]
        if len(rows):
            heard = [] if said is None or name not in JUDGES else [said.setdefault(name, [])]
            R[rows, k] = REWARDS[name](images[rows], [metas[i] for i in rows.tolist()], group,
                                       *heard)
    return R.masked_fill(~R.isfinite(), math.nan), W, names


def check_scored(R, W, names, said, args, step, where):
    """Did rewards R with weights W (N,K), and the judges' answers `said` (see score), say anything?
    -> columns of the log, where above 0: failed_<reward>, of the images it was to score the share
    it could not; unparsed_<reward>, of a judge's answers the share that says nothing usable. Over
    all ranks, which all call it; a share above --max-failed ends the run on each of them."""
    tried = W != 0                                   # a failure moves nothing, but counts
    failed = tried & R.isnan()
    heard = [said.get(name, []) for name in names]
    idle = [[a for a, value in its if a is not None and math.isnan(value)] for its in heard]
    failed, tried, unparsed, asked = torch.tensor(all_mean(
        [*failed.sum(0), *tried.sum(0), *map(len, idle), *map(len, heard)])).view(4, -1)     # (K,)
    failed, unparsed = failed / tried.clamp(min=1e-9), unparsed / asked.clamp(min=1e-9)
    examples = [f" The judge said, for instance, {its[0][:80]!r}" if its else "" for its in idle]
    k = int(unparsed.argmax())
    if unparsed[k] > args.max_failed:                # on every rank, so all stop
        fail(f"reward {names[k]!r}: {unparsed[k]:.0%} of the judge's answers of update {step + 1} "
             f"say nothing usable, above --max-failed.{examples[k]}")
    k = int(failed.argmax())
    if failed[k] > args.max_failed:
        fail(f"reward {names[k]!r} failed for {failed[k]:.0%} of the images of update {step + 1}, "
             f"above --max-failed: does {where} hold what it reads? {JUDGE.error}{examples[k]}")
    return {f"{what}_{name}": x for what, share in (("failed", failed), ("unparsed", unparsed))
            for name, x in zip(names, share.tolist()) if x}


def held_out_score(R, W):
    """Rewards of held-out pictures and their weights (N,K) -> dict(score=...), the weighted mean of
    those that could be had; {} where none could."""
    W = W * ~R.isnan()
    return dict(score=((R.nan_to_num() * W).sum() / W.sum()).item()) if W.any() else {}


# ---------------------------------------------------------------------------------------------
# The benchmark: GenEval at classroom scale.

PROMPTS = Path(__file__).parent / "data/shapes/prompts"


def read_prompts(path):
    """jsonl in GenEval's schema -> list of rows; a bad line raises ValueError with its number."""
    rows = []
    for i, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            good = isinstance(row["prompt"], str) and all(
                want["count"] > 0 and want["class"] for want in row.get("include", []))
            named = {want["class"] for k in ("include", "exclude") for want in row.get(k, [])}
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise ValueError(f"{path}, line {i}: not a JSON object with `prompt` and, if it has "
                             "`include`, `class` and `count` in each part of that")
        if not (named <= set(SHAPES) or named <= set(COCO)):     # no detector sees both worlds
            raise ValueError(f"{path}, line {i}: {', '.join(sorted(named))}: not all shapes of the "
                             "classroom, nor all among GenEval's 80 names: SHAPES, COCO in eval.py")
        rows.append(row)
    return rows


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


def table(rows, judged):
    """judge()'s dicts, n for each of P rows -> metrics, x_se being the standard error of x, and
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
    out, right = table(rows, [[judge(x, r) for x in xs] for r, xs in zip(rows, images)])

    def add(name, values):
        out[name], out[name + "_se"] = mean_and_error(values, rows)

    if n > 1:  # RMS pixel distance, 0 ... 1, of all pairs of a row's images
        i, j = np.triu_indices(n, 1)
        flat = images.reshape(P, n, -1) / np.float32(255)
        add("diversity", np.stack([np.sqrt(((f[i] - f[j]) ** 2).mean(1)) for f in flat]))
    add("jpeg_kb", np.array([[jpeg_kb(x) for x in xs] for xs in images]))
    return out, right


def spread(rows, k):
    """Indices of (at most) k rows of every tag, evenly spaced: always the same choice."""
    tags = by_tag(rows).values()
    return [of[a * len(of) // min(k, len(of))] for of in tags for a in range(min(k, len(of)))]


def draw_rows(draw, rows, chosen, n, name=""):
    """n images for each rows[i], i in chosen -> numpy (P,n,64,64,3); draw: see bench_shapes."""
    todo = [(rows[i]["prompt"], 1000 * i + j) for i in chosen for j in range(n)]
    images = []
    for a in tqdm(range(0, len(todo), 64), name, unit="batch", disable=None):
        images.append(draw(*map(list, zip(*todo[a : a + 64]))).cpu())
    return arrays(torch.cat(images)).reshape(-1, n, SIDE, SIDE, 3)


def bench_shapes(draw, n_per_prompt=4, limit=None, png=None):
    """GenEval at classroom scale -> flat dict of metrics, with `unseen` for the held-out pairs.

    draw(prompts, seeds) -> uint8 (N,3,64,64).  An image's seed depends on its prompt's line and its
    number among n_per_prompt only, so a limited run draws some of the full run's very images.
    limit: at most so many images, equally many per tag, and no unseen split; n_per_prompt=1 then
    gives the smallest error.  png: a grid of four prompts per tag, right framed green."""
    results = {}
    for split in ["eval"] if limit else ["eval", "unseen"]:
        rows = read_prompts(PROMPTS / f"{split}.jsonl")
        k = limit // n_per_prompt // len(by_tag(rows)) if limit else len(rows)
        assert k, f"limit={limit} images do not reach every tag with {n_per_prompt} per prompt"
        chosen = spread(rows, k)
        images = draw_rows(draw, rows, chosen, n_per_prompt, split)
        rows = [rows[i] for i in chosen]
        out, right = summary(rows, images)
        results |= out if split == "eval" else {split: out}
        if png and split == "eval":
            show = spread(rows, 4)
            grid(images[show, 0], [rows[i]["prompt"] for i in show], png, right[show, 0] == 1)
    return results


def edit_table(rows, judged):
    """judge_edit's dicts, n for each of P rows -> metrics over the kinds (a row's tag), x_se being
    the standard error of x. `both` is sqrt(mean success x mean preservation), not a mean of roots;
    its error is that of its linear part, for the two means correlate."""
    s, p = (np.array([[v[k] for v in vs] for vs in judged]) for k in ("success", "preservation"))
    units = [dict(tag=row["tag"], prompt=str(i)) for i, row in enumerate(rows)]   # each its own
    out = dict(images=s.size)
    for kind, mine in {"": range(len(rows)), **by_tag(rows)}.items():
        a, b, who = s[mine], p[mine], [units[i] for i in mine]
        (ms, es), (mp, ep) = mean_and_error(a, who), mean_and_error(b, who)
        both = math.sqrt(ms * mp)
        eb = mean_and_error((mp * a + ms * b) / (2 * both), who)[1] if both else 0.0
        for name, mean, error in ((kind or "success", ms, es), (f"{kind} preservation", mp, ep),
                                  (f"{kind} both", both, eb)):
            out[name.strip()], out[name.strip() + "_se"] = mean, error
    return out


def bench_edit(edit, n_per_row=1, limit=None, png=None, draw=None):
    """The classroom's held-out edits -> flat dict of metrics, see edit_table.

    edit(instructions, images, seeds) -> uint8 (N,3,64,64), images N lists of one uint8 (3,64,64). A
    seed depends on its row and its number among n_per_row only.  limit: at most so many images,
    equally many per kind.  png: four rows per kind, source and edited, right ones framed green.
    draw(prompts, seeds), if given, adds what two that do not edit score: `identity`, the source
    itself, and `redrawn`, the target's caption drawn from scratch."""
    rows = [json.loads(line) for line in (PROMPTS / "edit_eval.jsonl").read_text().splitlines()]
    rows = [dict(row, tag=row["kind"]) for row in rows]
    k = limit // n_per_row // len(by_tag(rows)) if limit else len(rows)
    assert k, f"limit={limit} images do not reach every kind with {n_per_row} per row"
    chosen, results = spread(rows, k), {}
    mine = [rows[i] for i in chosen]
    source = np.stack([render(row["source"]) for row in mine])                   # (P,64,64,3)
    todo = [(j, 1000 * i + m) for j, i in enumerate(chosen) for m in range(n_per_row)]
    painters = {"": edit, "identity": lambda says, x, seeds: torch.stack([own for own, in x]),
                "redrawn": draw}
    for name, painter in painters.items() if draw else [("", edit)]:
        images = []
        for a in tqdm(range(0, len(todo), 64), name or "edit", unit="batch", disable=None):
            now, seeds = zip(*todo[a : a + 64])
            if painter is draw:
                images.append(draw([mine[j]["target_meta"]["prompt"] for j in now], list(seeds)))
                continue
            seen = [[torch.from_numpy(source[j]).permute(2, 0, 1)] for j in now]
            images.append(painter([mine[j]["instruction"] for j in now], seen, list(seeds)))
        images = arrays(torch.cat([x.cpu() for x in images])).reshape(
            -1, n_per_row, SIDE, SIDE, 3)
        judged = [[judge_edit(x, row) for x in xs] for row, xs in zip(mine, images)]
        out = edit_table(mine, judged)
        results |= {name: out} if name else out
        if png and not name:
            show = spread(mine, 4)
            pairs = np.stack([source[show], images[show, 0]], 1).reshape(-1, SIDE, SIDE, 3)
            right = [judged[i][0]["success"] * judged[i][0]["preservation"] == 1 for i in show]
            grid(pairs, [t for i in show for t in (mine[i]["instruction"], "")], png,
                 [f for r in right for f in (None, r)])
    return results


# ---------------------------------------------------------------------------------------------
# Words: thoughts before a drawing, second looks at one, answers to questions.


def in_batches(f, *columns):
    """f of 64 rows at a time of columns of equal length -> its answers, put together."""
    parts = [f(*(c[a : a + 64] for c in columns)) for a in tqdm(
        range(0, len(columns[0]), 64), unit="batch", disable=None)]
    return [row for part in parts for row in part]


def choose(name, n, limit):
    """Rows of a prompt file, at most `limit` // n of them, equally many per tag, and the seeds of n
    samples of each, which depend on a row's line and a sample's number only."""
    rows = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]
    k = limit // n // len(by_tag(rows)) if limit else len(rows)
    assert k, f"limit={limit} does not reach every tag with {n} samples of a row"
    chosen = spread(rows, k)
    return [rows[i] for i in chosen], [1000 * i + j for i in chosen for j in range(n)]


def see(scene):
    """-> uint8 (3,64,64)"""
    return torch.from_numpy(render(scene)).permute(2, 0, 1)


def answer_of(text):
    """What words say in the end: within <answer>, or all; case and full stop are nothing."""
    said = spans(text)["answer"] if "<answer>" in text else text
    return said.strip().removesuffix(".").lower()


def word_table(rows, **columns):
    """Columns of n values for each of P rows, in a row -> {name: mean, name_se: its error}."""
    out = {}
    for name, values in columns.items():
        values = np.array(values, np.float64).reshape(len(rows), -1)
        out[name], out[name + "_se"] = mean_and_error(values, rows)
    return out


def bench_reason(draw, think, n_per_prompt=4, limit=None, png=None):
    """The held-out riddles, drawn from as they stand (raw) and after reasoning -> flat dict.

    draw(prompts, seeds) -> uint8 (N,3,64,64); think -> the same, and the Words that were thought.
    raw, score  share of pictures that show what the riddle means, by GenEval's rule
    answer      share of thoughts that end in the right prompt, words for words
    format      share that think and answer in their tags, and do nothing else
    words       of a thought
    png: riddles drawn both ways, what was thought below, right ones framed green."""
    rows, seeds = choose("reason", n_per_prompt, limit)
    rows_n = [row for row in rows for _ in range(n_per_prompt)]
    prompts = [row["prompt"] for row in rows_n]
    plain = in_batches(draw, prompts, seeds)

    def told(prompts, seeds):
        images, words = think(prompts, seeds)
        return zip(images, words.texts)
    images, said = zip(*in_batches(told, prompts, seeds))
    drawn = [arrays(torch.stack(list(x)).cpu()) for x in (plain, images)]
    raw, right = ([judge(x, row)["correct"] for x, row in zip(xs, rows_n)] for xs in drawn)
    if png:
        show = [i * n_per_prompt for i in spread(rows, 16)]
        grid(np.stack([drawn[0][show], drawn[1][show]], 1).reshape(-1, SIDE, SIDE, 3),
             [t for i in show for t in (prompts[i], said[i])], png,
             [f[i] for i in show for f in (raw, right)])
    return dict(images=len(said)) | word_table(
        rows, raw=raw, score=right, format=[spans(t)["ok"] for t in said],
        answer=[answer_of(t) == row["answer"] for t, row in zip(said, rows_n)],
        words=[len(t.split()) for t in said])


def bench_reflect(reflect, n_per_row=1, limit=None, png=None, name="reflect"):
    """Held-out first pictures, half of them right, are judged and drawn again -> flat dict; with
    `known`, unless there is a limit: the same of pictures of prompts that RL knows.

    reflect(prompts, images, seeds) -> the last pictures, uint8 (N,3,64,64), and N lists of what was
    said in each round; images uint8 (N,3,64,64). limit: at most so many first pictures.
    accuracy   share of first verdicts that are right; of those on wrong pictures: caught, on right
               ones: spared; then by tag
    corrected  share of the wrong first pictures whose last picture is right, by GenEval's rule
    damaged    share of the right ones whose last picture is wrong
    score      share of last pictures that are right; one half is where it starts
    format     share of first critiques that say yes, or no and why
    words      of a first critique
    png: first and last, the prompt and what was said below, right ones framed green."""
    rows, seeds = choose(name, 2 * n_per_row, limit)
    looks = [(row, side) for row in rows for side in ("wrong", "right") for _ in range(n_per_row)]
    prompts = [row["prompt"] for row, _ in looks]
    firsts = torch.stack([see(row[side]) for row, side in looks])                # (N,3,64,64)
    last, said = zip(*in_batches(lambda *x: zip(*reflect(*x)), prompts, firsts, seeds))
    last = arrays(torch.stack(last).cpu())
    good = np.array([judge(x, row)["correct"] for x, (row, _) in zip(last, looks)])
    truth = np.array([side == "right" for _, side in looks])
    yes, form = zip(*[verdict(words[0]) for words in said])
    told = np.array([y is t for y, t in zip(yes, truth.tolist())])               # neither is wrong
    if png:
        show = [j for i in spread(rows, 2) for j in (2 * i * n_per_row, (2 * i + 1) * n_per_row)]
        grid(np.stack([arrays(firsts[show]), last[show]], 1).reshape(-1, SIDE, SIDE, 3),
             [t for i in show for t in (prompts[i], " / ".join(said[i]))], png,
             [f[i] for i in show for f in (truth, good)])
    out = dict(images=len(looks)) | word_table(
        rows, accuracy=told, caught=told[~truth], spared=told[truth], corrected=good[~truth],
        damaged=~good[truth], score=good, format=form, words=[len(t[0].split()) for t in said])
    told = told.reshape(len(rows), -1)
    for tag, mine in by_tag(rows).items():
        out |= word_table([rows[i] for i in mine], **{tag: told[mine]})
    if name == "reflect" and not limit:
        out["known"] = bench_reflect(reflect, n_per_row, name="reflect_known")
    return out


def bench_vqa(answer, name="vqa", n_per_row=1, limit=None, png=None):
    """Held-out questions, about pictures (vqa) or not (textqa) -> flat dict.

    answer(questions, images, seeds) -> N texts; images: N lists of one uint8 (3,64,64), or None.
    accuracy: mean over kinds of the share of right answers; then by kind. words: of an answer.
    png: pictures, question and answer below, right ones framed green; of textqa a table, .md."""
    rows, seeds = choose(name, n_per_row, limit)
    rows = [dict(row, prompt=str(i)) for i, row in enumerate(rows)]              # each its own
    looks = [row for row in rows for _ in range(n_per_row)]
    questions = [row["question"] for row in looks]
    if name == "vqa":
        images = [[see(row["scene"])] for row in looks]
        said = in_batches(answer, questions, images, seeds)
    else:
        said = in_batches(lambda q, s: answer(q, None, s), questions, seeds)
    right = np.array([answer_of(t) == row["answer"].lower() for t, row in zip(said, looks)])
    show = [i * n_per_row for i in spread(rows, 8)]
    if png and name == "textqa":
        show_answers(*([of[i] for i in show] for of in (questions, said, right)), png)
    elif png:
        grid(torch.stack([images[i][0] for i in show]),
             [f"{questions[i]} {said[i]}" for i in show], png, right[show])
    out = dict(answers=len(said)) | word_table(rows, accuracy=right)
    right = right.reshape(len(rows), -1)
    for tag, mine in by_tag(rows).items():
        out |= word_table([rows[i] for i in mine], **{tag: right[mine]})
    return out | word_table(rows, words=[len(t.split()) for t in said])


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
    fig.savefig(f"{path}.tmp", dpi=110, format="png")
    plt.close(fig)
    os.replace(f"{path}.tmp", path)


def grid(images, captions, path, frames=None, columns=8):
    """PNG of images, uint8 (N,3,H,W) torch or (N,H,W,3) numpy, captions below; frames: N of True
    (green), False (red) or None."""
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
    page.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


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
    wide = max(15, *(len(k) + 1 for k in keys))
    print(f"{'':{wide}}" + "".join(f"{name:>17}" for name, _ in columns))
    for k in keys:
        cells = [f"{r[k]:9.3f} ± {r[k + '_se']:5.3f}" if k in r else "" for _, r in columns]
        print(f"{k:{wide}}" + "".join(f"{c:>17}" for c in cells))


BENCHMARKS = ("shapes", "geneval", "shapes-edit", "shapes-reason", "shapes-reflect", "shapes-vqa")


@dataclass
class Args:
    bench: str = flag("shapes", f"which benchmark: {', '.join(BENCHMARKS)}",
                      group="What matters most")
    init: str = flag("data/shapes/sft", "a checkpoint; with --preset also the folder of a "
                     "diffusers DiT or peft LoRA, or none: empty")
    preset: str = flag("", "which model, by its name in PRESETS (model.py); empty: as --init says")
    out: str = flag("", "folder for results and images; empty: they are only printed")
    steps: int = flag(10, "ODE steps of a drawing, one DiT forward each")
    solver: str = flag("", "of the ODE: euler, or dpm, of second order; empty: the preset's")
    guidance: float = flag(1.0, "weight of the prompt; 1: no guidance, and half the forwards")
    image_guidance: float = flag(1.0, "of edits, weight of the source; 1: no guidance by it")
    seed: int = flag(0, "0 to 2**63 - 1; another seed draws other noise")

    guidances: str = flag("", "of edits, several such as 1,3,5,7: their trade-off, as a picture",
                          group="More of single benchmarks")
    temperature: float = flag(1.0, "of drawing words, as in training; 0: the likeliest ones")
    limit: int = flag(64, "most tokens that a thought or an answer may have")
    rounds: int = flag(1, "of shapes-reflect: most looks at a picture; a yes ends them")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own",
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")


def main():
    if sys.argv[1:2] == ["--write-prompts"]:
        return write_prompts(*sys.argv[2:])
    args = parse(Args, __doc__)
    if args.bench not in BENCHMARKS:
        fail(f"unknown benchmark {args.bench!r}; there are: {', '.join(BENCHMARKS)}")
    out = Path(args.out) if args.out else None
    if out and (out / "results.json").exists():
        fail(f"{out} holds the results of another run: choose another --out")
    try:
        guidances = [float(g) for g in args.guidances.split(",") if g] or [args.guidance]
    except ValueError:
        fail(f"--guidances {args.guidances!r}: numbers with commas between them, such as 1,3,5,7")
    if args.guidances and not (args.bench == "shapes-edit" and out):
        fail("--guidances draws the curve of --bench shapes-edit into --out, a folder")
    if args.temperature < 0 or min(args.limit, args.rounds) < 1:
        fail("--temperature is not below 0, --limit and --rounds at least 1")
    if args.bench == "geneval" and not out:
        fail("--bench geneval needs --out, a folder for its images")
    rank, world, device = setup()
    to_draw = args.init or args.preset or args.bench != "geneval"    # else score what --out holds
    if to_draw:
        model = Unified.load(args.init, args.preset, **given_parts(args)).slim(device).to(device)
        if out:
            out.mkdir(parents=True, exist_ok=True)

    def draw(prompts, seeds):
        return model.draw(prompts, seeds, args.steps, args.guidance)

    def keys(seeds):
        return [key(args.seed, 0, i) for i in seeds]

    def draw_seeded(prompts, seeds):
        return draw(prompts, keys(seeds))

    def think(prompts, seeds):
        return model.think(prompts, keys(seeds), args.steps, args.guidance, args.limit,
                           args.temperature)

    def reflect(prompts, images, seeds):
        return model.reflect(prompts, images, keys(seeds), args.rounds, args.steps, args.guidance,
                             args.limit)

    def answer(questions, images, seeds):
        return model.generate(questions, images, "ask", args.limit, args.temperature,
                              keys=keys(seeds)).texts

    if args.bench == "geneval":
        if to_draw:
            draw_geneval(draw, out, args.seed, rank, world, dict(
                size=model.cfg.size, steps=args.steps, guidance=args.guidance,
                preset=model.cfg.preset, init=args.init,
                **given_parts(args) | dict(solver=model.cfg.solver, grid=model.cfg.grid)))
        if rank:
            return
        results = score_geneval(out)
    elif args.bench == "shapes-edit":
        def edit_at(g):
            return lambda says, images, seeds: model.edit(
                says, images, keys(seeds), args.steps, g, args.image_guidance)
        runs = {f"guidance {g:g}": bench_edit(edit_at(g), png=out and out / f"edits_{g:g}.png",
                                              draw=draw_seeded if g == guidances[0] else None)
                for g in guidances}
        results = runs if len(runs) > 1 else runs[f"guidance {guidances[0]:g}"]
        if args.guidances:
            plot_trade_off({args.init: runs}, out / "trade_off.png")
    elif args.bench == "shapes-reason":
        results = bench_reason(draw_seeded, think, png=out and out / "thoughts.png")
    elif args.bench == "shapes-reflect":
        results = bench_reflect(reflect, png=out and out / "reflections.png")
    elif args.bench == "shapes-vqa":
        results = bench_vqa(answer, png=out and out / "answers.png")
        results["text"] = bench_vqa(answer, "textqa")
    else:
        results = bench_shapes(draw_seeded, png=out and out / "samples.png")
    show_table(runs if args.bench == "shapes-edit" else
               {"held out" if args.bench == "shapes" else args.bench: results})
    if out:
        about = asdict(args) if to_draw else dict(bench=args.bench, out=args.out)
        write(out / "results.json", json.dumps(about | results, indent=1))


if __name__ == "__main__":
    main()
