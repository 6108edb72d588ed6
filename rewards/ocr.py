"""Does the picture say what its prompt quotes? PP-OCRv5: one network finds lines of text, another
reads them. transformers' own step between the two needs cv2; ours is axis-aligned, so that text at
an angle comes in a looser crop. The classroom's signs have a reader of their own.
"""

import math
import re
from functools import cache

import numpy as np
import torch
from scipy import ndimage
from transformers import (AutoImageProcessor, PPOCRV5MobileDetForObjectDetection,
                          PPOCRV5MobileRecForTextRecognition)

from common.read import arrays
from common.weights import pretrained
from data.shapes.judge import read_sign, text_match
from rewards.shared import MODELS, classroom, processor, to_device


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
def read_lines(images):
    """uint8 (N,H,W,3) -> N lists of an image's lines, in reading order"""
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
    texts, widths = [[] for _ in images], [c.shape[-1] for c in crops]
    read = [None] * len(crops)
    for w in set(widths):                                        # most are padded to 320
        mine = [k for k, own in enumerate(widths) if own == w]
        for k in torch.tensor(mine).split(64):
            out = rec(torch.cat([crops[j] for j in k]).to(rec.device))
            for j, r in zip(k.tolist(), squeeze.post_process_text_recognition(out)):
                read[j] = r["text"] if r["score"] >= 0.5 else ""  # PaddleOCR's drop_score
    for n, text in zip(owner, read):
        texts[n] += [text] if text else []
    return texts


def read_text(images):
    """-> N strings: all lines of an image, joined without a space (Flow-GRPO)"""
    return ["".join(lines) for lines in read_lines(images)]


# An apostrophe is no quotation mark: single ones stand at the ends of words.
QUOTES = '"(.+?)"', "\u201c(.+?)\u201d", r"(?<!\w)\u2018(.+?)\u2019(?!\w)", r"(?<!\w)'(.+?)'(?!\w)"


def wanted_text(meta):
    """What should stand in the picture: the row's `text`, or what its prompt has in "quotes",
    double before single ones. None without"""
    quoted = [text for marks in QUOTES for text in re.findall(marks, meta["prompt"])]
    return meta.get("text") or next((text for text in quoted if text.strip()), None)


def ocr(images, rows):
    """Flow-GRPO's text reward in [0,1], for prompts that quote a text."""
    targets = [wanted_text(m) for m in rows]
    which = [i for i, t in enumerate(targets) if t]
    R = torch.full((len(rows),), math.nan)
    if which:
        x = arrays(images[which])
        read = [read_sign(i) for i in x] if classroom(images) else read_text(x)
        R[which] = torch.tensor([text_match(r, targets[i]) for i, r in zip(which, read)])
    return R
