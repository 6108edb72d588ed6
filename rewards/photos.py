"""GenEval of photos, by models: Mask2Former finds things, CLIP names their colours.

Departs from the original in its detector's weights, the authors' own in place of mmdet's: 0.9 for
counting is the sensitive threshold, calibrate before quoting. Flow-GRPO's reward also turns each
image into a JPEG and swaps red and blue on the way to the detector; here it does neither.
"""

from functools import cache

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from common.run import fail, first_line
from common.weights import differ, fetch
from data.shapes.judge import evaluate, extra_objects
from data.shapes.world import COLORS
from rewards.prompts import COCO
from rewards.shared import to_device

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
COCO_THRESHOLDS = (0.3, 0.9)
COLOR_CLIP = ("ViT-L-14-quickgelu", "openai")  # `ViT-L-14` builds the wrong GELU and only warns


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
             + first_line(e))
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
        alone = np.where(t["mask"][..., None], image, np.uint8(0x99)) if "mask" in t else image
        crops.append(prepare(Image.fromarray(alone).crop(t["box"])))
    weights = color_weights(things[0]["class"], COLOR_CLIP)
    f = F.normalize(model.encode_image(torch.stack(crops).to(weights.device)), dim=-1)
    for t, k in zip(things, (f @ weights).argmax(1).tolist()):
        t["color"] = COLORS[k]


def look(image, meta, things):
    """What a detector has found in a photo (H,W,3): {class, score, box}, perhaps with mask or color
    -> the same, the colors that `meta` asks for named. Without a mask CLIP sees all of the box."""
    bare = [t for t in things if t.get("color") is None]
    for want in meta["include"]:
        mine = [t for t in bare if t["class"] == want["class"]]
        if "color" in want and mine:
            name_colors(image, mine)
    return things


def judge_photo(things, meta, thresholds=COCO_THRESHOLDS):
    """-> dict, as check. thresholds: the detector's least score, and that for counting"""
    extra = extra_objects(things, meta, thresholds[0])
    return dict(evaluate(things, meta, thresholds), extra=extra)


def check_photos(images, rows):
    """Real images, uint8 (N,H,W,3), and what each should show -> N dicts, as check."""
    return [judge_photo(look(image, meta, things), meta)
            for image, meta, things in zip(images, rows, detect_coco(images))]
