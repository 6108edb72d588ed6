"""The model under test draws a benchmark's pictures into the official scorer's layout: what is
there is not drawn again, ranks share the rest, and manifest.jsonl says how each one is drawn.
"""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.checkpoint import checkpoint_file, init_folder
from common.draw import draw_edits, draw_reflecting, draw_thinking
from common.flags import given_parts
from common.read import UNREADABLE, arrays, read_image, to_bucket
from common.run import all_mean, fail, key, replacing, write

# B pictures, C H W a torch image


class Tested:
    """The model under test, and the flags by which it draws. A picture's noise depends on --seed
    and its number alone."""

    def __init__(self, model, args):
        self.model, self.args = model, args

    def keys(self, numbers):
        return [key(self.args.seed, 0, i) for i in numbers]

    def draw(self, prompts, numbers):
        """-> uint8 (B,3,H,W)"""
        args = self.args
        return self.model.draw(prompts, self.keys(numbers), args.steps, args.guidance)

    def edit(self, instructions, images, numbers, guidance=None):
        """images: B lists of uint8 (3,H,W), of one size -> uint8 (B,3,H,W)"""
        args = self.args
        return draw_edits(self.model, instructions, images, self.keys(numbers), args.steps,
                          args.guidance if guidance is None else guidance, args.image_guidance)

    def think(self, prompts, numbers):
        """-> uint8 (B,3,H,W), the Words that were thought before"""
        args = self.args
        return draw_thinking(self.model, prompts, self.keys(numbers), args.steps, args.guidance,
                             args.limit, args.temperature)

    def reflect(self, prompts, images, numbers):
        """Second looks at uint8 (B,3,H,W) -> the last pictures, what was said in each round"""
        args = self.args
        return draw_reflecting(self.model, prompts, images, self.keys(numbers), args.rounds,
                               args.steps, args.guidance, args.limit)

    def answer(self, questions, images, numbers):
        """-> B texts; images: B lists, or None"""
        args = self.args
        return self.model.generate(questions, images, "answer", args.limit, args.temperature,
                                   keys=self.keys(numbers)).texts

    def recipe(self):
        """-> what a manifest says of every picture alike"""
        args, cfg = self.args, self.model.cfg
        of_image = dict(image_guidance=args.image_guidance) if args.image_guidance != 1 else {}
        return dict(size=cfg.size, steps=args.steps, guidance=args.guidance, **of_image,
                    preset=cfg.preset, init=args.init, weights=weights_hash(args.init),
                    **given_parts(args) | dict(solver=cfg.solver, grid=cfg.grid))


def weights_hash(init):
    """-> the first half of the SHA-256 of a checkpoint's file, or of a folder's .safetensors"""
    if not init:
        return ""
    folder, said = init_folder(init), hashlib.sha256()
    for file in [f] if (f := checkpoint_file(folder)) else sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as f:
            while part := f.read(2**24):             # hashlib.file_digest is of Python 3.11
                said.update(part)
    return said.hexdigest()[:32]


@dataclass
class Shot:
    """The k-th picture of an item, its number among all, and the file that holds it."""
    item: dict
    k: int
    number: int
    file: str
    found: list = None         # another detector's boxes: see --detections


def shots_of(bench, items, n):
    """n pictures of each item -> Shots. They share a file if its layout does not number them."""
    return [Shot(item, k, 1000 * i + k, bench.ABOUT.layout.format(**item, k=k))
            for i, item in enumerate(items) for k in range(n)]


def by_file(shots):
    """-> a list of Shots for each file"""
    files = {}
    for shot in shots:
        files.setdefault(shot.file, []).append(shot)
    return [*files.values()]


def draw_all(bench, items, n, tested, out, rank, world):
    """n pictures of each item, in the layout of the official scorer, below `out`. The manifest is
    written first; a folder with another one is refused."""
    recipe, files = tested.recipe(), by_file(shots_of(bench, items, n))
    plan = []
    for its in files:
        seeds = tested.keys([shot.number for shot in its])
        plan.append(dict(file=its[0].file, prompt=its[0].item["prompt"],
                         seed=seeds[0] if len(seeds) == 1 else seeds, **recipe,
                         **its[0].item.get("manifest", {})))
    manifest, text = out / "manifest.jsonl", "".join(json.dumps(p) + "\n" for p in plan)
    foreign = (manifest.read_text() != text if manifest.exists() else
               any((out / p["file"]).exists() for p in plan))
    if foreign:
        fail(f"{out} holds images drawn otherwise, or not by us: --score-only {out} scores them; "
             "to draw, choose another --out")
    all_mean([0])                       # every rank has looked before one writes
    if rank == 0:
        for p in plan:
            (out / p["file"]).parent.mkdir(parents=True, exist_ok=True)
        for item in items:
            for name, content in files_of(bench, item):
                if not (out / name).exists():
                    with replacing(out / name) as fresh:
                        fresh.write_bytes(content())
        write(manifest, text)
    all_mean([0])
    todo = [its for its in files[rank::world] if not (out / its[0].file).exists()]
    most = min(64, (2048 // recipe["size"]) ** 2)                         # 16 of 512 px, 4 of 1024
    batch = max(1, most // len(files[0]))
    for a in tqdm(range(0, len(todo), batch), "draw", unit="batch", disable=rank > 0 or None):
        now = todo[a : a + batch]
        pictures = iter(draw_shots(bench, [shot for its in now for shot in its], tested))
        for its in now:
            image = tiled([next(pictures) for _ in its])
            with replacing(out / its[0].file) as fresh:
                Image.fromarray(image).save(fresh, "PNG")
    all_mean([0])                       # rank 0 scores what all have drawn


def files_of(bench, item):
    """What a scorer wants beside an item's pictures -> names, each with a function that makes it"""
    return bench.files(item).items() if hasattr(bench, "files") else ()


def draw_shots(bench, shots, tested):
    """-> a picture (H,W,3) of each"""
    if bench.ABOUT.edits:
        return edit_all(tested, shots)
    return arrays(tested.draw([shot.item["prompt"] for shot in shots],
                              [shot.number for shot in shots]))


def tiled(images):
    """Pictures (H,W,3) -> one, which they fill from left to right, two a row; of an odd number the
    last place is black"""
    if len(images) == 1:
        return images[0]
    images = [*images, np.zeros_like(images[0])] if len(images) % 2 else images
    return np.concatenate([np.concatenate(images[i : i + 2], 1) for i in range(0, len(images), 2)])


def edit_all(tested, shots):
    """Edits, those of one size at once -> [(H,W,3)]"""
    sources = [to_bucket([source_of(shot.item)], tested.model.cfg)[0] for shot in shots]
    made = [None] * len(shots)
    for size in dict.fromkeys(x.shape for x in sources):
        mine = [i for i, x in enumerate(sources) if x.shape == size]
        images = tested.edit([shots[i].item["prompt"] for i in mine],
                             [[sources[i]] for i in mine], [shots[i].number for i in mine])
        for i, image in zip(mine, arrays(images)):
            made[i] = image
    return made


def source_array(item, name="source"):
    """-> a picture that an item names, (H,W,3)"""
    return np.array(source_of(item, name))


def source_of(item, name="source"):
    """The same as PIL image, or the user's error"""
    source = item[name]
    try:
        return read_image(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UNREADABLE as e:
        fail(f"{item['id']}: its {name} cannot be read: {e}")
