"""Endless batches of pictures and texts, for stages 1 and 2."""

import random
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from common.layouts import FORMS, columns_of, layout, sample, understood
from common.read import UNREADABLE, fitted, pixels, read_image
from common.run import all_gather, beside, fail, key, one_line


def collated(batch, form):
    """Samples (image, prompt, references, words ...) -> a batch, see pairs."""
    images, prompts, refs, *words = zip(*batch)
    has_refs = len(FORMS[form][0]) > 1
    # A pixel's three numbers stay side by side: to sort them takes long. It is numpy that copies:
    # torch's threads, once woken, spin for a while and take the workers' time.
    stack = torch.empty(len(images), *images[0].shape, dtype=torch.uint8,
                        pin_memory=torch.cuda.is_available())
    np.stack(images, out=stack.numpy())
    return (stack.permute(0, 3, 1, 2), list(prompts), *([list(refs)] if has_refs else []),
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


def pairs(folder, cfg, n, seed, rank=0, world=1, position=None, bad_share=0.1, form="t2i",
          columns="", workers=0):
    """Endless batches of (uint8 (n,3,H,W), n prompts) from what people have: a folder with
    metadata.jsonl (file_name, prompt), shards *.tar (png/jpg + json/txt), or another layout of
    docs/data.md. form: see FORMS; what an edit or a reflection starts from comes as n lists of
    references behind the prompts, and further texts behind those. columns: --columns. workers:
    threads that read and decode ahead; they change nothing else. position: all_positions' of a run
    that is gone on with.

    Aspect ratio is kept at the preset's area: each batch is of one bucket of sizes. A record that
    cannot be read is named and counted; a share of more than bad_share of them ends the run."""
    folder, columns = beside(folder), columns_of(columns)
    try:
        data = layout(folder, form)
    except UNREADABLE as e:
        fail(f"{one_line(e)}; the classroom's: python -m data.shapes.prepare data")
    understood(data, folder, form, columns)
    return Batches(data, form, columns, cfg, seed, n, rank, world, workers,
                   Broken(folder, bad_share), position)


class Batches:
    """Endless batches that know their place in the data. A record's place is (pass, records before
    that pass, number in it); `position` says up to where all are done, but for those that wait for
    others of their size."""

    def __init__(self, data, form, columns, cfg, seed, n, rank, world, workers, broken, before):
        """before: all_positions' of the run that this one goes on from, or None"""
        self.data, self.form, self.columns, self.cfg, self.seed = data, form, columns, cfg, seed
        self.n, self.rank, self.world, self.broken = n, rank, world, broken
        self.position = None
        self.start, self.is_done = where_it_was(before)
        # Batches as before go on from there, and their positions hold all; others' do not.
        alike = before and (len(before["done"]), before.get("n")) == (world, n)
        self.before = before.get("before") if alike else before
        self.opened = ahead(self.open, self.records(), workers, n + 2 * workers)
        self.buckets = {}                                        # {size: its places and samples}

    def records(self):
        """This rank's share of all records, pass after pass -> their places and what they are;
        behind each whole pass no place and no record"""
        turn, begin = self.start
        for turn in count(turn):
            rng = random.Random(f"{self.seed}, pass {turn}" if turn else self.seed)
            length, whole = 0, True
            for record in self.data.one_pass(rng, self.broken):
                place = turn, begin, length
                if (begin + length) % self.world == self.rank:
                    if self.is_done(place):
                        whole = False
                        self.broken.good += 1
                    else:
                        yield place, record
                length += 1
            begin += length
            if whole and (begin >= self.world or not length):    # each rank has had its turn
                yield None, None

    def open(self, item):
        """-> a sample, or what is wrong with it; in a thread"""
        place, record = item
        if not record:
            return None
        (turn, _, i), (_, raw, home) = place, record
        try:
            files, said = sample(self.data.row(raw), home, self.form, self.columns,
                                 key(self.seed, turn, i))
            *refs, image = fitted([read_image(file) for file in files], self.cfg)
            return np.asarray(image), said[0], [pixels(ref) for ref in refs], *said[1:]
        except UNREADABLE as e:
            return e

    def __iter__(self):
        return self

    def __next__(self):
        for (place, record), got in self.opened:
            if not record:
                if not self.broken.good:
                    fail(f"{self.broken.folder} holds no image that rank {self.rank} of "
                         f"{self.world} could read")
            elif isinstance(got, Exception):
                self.broken(record[0], got)
            else:
                self.broken.good += 1
                bucket = self.buckets.setdefault(got[0].shape, [])
                bucket.append((place, got))
                if len(bucket) == self.n:
                    del self.buckets[got[0].shape]
                    waiting = [at for its in self.buckets.values() for at, _ in its]
                    self.position = dict(done=place, waiting=waiting)
                    return collated([its for _, its in bucket], self.form)


def all_positions(streams):
    """{name: Batches} of this rank -> {name: the position of all ranks}, for any number of ranks to
    go on from. Every rank calls it."""
    mine = {name: batches.position for name, batches in streams.items()}
    every = all_gather(mine)
    return {name: dict(done=[its[name]["done"] for its in every],
                       waiting=[at for its in every for at in its[name]["waiting"]],
                       n=streams[name].n, before=streams[name].before)
            for name, position in mine.items() if position}


def where_it_was(position):
    """all_positions' of a stream, or None: it begins -> the first pass in which something is left,
    and the records before it; f(place): is that record done?"""
    if position is None:
        return (0, 0), lambda place: False
    done, waiting = [*map(tuple, position["done"])], {*map(tuple, position["waiting"])}
    # Other ranks than this run's may have been further: what it went on from still counts.
    _, was_done = where_it_was(position.get("before"))

    def is_done(place):
        _, begin, i = place
        return was_done(place) or (
            place <= done[(begin + i) % len(done)] and place not in waiting)
    return min([*done, *waiting])[:2], is_done


def ahead(f, items, workers, most):
    """-> (item, f(item)) of each item, in their order; threads compute up to `most` in advance."""
    if not workers:
        yield from ((item, f(item)) for item in items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append((item, pool.submit(f, item)))
            if len(waiting) > most:
                item, job = waiting.popleft()
                yield item, job.result()
        for item, job in waiting:
            yield item, job.result()


def mixture(args, cfg, n, rank, world, trained):
    """Endless batches of one task each, from where `trained` is: images, prompts, references and
    words, the last two None where the task has none. Of --data, or in a share --edit-share of the
    steps of --edits, in a share --share of --tuples for the task cot or reflect. (seed, step) alone
    decides which: ranks agree, and so does a run that resumes."""
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
    folders = {"t2i": args.data} | {k: folder for k, (folder, _) in more.items()}
    trained.data = {k: pairs(folder, cfg, n, args.seed, rank, world, trained.position.get(k),
                             form=k, columns=args.columns, workers=args.workers)
                    for k, folder in folders.items()}

    def batch(step):
        images, prompts, *rest = next(trained.data[form(step)])
        refs = rest.pop(0) if form(step) in ("edit", "reflect") else None
        return images, prompts, refs, rest[0] if rest else None
    return map(batch, count(trained.start))
