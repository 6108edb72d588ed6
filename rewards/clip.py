"""Rewards of CLIP and what was made of it: each loaded on first use, with its own preprocessing.
Images of 64x64 are the classroom's, for which its own small model stands in.
"""

import math
from functools import cache

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from common.read import arrays
from common.text_encoders import clip_words
from common.weights import pretrained
from common.words import token_rows
from rewards.shared import MODELS, able, classroom, hub_file, processor, sources, to_device


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


def cosine(model, images, rows):
    """Cosine of each image with its own prompt, (N,)."""
    see, read, _ = model
    return (embed(see, arrays(images)) * embed(read, [m["prompt"] for m in rows])).sum(1)


def clip(images, rows):
    """Cosine of image and prompt: ViT-L gives 0.15 to 0.35; the prompt is cut at 77 tokens.
    Departs from Flow-GRPO's code, which shrinks images bilinearly: here bicubic, as CLIP does."""
    return cosine(clip_for(images), images, rows)


def clip_direction(images, rows):
    """An edit's direction, cos(image - source, target caption - source caption) in [-1,1].

    For rows with `source_image` and `captions`, (source's, target's)."""
    see, read, _ = clip_for(images)
    R = torch.full((len(rows),), math.nan)
    which = able("clip_direction", rows)
    if not which:
        return R
    new, old = arrays(images[which]), sources(rows, which)
    texts = [rows[i]["captions"] for i in which]
    d_image = embed(see, new) - embed(see, old)                                  # (n,D)
    d_text = embed(read, [b for _, b in texts]) - embed(read, [a for a, _ in texts])
    R[which] = F.cosine_similarity(d_image, d_text)
    # Nothing edited, no direction: rounding in another batch must not be taken for an edit.
    same = [i for i, a, b, (s, t) in zip(which, new, old, texts) if np.array_equal(a, b) or s == t]
    R[same] = 0
    return R


def clip_image(images, rows):
    """Cosine of the image and `source_image`: what was there and is there again (UniRL-Zero)."""
    R, which = torch.full((len(rows),), math.nan), able("clip_image", rows)
    if which:
        see = clip_for(images)[0]
        R[which] = (embed(see, arrays(images[which])) * embed(see, sources(rows, which))).sum(1)
    return R


def pickscore(images, rows):
    """exp(logit_scale) x cosine, about 18 to 24 (Flow-GRPO divides by 26; a z-score forgets it)."""
    model = clip_model(MODELS["pickscore"], MODELS["pickscore-processor"])
    return model[2] * cosine(model, images, rows)


def hpsv2(images, rows):
    """Plain cosine, about 0.2 to 0.35, without a logit scale; v2.0 and v2.1 do not compare."""
    return cosine(open_clip_model(MODELS["hpsv2-arch"], MODELS["hpsv2"]), images, rows)


@cache
def aesthetic_head(name):
    return torch.load(hub_file(name), map_location="cpu", weights_only=True)


def aesthetic(images, rows):
    """LAION's sac+logos+ava1 predictor, about 3 to 8: five affine layers without activations
    (the other layers of its file, of which 1, 3 and 5 are dropout, hold nothing)."""
    see, head = clip_model(MODELS["clip"])[0], aesthetic_head(MODELS["aesthetic"])
    x = embed(see, arrays(images))
    for k in (0, 2, 4, 6, 7):                       # 768 -> 1024 -> 128 -> 64 -> 16 -> 1
        x = F.linear(x, head[f"layers.{k}.weight"], head[f"layers.{k}.bias"])
    return x[:, 0]
