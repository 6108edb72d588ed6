"""Endless batches of pictures and texts, for stages 1 and 2."""

import random
import sys
from collections import Counter
from itertools import count

import torch

from common.layouts import FORMS, columns_of, layout, sample, understood
from common.read import UNREADABLE, read_image, to_bucket
from common.run import beside, fail, key, one_line


def collated(batch, form):
    """Samples (image, prompt, references, words ...) -> a batch, see pairs."""
    images, prompts, refs, *words = zip(*batch)
    has_refs = len(FORMS[form][0]) > 1
    return (torch.stack(images), list(prompts), *([list(refs)] if has_refs else []),
            *map(list, words))


class Broken:
    """Names records that cannot be read, counts them, and ends the run past a share."""

    def __init__(self, folder, most):
        self.folder, self.most, self.good, self.bad = folder, most, 0, set()

    def __call__(self, where, error):
        if where not in self.bad:                                # once, not in every pass
            self.bad.add(where)
            print(f"unreadable: {where} ({len(self.bad)} of {len(self.bad) + self.good}): "
                  f"{one_line(error)}", file=sys.stderr)
        if len(self.bad) > self.most * (len(self.bad) + self.good + 20):
            fail(f"{len(self.bad)} of {len(self.bad) + self.good} records in {self.folder} are "
                 "unreadable")


def pairs(folder, cfg, n, seed, rank=0, world=1, skip=0, bad_share=0.1, form="t2i", columns=""):
    """Endless batches of (uint8 (n,3,H,W), n prompts) from what people have: a folder with
    metadata.jsonl (file_name, prompt), shards *.tar (png/jpg + json/txt), or another layout of
    docs/data.md. form: see FORMS; what an edit or a reflection starts from comes as n lists of
    references behind the prompts, and further texts behind those. columns: --columns.

    Aspect ratio is kept at the preset's area: each batch is of one bucket of sizes. A record that
    cannot be read is named and counted; a share of more than bad_share of them ends the run. A
    resumed run skips the batches it has seen."""
    folder, columns = beside(folder), columns_of(columns)
    rng, broken = random.Random(seed), Broken(folder, bad_share)
    try:
        data = layout(folder, form)
    except UNREADABLE as e:
        fail(f"{one_line(e)}; the classroom's: python -m data.shapes.prepare data")
    understood(data, folder, form, columns)

    def batches(skip):
        buckets = {}
        for turn in count():
            # Every rank reads all and takes its share.
            for i, (where, raw, home) in enumerate(data.one_pass(rng, broken)):
                if i % world != rank:
                    continue
                try:
                    files, said = sample(data.row(raw), home, form, columns, key(seed, turn, i))
                    images = [read_image(file) for file in files]
                except UNREADABLE as e:
                    broken(where, e)
                    continue
                broken.good += 1
                *refs, image = to_bucket(images, cfg)
                batch = buckets.setdefault(image.shape, [])
                batch.append((image, said[0], refs, *said[1:]))
                if len(batch) == n:
                    buckets[image.shape] = []
                    if skip:
                        skip -= 1
                    else:
                        yield collated(batch, form)
            if not broken.good:
                fail(f"{folder} holds no image that rank {rank} of {world} could read")
    return batches(skip)


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
    data = {k: pairs(folder, cfg, n, args.seed, rank, world, done[k], form=k,
                     columns=getattr(args, "columns", "")) for k, folder in folders.items()}

    def batch(step):
        images, prompts, *rest = next(data[form(step)])
        refs = rest.pop(0) if form(step) in ("edit", "reflect") else None
        return images, prompts, refs, rest[0] if rest else None
    return map(batch, count(start))
