"""A run's folder: who may write there, its flags, log, looks and checkpoints; how a run stops."""

import errno
import fcntl
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from common.checkpoint import CHECKPOINT, has_checkpoint, keep_beside, saved_about
from common.data import all_positions
from common.flags import can_hold, read_flag, script, settings_of
from common.page import redraw
from common.run import all_gather, all_mean, check_ranks, fail, write
from common.stop import SIGNALS, as_a_wish, at_once, end, heed, received, this_rank
from common.track import Tracker, check_track

# ---------------------------------------------------------------------------------------------
# Who may write there


def check_out(args):
    """--out and --cache may be written to, or the user's error: before anything is loaded."""
    out = Path(args.out)
    if not args.out.strip():
        fail("--out is empty: name a folder for the run")
    for name in ("out", "cache"):
        if getattr(args, name, ""):
            read_flag(args, name, can_hold)
    check_track(args.track)
    a_run = has_checkpoint(out) or (out / "log.jsonl").exists() or (
        "out" in settings_of(out))
    if not args.resume and a_run:
        fail(f"{out} holds another run: choose another --out, or continue it with --resume")
    if not a_run and out.exists() and any(out.iterdir()):
        fail(f"--out {out} is neither empty nor a run's folder: choose another")
    if args.resume == "yes" and not has_checkpoint(out):
        fail(f"nothing to resume: {out / CHECKPOINT} is missing; --resume auto begins such a run")
    if (out / "log.jsonl").exists() and this_rank() == 0:
        Log.of(out)                                      # nobody else goes on with it meanwhile


# ---------------------------------------------------------------------------------------------
# Its log


class Log:
    """log.jsonl, a row per update, each whole or not at all. Whoever has it open has the folder to
    himself; the lock ends with the process, however that ends."""

    held = {}                                            # by this process: {path: Log}

    def __init__(self, out):
        self.path = Path(out) / "log.jsonl"
        self.file = open(self.path, "a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{out} belongs to a run that is at work: wait for it, or choose another --out")
        except OSError as e:                             # not every disk can
            print(f"{out} cannot be locked ({e.strerror}): see to it yourself that no other run "
                  "writes there", file=sys.stderr)

    @staticmethod
    def of(out):
        """The log that this process has open already, or is to open."""
        path = (Path(out) / "log.jsonl").resolve()
        if path not in Log.held or not path.exists():
            Log.held.pop(path, None)
            Log.held[path] = Log(out)
        return Log.held[path]

    def keep_up_to(self, step):
        """Drops what is later than a step, whose rows will come again, and a row that is torn.
        -> the last row that stays, or None"""
        size, block, last = self.file.seek(0, os.SEEK_END), 2**20, None
        while last is None and size:
            begin, dropped = max(0, size - block), 0     # of a long log only its end is read
            self.file.seek(begin)
            lines = self.file.read().splitlines(keepends=True)
            lines = lines[1:] if begin else lines        # whose first is cut
            while lines and last is None:
                last = whole_row(lines[-1], step)
                dropped += 0 if last else len(lines.pop())
            block *= 8
            if not begin:
                break
        self.file.truncate(size - dropped if size else 0)
        return last

    def write(self, row):
        whole, line = self.file.seek(0, os.SEEK_END), json.dumps(row).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file)
        except OSError as e:
            self.file.truncate(whole)
            fail(f"{self.path} cannot be written ({e.strerror}): the last checkpoint is whole; "
                 "make space, then --resume")


def whole_row(line, step=math.inf):
    """A line of a log, if it is a row and of that step or one before -> the row, else None"""
    try:
        row = json.loads(line)
        return row if row["step"] <= step and line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def read_log(out):
    """-> the rows of a run's log, of which one that is torn is none"""
    file = Path(out) / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [row for line in lines if (row := whole_row(line))]


class Recorder:
    """The run's folder, its log, looks, checkpoints and progress bar."""

    def __init__(self, args, rank, trained, preview, score="score", first=True):
        """trained: see Trained; preview(file for a picture) -> metrics of what is held out, `score`
        the main one; first: is there a look before the first update? Every rank makes one, after
        all that can fail."""
        self.args, self.rank, self.trained = args, rank, trained
        self.preview, self.score = preview, score
        self.out, self.tracker, self.keep = Path(args.out), None, getattr(args, "keep", None)
        self.start = trained.start                       # updates done before
        self.began = time.time()                         # as if there had been no break
        self.shown = {}                                  # metrics of the last look
        self.names = set()                               # of all columns
        self.last = {}                                   # the row that a resumed run goes on from
        self.stopped = []                                # signals received, by any rank
        stale = self.start and saved_about(self.out / "ckpt").get("step") != self.start
        if len({*all_gather(self.start)}) > 1:           # also: every rank has looked at the folder
            fail(f"not all ranks see the checkpoint in {self.out}: it must be one folder for all")
        if rank == 0:
            self.open()
        if stale:                                        # it was perhaps killed while it saved
            self.trained.save(self.out, self.start, self.last.get(self.score), self.keep)
        elif self.start and rank == 0:
            keep_beside(self.out, self.start, self.keep)
        if first and not self.start:
            self.look(0)
            self.write(dict(step=0, at=0.0, **self.shown))

    def open(self):
        """Makes the folder this run's own, or goes on in it."""
        settings = dict(script=script(), **asdict(self.args)) | dict(resume="", change="")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log = Log.of(self.out)                  # first: it says that a run has the folder
            (self.out / "samples").mkdir(exist_ok=True)
        except OSError as e:
            fail(f"--out {self.out} cannot be written to: {e.strerror}")
        if not self.args.resume and self.log.file.seek(0, os.SEEK_END):   # begun since check_out
            fail(f"{self.out} holds another run by now: choose another --out")
        for torn in self.out.rglob("*.tmp"):             # it was killed while it wrote
            if torn.is_file():
                torn.unlink()
        last = self.log.keep_up_to(self.start if self.start else -1)
        if self.start and (last is None or last["step"] != self.start):
            print(f"{self.out}/log.jsonl lacks the rows up to update {self.start}: they are lost, "
                  "the weights are not", file=sys.stderr)
        if last is not None:
            self.began -= last["at"]                     # the clock goes on from there
        had = settings_of(self.out)
        if not had:
            write(self.out / "config.json", json.dumps(settings, indent=1))
        elif had != settings:
            write(self.out / f"config_{self.start:05d}.json", json.dumps(settings, indent=1))
        print(" ".join(f"{name}={value}" for name, value in settings.items()))
        if self.args.track:
            self.tracker = Tracker(self.args.track, self.out, settings, self.start)
        self.last = last or {}

    def steps(self):
        """The updates to do. A run that is asked to stop ends here, with the signal's exit code."""
        self.bar = tqdm(range(self.start, self.args.steps), Path(script()).stem, initial=self.start,
                        total=self.args.steps, disable=self.rank > 0)
        heed(as_a_wish)
        for step in self.bar:
            self.trained.ready()
            yield step
            if self.stopped:
                self.bar.close()
                self.trained.written()
                end(self.stopped[0], f"after update {step + 1}: saved in {self.out}/ckpt, "
                    "--resume goes on")
        self.trained.written()
        counts = all_mean([which in received for which in SIGNALS])
        if late := [which for which, n in zip(SIGNALS, counts) if n]:            # on any rank
            end(late[0], f"after update {self.args.steps}: saved in {self.out}/ckpt")
        heed(at_once)

    def look(self, step):
        """Draws what is held out, by the average, and scores it."""
        with self.trained.averaged():
            if self.rank == 0:
                self.shown = self.preview(self.out / "samples" / f"step_{step:05d}.png")
        if self.tracker:
            for file in sorted((self.out / "samples").glob(f"*_{step:05d}.png")):
                self.tracker.picture(file.stem.rpartition("_")[0], file, step)

    def write(self, row):
        """The one place where a row is logged."""
        if self.rank == 0:
            self.log.write(row)
        if self.tracker:
            self.tracker.row(row)

    def record(self, step, stats, columns, curves):
        """One row of the log and, where due, a look and a checkpoint. stats: this rank's, averaged
        over all; columns: alike on all; curves: panels of curves.png beside the rewards.
        -> row. Every rank calls it."""
        stats = mean_row(stats | {which: which in received for which in SIGNALS})
        self.stopped = [which for which in SIGNALS if stats.pop(which)]          # on any rank
        row = dict(step=step + 1, at=round(time.time() - self.began, 1), **stats, **columns)
        due = (step + 1) % self.args.eval_every == 0 or step + 1 == self.args.steps or self.stopped
        if due:
            check_ranks(self.trained.ema.params, f"after update {step + 1}")
            self.trained.position |= all_positions(self.trained.data)
            self.look(step + 1)
            row |= self.shown
        self.write(row)                                  # before the checkpoint of the same step
        if due:
            self.trained.save(self.out, step + 1, self.shown.get(self.score), self.keep)
        if due and self.rank == 0:
            self.names |= row.keys()
            rewards = [name for name in row if name.startswith("reward_")]
            panels = [[name for name in panel if name in self.names] for panel in curves]
            redraw(self.out, *filter(None, [rewards, *panels]))
        self.bar.set_postfix(self.progress(row), refresh=False)
        return row

    def progress(self, row):
        """The bar's end: the first reward or loss, the last held-out score, gradient norms' sum."""
        told = {}
        for name in row:
            if name.startswith("reward_") or name.endswith("loss"):
                told["reward" if name.startswith("reward_") else name] = f"{row[name]:.3g}"
                break
        if self.score in self.shown:
            told["held out"] = f"{self.shown[self.score]:.3f}"
        norm = sum(x for name, x in row.items() if name.endswith("grad_norm"))
        return told | dict(norm=f"{norm:.3f}")


def mean_row(stats):
    """Columns of this rank -> their means over ranks; every rank calls it."""
    return dict(zip(stats, all_mean([*stats.values()])))
