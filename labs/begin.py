"""What the labs have in common, and no class reads: grpo.py's set-up and its steps 1, 3 and 5."""

from functools import partial

import torch

from common.flags import parse
from common.rl import (Recorder, check_flags, disagreeing, draw_rows, set_up, wants_final_bench)
from common.run import PER_SAMPLE, fail, key, setup, table
from eval import (before_and_after, bench_pictures, check_prompts, check_scored,
                  preview_pictures, read_prompts_of, read_weights, score)
from grpo import CURVES, TRAIN, batch_score, group_advantage
from model import Unified
from rewards.judge import Judge

# Flags and settings of grpo.py that no lab has a use for: its steps are not random, a rollout is
# learned from once, and the images of a group each start from a noise of their own.
REMOVED = ("window", "window_start", "window_stop", "kind", "eta", "shared_noise", "grid", "clip",
           "updates", "trained", "beta", "kl", "sft", "sft_data", "sft_batch", "ldam", "ldam_gamma",
           "ldam_leap", "ldam_falls")


class Lab:
    """A run: its flags, model, optimiser, prompts and recorder."""

    def __init__(self, Args, description, anchored=False):
        """anchored: does the loss compare with the initial policy?"""
        self.args = args = parse(Args, description, "stage3", not_here={"": REMOVED})
        self.rank, self.world, self.device = setup()
        check_prompts(args)
        check_flags(args, self.world, tuple(TRAIN), "prompts")
        try:
            self.weights, self.mix = read_weights(args.reward), table(args.mix, float)
        except (OSError, ValueError) as e:
            fail(e)
        self.judge = Judge(args.judge, args.judge_url)
        photos = not args.preset.startswith("shapes")
        self.prompts, held = read_prompts_of(args, self.weights, photos)
        self.learns = TRAIN[args.train]
        self.B = args.B // self.world                    # prompts of this rank
        self.samples = range(self.rank * self.B * args.G, (self.rank + 1) * self.B * args.G)
        self.micro = args.micro or args.times * len(self.samples)            # rows per backward
        reads = self.B if "bridge" in self.learns else 0
        self.model, self.initial, self.optimiser = set_up(
            Unified, args, self.learns, self.micro, reads, anchored, self.rank, self.device)
        shown = (held or self.prompts[:16]) if photos else None
        self.recorder = Recorder(args, self.model, self.optimiser, self.rank, partial(
            preview_pictures, self.model, args, shown, held and self.weights, self.judge))

    def draw_prompts(self, rng):
        """-> this rank's B rows of prompts, and the N = B G rows of its images"""
        batch = draw_rows(self.prompts, self.args.B, rng, self.mix)
        batch = batch[self.rank * self.B : (self.rank + 1) * self.B]
        rows = [row | dict(group=i) for i, row in enumerate(batch)]
        return batch, [row for row in rows for _ in range(self.args.G)]

    def noise(self, step):
        """Initial noise of N images, each its own. -> (N,C,H,W)"""
        return self.model.noise([key(self.args.seed, step, PER_SAMPLE * n) for n in self.samples])

    def keys(self, step, kept, group=1):
        """Keys of the times and noise at which the images `kept` teach, times after times; images
        of one `group` in a row have them in common."""
        numbers = [self.samples[i] // group * group for i in kept.tolist()]
        return [key(self.args.seed, step, PER_SAMPLE * n + 2 + 2 * k)
                for k in range(self.args.times) for n in numbers]

    def advantage(self, step, images, rows, rng):
        """-> Scores, advantages (N,) as grpo.py's, indices of images whose group disagrees, columns
        of the log"""
        args = self.args
        scores = score(images, rows, self.weights, self.judge)
        failures = check_scored(scores, args.max_failed, step, args.prompts)
        if args.shuffle:
            scores.values = scores.values[torch.randperm(len(rows), generator=rng)]
        advantage = group_advantage(scores.values, scores.weights, args.G, args.norm)
        if args.norm == "group":
            advantage = batch_score(advantage)
        return scores, advantage, disagreeing(advantage, args.G), failures

    def parts(self, n, whole=1):
        """n rows of a backward in micro-batches, of `whole` rows or more. -> lists of indices"""
        size = max(whole, self.micro // whole * whole)
        return [torch.arange(n, device=self.device)[i : i + size] for i in range(0, n, size)]

    def velocities(self, x_t, t, branches, owner):
        """Of rows that nobody learns from, few at a time -> (rows,C,H,W)"""
        v = torch.empty_like(x_t)
        for i in self.parts(len(t)):
            with torch.no_grad():
                v[i] = self.model.velocity(x_t[i], t[i], branches.rows(owner[i]))
        return v

    def record(self, step, scores, stats, columns):
        """-> is the run to end here?"""
        columns = columns | self.optimiser.finite.column()
        self.recorder.record(step, scores, stats, columns, CURVES)
        return self.recorder.stopped

    def finish(self):
        if wants_final_bench(self.args, self.recorder):
            before_and_after(self.model, self.args, self.optimiser.ema, self.recorder.out,
                             self.device, bench_pictures)


def resumed(average, extra):
    """An average goes on from a checkpoint's, if that has one. -> what checkpoints are to keep"""
    for name, mean in extra.get("old", {}).items():
        average.mean[name].copy_(mean)
    return dict(old=average.mean)
