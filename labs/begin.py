"""What the labs share, to be skipped at first: grpo.py's set-up and its steps 1, 3 and 5."""

import torch

import grpo
from common.checkpoint import Ema
from common.flags import parse
from common.flow import noised
from common.record import Recorder
from common.rl import deal_out, disagreeing, draw_rows, set_up, wants_final_bench
from common.run import PER_SAMPLE, all_mean, key, setup
from eval import (before_and_after, bench_pictures, check_scored, preview_of, read_prompts_of,
                  score)
from grpo import CURVES, TRAIN, batch_score, group_advantage
from model import Unified
from rewards.judge import Judge

# Flags and settings of grpo.py that no lab has a use for: its steps are not random, a rollout is
# learned from once, and the images of a group each start from a noise of their own. Nor has any
# --shard, since two policies take turns in the weights.
REMOVED = ("window", "window_start", "window_stop", "kind", "eta", "shared_noise", "grid", "clip",
           "updates", "trained", "beta", "kl", "sft", "sft_data", "sft_batch", "ldam", "ldam_gamma",
           "ldam_leap", "ldam_falls", "shard")


class Lab:
    """A run: its flags, model, optimiser, prompts and recorder."""

    def __init__(self, Args, description, anchored=False):
        """anchored: does the loss compare with the initial policy?"""
        self.args = args = parse(Args, description, "stage3", not_here={"": REMOVED})
        self.rank, self.world, self.device = setup()
        self.weights, self.mix, _ = grpo.check(args, self.world)
        self.judge = Judge(args.judge, args.judge_url)
        self.prompts, held = read_prompts_of(args, self.weights, self.mix)
        self.learns = TRAIN[args.train]
        self.B = args.B // self.world                    # prompts of this rank
        self.samples = range(self.rank * self.B * args.G, (self.rank + 1) * self.B * args.G)
        self.micro = args.micro or args.times * len(self.samples)            # rows per backward
        reads = self.B if "bridge" in self.learns else 0
        self.model, self.initial, self.optimiser = set_up(
            Unified, args, self.learns, self.micro, reads, anchored, self.rank, self.device)
        self.recorder = Recorder(args, self.rank, self.optimiser, preview_of(
            self.model, args, self.prompts, held, self.weights, self.judge, self.rank))

    def draw_prompts(self, rng):
        """-> this rank's B rows of prompts, and the N = B G rows of its images"""
        batch = draw_rows(self.prompts, self.args.B, rng, self.mix)
        batch = batch[self.rank * self.B : (self.rank + 1) * self.B]
        rows = [row | dict(group=i) for i, row in enumerate(batch)]
        return batch, [row for row in rows for _ in range(self.args.G)]

    def noise(self, step):
        """Initial noise of N images, each its own. -> (N,C,H,W)"""
        return self.model.noise([key(self.args.seed, step, PER_SAMPLE * n) for n in self.samples])

    def encode(self, asked, known=None, learns=()):
        """Conditions of the prompts, those already `known` where no bridge learns. -> Branches"""
        if known is not None and "bridge" not in self.learns:
            return known
        return grpo.encode(self.model, asked, self.args, learns)

    def noised(self, step, x0, kept, group=1):
        """The images `kept` of x0 (N,C,H,W) at --times random times, one after another; those of a
        `group` in a row have time and noise in common. -> x_t (rows,C,H,W), t (rows,),
        v* (rows,C,H,W), and which prompt a row is of (rows,)"""
        times, numbers = self.args.times, [self.samples[i] // group * group for i in kept.tolist()]
        # Of an image's 100 keys the first is its initial noise; each time takes two, its own and
        # that of its noise, which is why there are 49 at most.
        keys = [key(self.args.seed, step, PER_SAMPLE * n + 2 + 2 * k)
                for k in range(times) for n in numbers]
        x_t, t, target = noised(self.model, x0[kept].repeat(times, 1, 1, 1), keys)
        return x_t, t, target, (kept // self.args.G).repeat(times).to(self.device)

    def advantage(self, step, images, rows, rng):
        """-> advantages (N,) as grpo.py's, indices of images whose group disagrees, columns of the
        log"""
        args = self.args
        scores = score(images, rows, self.weights, self.judge)
        scored = check_scored(scores, args.max_failed, step, args.prompts)
        if args.shuffle:
            deal_out(scores, rng)
        advantage = group_advantage(scores.values, scores.weights, args.G, args.norm)
        if args.norm == "group":
            advantage = batch_score(advantage)
        return advantage, disagreeing(advantage, args.G), scored

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

    def means(self, seen, *names):
        """seen: of each micro-batch (rows, names) -> {name: mean over the rows of all ranks}"""
        mine = torch.cat(seen or [torch.zeros(0, len(names), device=self.device)]).double()
        *sums, n = all_mean([*mine.sum(0), len(mine)])
        return {name: total / max(n, 1e-9) for name, total in zip(names, sums)}

    def record(self, step, stats, columns):
        columns = columns | self.optimiser.finite.column()
        self.recorder.record(step, stats, columns, CURVES)

    def finish(self):
        if wants_final_bench(self.args):
            before_and_after(self.args, self.optimiser, self.recorder.out, bench_pictures)


class Follower(Ema):
    """An average that keeps nothing of itself at first, then more per update, by `growth`, until
    it is `most`. Checkpoints keep it as the run's own state."""

    def __init__(self, optimiser, most, growth):
        super().__init__(optimiser.params, most)
        self.most, self.growth = most, growth
        if most:                                         # else it is the weights, no copy of them
            for name, mean in optimiser.ema.extra.get("old", {}).items():
                self.mean[name].copy_(mean)              # it goes on
        optimiser.ema.extra = dict(old=self.mean)
        self.decay = self.keeps(optimiser.start)

    def keeps(self, updates):
        """-> the share of itself that it keeps after so many updates"""
        return min(self.most, self.growth * updates)

    def update(self, step):
        self.decay = self.keeps(step + 1)
        self.follow(self.decay)
