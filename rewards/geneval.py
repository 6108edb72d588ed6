"""GenEval: of the classroom's pictures by its detector; of photos by Mask2Former, which finds
things, and CLIP, which names their colours. One rule for both: evaluate, in data/shapes/judge.py.

Departs from the original in its detector's weights, the authors' own in place of mmdet's: 0.9 for
counting is the sensitive threshold, calibrate before quoting. Flow-GRPO's reward also turns each
image into a JPEG and swaps red and blue on the way to the detector; here it does neither.
"""

import hashlib
import json
import math
from functools import cache

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from common.read import arrays
from common.run import fail
from common.weights import differ, fetch
from data.shapes.judge import evaluate, extra_objects
from data.shapes.judge import check as check_shapes
from data.shapes.world import COLORS, RELATIONS, SHAPES, TAGS, article, make_meta, plural
from rewards.shared import to_device
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


def check_photos(images, rows):
    """Real images, uint8 (N,H,W,3), and what each should show -> N dicts, as check."""
    out = []
    for image, meta, things in zip(images, rows, detect_coco(images)):
        for want in meta["include"]:
            mine = [t for t in things if t["class"] == want["class"]]
            if "color" in want and mine:
                name_colors(image, mine)
        out.append(dict(evaluate(things, meta, COCO_THRESHOLDS),
                        extra=extra_objects(things, meta, COCO_THRESHOLDS[0])))
    return out


def check(image, meta):
    """One image (H,W,3) -> dict(correct, strict, partial, extra)."""
    return check_photos(image[None], [meta])[0] if is_photo(meta) else check_shapes(image, meta)


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


def checked(images, rows, what):
    """check()'s verdict `what` where the meta has `include`, else NaN; photos eight at a time."""
    x = arrays(images)
    photos = [i for i, m in enumerate(rows) if m.get("include") and is_photo(m)]
    found = {}
    for b in (photos[a : a + 8] for a in range(0, len(photos), 8)):
        found |= zip(b, check_photos(x[b], [rows[i] for i in b]))
    found |= {i: check(x[i], m) for i, m in enumerate(rows)
              if i not in found and m.get("include") is not None}
    return torch.tensor([float(found[i][what]) if i in found else math.nan for i in range(len(x))])


def geneval(images, rows):
    """Partial GenEval score in [0,1]; of a sign, how well it reads."""
    return checked(images, rows, "partial")


def geneval_strict(images, rows):
    """1 where every count, colour and position is exact (of a sign, every character), else 0."""
    return checked(images, rows, "strict")
