"""Stage 3 by Advantage Weighted Matching (Xue et al. 2025, 2509.25050): pretraining's own loss,
each image weighted by its advantage.

    torchrun labs/awm.py --reward geneval            # flags as grpo.py's, but for those removed

One iteration (DiT forwards per image: T + 4 x times, a backward counting two; T + 3 x times
without the KL, --near 0):

    1  draw B prompts; a group is G images of one prompt
    2  draw them along the ODE, each from its own noise
    3  score the images; advantage = how much better than the group, in standard deviations
    4  noise the images to random times; there, climb advantage x -|v - v*|^2, v* = eps - x_0, and
       stay near an average of the policy: near |v - v_average|^2
    5  log; now and then look at pictures and score held-out prompts

Removed against grpo.py: kernels, window and log-probs, as no step is random: -|v - v*|^2 stands for
the log-prob. Ratio and clip, with one update per rollout 1 and idle. The noise that a group has in
common, from which an ODE draws one image; several updates, SFT, LDAM.
Departs from its code: no weight by the size of the loss; the ODE is the preset's, not SA-Solver.
An average that keeps 0.001 more of itself per update, not 0.01, lets long runs end in noise.
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
    out=flag("out/awm", "folder of the run", group="Advantage Weighted Matching"),
    steps=flag(75, "iterations: more, at such rates, are not known to end well", "[1, 1e7]"),
    times=flag(3, "random times per image, at which it teaches", "[1, 49]"),
    near=flag(0.003, "weight of the KL to the average; 0: no average, fewer forwards", "[0, 1000]"),
    most=flag(5.0, "advantages, in standard deviations, are cut off there", "(0, 1000]"),
    old=flag(0.3, "most that the average keeps of itself per update", "[0, 1)"),
    old_growth=flag(0.01, "by so much more per update, from 0, it keeps of itself", "(0, 1]"))


def awm_loss(v, target, advantage):
    """v, target (n,C,H,W), advantage (n,) -> (n,): at advantage 1 the flow matching loss."""
    return advantage * (v - target).square().mean((1, 2, 3))


def main():
    lab = Lab(Args, __doc__)
    args, model, optimiser, device = lab.args, lab.model, lab.optimiser, lab.device
    G = args.G
    average = Follower(optimiser, args.old if args.near else 0, args.old_growth)
    for step in lab.recorder.steps():
        clock = Clock()
        rng = keyed(key(args.seed, step, 0))             # every rank draws alike

        # 1  draw B prompts; a group is G images of one prompt
        batch, rows = lab.draw_prompts(rng)
        asked = [row["prompt"] for row in batch]
        conditions = lab.encode(asked)

        # 2  draw them along the ODE, each from its own noise
        x0 = model.sample(conditions.repeat(G), args.T, noise=lab.noise(step))   # (N,C,H,W)
        clock.lap("rollout")
        images = model.to_images(x0).cpu()
        clock.lap("decode")

        # 3  score the images; compare each with its own group
        advantage, kept, scored = lab.advantage(step, images, rows, rng)
        clock.lap("reward")

        # 4  noise the images to random times; there, climb advantage x -|v - v*|^2
        total = args.B * G * args.times
        x_t, t, target, owner = lab.noised(step, x0, kept)
        weight = advantage[kept].clamp(-args.most, args.most).repeat(args.times).to(device)
        if args.near:
            with average.applied():
                average_branches = lab.encode(asked, conditions)
                v_average = lab.velocities(x_t, t, average_branches, owner)
        # With gradient only now: a graph does not outlive the weights of another policy.
        branches = lab.encode(asked, conditions, lab.learns)
        leaf = branches.leaf()
        seen = []
        for i in lab.parts(len(t)):
            v = model.velocity(x_t[i], t[i], leaf.rows(owner[i]))
            loss = awm_loss(v, target[i], weight[i])                             # (rows,)
            kl = torch.zeros_like(loss)
            if args.near:
                kl = (v - v_average[i]).square().mean((1, 2, 3))
            ((loss + args.near * kl).sum() / total).backward()
            seen.append(torch.stack([loss, kl], 1).detach())
        branches.pull(leaf)                              # into the bridge, if that learns
        norms = optimiser.update(step, seen, asked)
        optimiser.ema.update(step)
        average.update(step)
        clock.lap("update")

        # 5  one row per step; held-out prompts and a place to restart, now and then
        stats = lab.means(seen, "loss", "kl") | dict(kept=len(kept) / len(rows))
        lab.record(step, stats, scored | norms | clock.row())
    lab.finish()


if __name__ == "__main__":
    main()
