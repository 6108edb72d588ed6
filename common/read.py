"""Pictures and texts from disk: folders with metadata.jsonl, WebDataset shards."""

import io
import json
import random
import sys
from collections import Counter
from itertools import count

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageOps

from common.run import beside, fail, key


def read_image(source):
    """A file -> PIL RGB: upright as its EXIF says, 16 bits as 8, what is transparent on white."""
    image = ImageOps.exif_transpose(Image.open(source))
    if image.mode[0] in "IF":                    # of 16 bits convert would keep what is below 256
        a = np.asarray(image)
        if image.mode == "F" or a.min() < 0 or a.max() > 65535:
            raise ValueError(f"its pixels, {a.min():g} to {a.max():g}, are neither 8 nor 16 bits")
        image = Image.fromarray((a / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)   # read_image's


def bucket(width, height, cfg):
    """Sides in pixels that keep an image's shape, at the preset's area; the DiT's multiples."""
    step = cfg.vae_factor * cfg.dit_config["patch_size"]       # pixels a side must divide into
    most = step * cfg.dit_config.get("pos_embed_max_size", 999)       # pixels that have a place
    ratio = (width / height) ** 0.5
    return tuple(min(most, max(step, round(cfg.size * r / step) * step))
                 for r in (ratio, 1 / ratio))


def to_bucket(images, cfg):
    """PIL images, the last of which decides -> uint8 (3,H,W) each: it and the first, which is what
    it was drawn from, in one bucket; further references in their own."""
    sizes = [bucket(*image.size, cfg) for image in images]
    sizes[0] = sizes[-1]
    return [torch.from_numpy(np.array(
        image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    )).permute(2, 0, 1) for image, size in zip(images, sizes)]


# Of training rows: files, the last of them drawn; texts. In metadata.jsonl these are its keys, and
# `source` may be several files; in shards they are endings: source*.png, target.png, json.
FORMS = {
    "t2i": (("file_name",), ("prompt",)), "edit": (("source", "target"), ("instruction",)),
    "cot": (("file_name",), ("prompt", "reasoning")),
    "reflect": (("image", "refined"), ("prompt", "critique")),
}


def listed(folder, form):
    """The rows of metadata.jsonl -> (name, files, what is drawn last, texts) of each."""
    (*first, drawn), texts = FORMS[form]
    wants, rows = [*first, drawn, *texts], []
    for i, line in enumerate((folder / "metadata.jsonl").open(), 1):
        try:
            row = json.loads(line)
            sources = row[first[0]] if first else []             # a file, or several
            sources = [sources] if isinstance(sources, str) else sources
            rows.append((row[drawn], [folder / f for f in (*sources, row[drawn])],
                         [row[k] for k in texts]))
        except (ValueError, TypeError, KeyError) as e:
            fail(f"{folder}/metadata.jsonl line {i}: no {', '.join(wants[:-1])} or {wants[-1]} "
                 f"({e!r})")
    return rows


def unpacked(record, form):
    """A record of a WebDataset shard -> as listed, files in memory; or KeyError, ValueError."""
    (*first, drawn), texts = FORMS[form]
    names = [k for k in sorted(record) if k.split(".")[-1] in ("png", "jpg", "jpeg", "webp")]
    about = json.loads(record["json"]) if "json" in record else {texts[0]: record["txt"].decode()}
    own = [k for k in names if "." not in k][:1]
    if first:
        source, target = ([k for k in names if k.startswith(w)] for w in (first[0], drawn))
        if not (source and target):
            raise KeyError(f"{first[0]} or {drawn}")
        own = source + target[:1]
    return (record["__key__"], [io.BytesIO(record[k]) for k in own] or [io.BytesIO()],
            [about[k] for k in texts])


def collated(batch, form):
    """Samples (image, prompt, references, words ...) -> a batch, see pairs."""
    images, prompts, refs, *words = zip(*batch)
    has_refs = len(FORMS[form][0]) > 1
    return (torch.stack(images), list(prompts), *([list(refs)] if has_refs else []),
            *map(list, words))


def pairs(folder, cfg, n, seed, rank=0, world=1, skip=0, bad_share=0.1, form="t2i"):
    """Endless batches of (uint8 (n,3,H,W), n prompts) from what people have: a folder with
    metadata.jsonl (file_name, prompt), or WebDataset shards *.tar (png/jpg + json/txt).
    form: see FORMS; what an edit or a reflection starts from comes as n lists of references behind
    the prompts, and further texts behind those.

    Aspect ratio is kept at the preset's area: each batch is of one bucket of sizes. A record that
    cannot be read is named and counted; a share of more than bad_share of them ends the run. A
    resumed run skips the batches it has seen."""
    folder, rng, good, bad, buckets = beside(folder), random.Random(seed), 0, set(), {}
    shards, texts = sorted(map(str, folder.glob("*.tar"))), FORMS[form][1]
    if not shards and not (folder / "metadata.jsonl").exists():
        fail(f"{folder} holds neither metadata.jsonl nor *.tar shards; the classroom's: python -m "
             "data.shapes.prepare data")
    rows = [] if shards else listed(folder, form)

    def unreadable(name, error):
        if name not in bad:                                      # once, not in every pass
            bad.add(name)
            print(f"unreadable: {name} ({len(bad)} of {len(bad) + good}): {error}", file=sys.stderr)
        if len(bad) > bad_share * (len(bad) + good + 20):
            fail(f"{len(bad)} of {len(bad) + good} records in {folder} are unreadable")
        return True                                              # webdataset: go on
    def records():                                               # one pass over the data
        if not shards:
            yield from rng.sample(rows, len(rows))
            return
        rng.shuffle(shards)
        # Every rank reads all and takes its share below: no node splitter.
        for r in wds.WebDataset(shards, shardshuffle=False, nodesplitter=None,
                                handler=lambda e: unreadable(e.args[-1], e.args[0])
                                ).shuffle(2000, rng=rng):
            try:
                yield unpacked(r, form)
            except (ValueError, TypeError, KeyError) as e:
                unreadable(r["__key__"], f"no {' or '.join(texts)} ({e!r})")
    def batches():
        nonlocal good, skip
        while True:
            for i, (name, sources, said) in enumerate(records()):
                if i % world != rank:
                    continue
                try:
                    images = [read_image(source) for source in sources]
                except UNREADABLE as e:
                    unreadable(name, e)
                    continue
                good += 1
                *refs, image = to_bucket(images, cfg)
                batch = buckets.setdefault(image.shape, [])
                batch.append((image, said[0], refs, *said[1:]))
                if len(batch) == n:
                    buckets[image.shape] = []
                    if skip:
                        skip -= 1
                    else:
                        yield collated(batch, form)
            if not good:
                fail(f"{folder} holds no image that rank {rank} of {world} could read")
    return batches()


def mixture(args, cfg, n, rank=0, world=1, start=0):
    """Endless batches of one task each, from step `start`: images, prompts, references and words,
    the last two None where the task has none. Of --data, or in a share --edit-share of the steps of
    --edits, in a share --share of --tuples for the task cot or reflect. (seed, step) alone decides
    which: ranks agree, and so does a run that resumes."""
    task = getattr(args, "task", "")
    more = dict(edit=(args.edits, args.edit_share)) if args.edits else {}
    more |= {task: (args.tuples, args.share)} if task in ("cot", "reflect") else {}

    def form(step):
        chance = random.Random(key(args.seed, step, 0)).random()
        for form, (_, share) in more.items():
            if chance < share:
                return form
            chance -= share
        return "t2i"
    done = Counter(map(form, range(start)))
    folders = {"t2i": args.data} | {k: folder for k, (folder, _) in more.items()}
    data = {k: pairs(folder, cfg, n, args.seed, rank, world, done[k], form=k)
            for k, folder in folders.items()}

    def batch(step):
        images, prompts, *rest = next(data[form(step)])
        refs = rest.pop(0) if form(step) in ("edit", "reflect") else None
        return images, prompts, refs, rest[0] if rest else None
    return map(batch, count(start))


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
