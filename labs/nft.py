"""Stage 3 by DiffusionNFT (Zheng et al. 2025, 2509.16117): learn from images, not from steps.

    torchrun labs/nft.py --reward geneval            # flags as grpo.py's, but for those removed

One iteration (DiT forwards per image: T + 4 x times, a backward counting two):

    1  draw B prompts; a group is G images of one prompt
    2  the old policy, an average that follows, draws them along the ODE, each from its own noise
    3  score the images; r = how good in [0,1], 1/2 being the group's mean
    4  at random times t, noise the images; there, with v+ = (1-b) v_old + b v and its mirror image
       v- = (1+b) v_old - b v, the loss is r |v+ - v*|^2 + (1-r) |v- - v*|^2, v* = eps - x_0
    5  log; now and then look at pictures and score held-out prompts

Removed against grpo.py: kernels, window and log-probs, as no step is random; ratio and clip; the
noise that a group has in common, from which an ODE draws one image; KL, several updates, SFT, LDAM.

At v = v_old the gradient is the advantage times that of the flow matching loss: the policy
improves (theorem 3.1). Away from there the two terms together pull back to v_old: that is the clip.
Departs from its code: the loss is one of v, not of x_0 by its own size; advantages are grpo.py's.
An old policy that keeps 0.001 more of itself per update, not 0.01, lets long runs end in noise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402

import grpo  # noqa: E402
from common.flags import flag, fork  # noqa: E402
from common.rl import Clock  # noqa: E402
from common.run import key, keyed  # noqa: E402
from labs.begin import REMOVED, Follower, Lab  # noqa: E402

Args = fork(
    grpo.Args, REMOVED,
    out=flag("out/nft", "folder of the run", group="DiffusionNFT"),
    steps=flag(75, "iterations: more, at such rates, lose again", "[1, 1e7]"),
    times=flag(3, "random times per image, at which it teaches", "[1, 49]"),
    strength=flag(1.0, "b: how far v+ and v- lie from the old velocity", "[0.001, 1000]"),
    most=flag(5.0, "advantage, in standard deviations, from which r is 0 or 1", "[0.001, 1000]"),
    old=flag(0.5, "most that the old policy keeps of itself per update", "[0, 1)"),
    old_growth=flag(0.01, "by so much more per update, from 0, it keeps of itself", "(0, 1]"))


def nft_loss(v, v_old, target, r, strength):
    """v, v_old, target (n,C,H,W), r (n,) in [0,1] -> (n,), the paper's divided by b: its gradient
    at v = v_old is that of (2r - 1) |v - target|^2, whatever b."""
    ahead = (1 - strength) * v_old + strength * v                                # v+
    mirror = (1 + strength) * v_old - strength * v                               # v-
    better = (ahead - target).square().mean((1, 2, 3))
    worse = (mirror - target).square().mean((1, 2, 3))
    return (r * better + (1 - r) * worse) / strength


def main():
    lab = Lab(Args, __doc__)
    args, model, optimiser, device = lab.args, lab.model, lab.optimiser, lab.device
    G = args.G
    old = Follower(optimiser, args.old, args.old_growth)
    for step in lab.recorder.steps():
        clock = Clock()
        rng = keyed(key(args.seed, step, 0))             # every rank draws alike

        # 1  draw B prompts; a group is G images of one prompt
        batch, rows = lab.draw_prompts(rng)
        asked = [row["prompt"] for row in batch]

        # 2  the old policy draws them along the ODE, each from its own noise
        with old.applied():
            old_branches = lab.encode(asked)
            x0 = model.sample(                                                   # (N,C,H,W)
                old_branches.repeat(G), args.T, noise=lab.noise(step))
        clock.lap("rollout")
        images = model.to_images(x0).cpu()
        clock.lap("decode")

        # 3  score the images; r = how good, 1/2 being the group's mean
        advantage, kept, scored = lab.advantage(step, images, rows, rng)
        r = (advantage[kept] / args.most).clamp(-1, 1) / 2 + 0.5
        clock.lap("reward")

        # 4  noise the images to random times; there, weigh the errors of v+ and v-, on either side
        #    of the old velocity, by r and 1 - r. The loss is scaled by --most, so that a unit of
        #    advantage weighs as in grpo.py
        total = args.B * G * args.times / args.most
        x_t, t, target, owner = lab.noised(step, x0, kept)
        r = r.repeat(args.times).to(device)
        with old.applied():
            v_old = lab.velocities(x_t, t, old_branches, owner)
        # With gradient only now: a graph does not outlive the weights of another policy.
        branches = lab.encode(asked, old_branches, lab.learns)
        leaf = branches.leaf()
        seen = []
        for i in lab.parts(len(t)):
            v = model.velocity(x_t[i], t[i], leaf.rows(owner[i]))
            loss = nft_loss(v, v_old[i], target[i], r[i], args.strength)         # (rows,)
            (loss.sum() / total).backward()
            seen.append(torch.stack([loss, (v - v_old[i]).square().mean((1, 2, 3))], 1).detach())
        branches.pull(leaf)                              # into the bridge, if that learns
        norms = optimiser.update(step, seen, asked)
        optimiser.ema.update(step)
        old.update(step)
        clock.lap("update")

        # 5  one row per step; held-out prompts and a place to restart, now and then
        stats = lab.means(seen, "loss", "apart") | dict(kept=len(kept) / len(rows))
        lab.record(step, stats, scored | norms | clock.row())
    lab.finish()


if __name__ == "__main__":
    main()
