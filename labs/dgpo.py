"""Stage 3 by Direct Group Preference Optimization (Luo et al. 2025): a group's better half is
preferred to its worse half, as DPO prefers one image to another.

    torchrun labs/dgpo.py --reward geneval           # flags as grpo.py's, but for those removed

One iteration (DiT forwards per image: T + 4 x times, a backward counting two):

    1  draw B prompts; a group is G images of one prompt
    2  draw them along the ODE, each from its own noise
    3  score the images; advantage = how much better than the group, in standard deviations
    4  noise the images of a group alike to random times; with L = |v - v*|^2 and L_0 that of the
       initial policy, climb log sigmoid(-sharp sum_i advantage_i (L_i - L_0i) / G)
    5  log; now and then look at pictures and score held-out prompts

Removed against grpo.py: kernels, window and log-probs, as no step is random; ratio and clip, in
place of which a group that is already preferred weighs less; the noise that a group has in common
when it is drawn; several updates, SFT, LDAM.
Departs from its code: the reference stays the initial policy, whose own guidance is the run's; no
PPO clip, idle at one update per rollout; times are the preset's, not the noisier part of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import grpo  # noqa: E402
from common.flags import flag, fork  # noqa: E402
from common.rl import Clock  # noqa: E402
from common.run import key, keyed  # noqa: E402
from common.weights import swapped  # noqa: E402
from labs.begin import REMOVED, Lab  # noqa: E402

Args = fork(
    grpo.Args, REMOVED,
    out=flag("out/dgpo", "folder of the run", group="Direct Group Preference Optimization"),
    times=flag(3, "random times per group, at which it teaches", "[1, 49]"),
    sharp=flag(100.0, "how soon a group that is preferred weighs less", "[0.001, 1e6]"),
    most=flag(5.0, "advantages, in standard deviations, are cut off there", "(0, 1000]"))


def dgpo_loss(v, v_0, target, advantage, G, sharp):
    """v, v_0, target (n,C,H,W), advantage (n,), groups of G in a row -> (n / G,). The paper's beta
    is `sharp`; its loss is divided by half of that, so that the gradient at v = v_0 is that of the
    group's mean of advantage |v - target|^2, whatever it is."""
    gained = (v - target).square().mean((1, 2, 3)) - (v_0 - target).square().mean((1, 2, 3))
    worse = (advantage * gained).view(-1, G).mean(1)                             # (groups,)
    return F.softplus(sharp * worse) / (sharp / 2)


def main():
    lab = Lab(Args, __doc__, anchored=True)
    args, model, optimiser, device = lab.args, lab.model, lab.optimiser, lab.device
    G = args.G
    for step in lab.recorder.steps():
        clock = Clock()
        rng = keyed(key(args.seed, step, 0))             # every rank draws alike

        # 1  draw B prompts; a group is G images of one prompt
        batch, rows = lab.draw_prompts(rng)
        asked = [row["prompt"] for row in batch]
        branches = lab.encode(asked, learns=lab.learns)
        leaf = branches.leaf()

        # 2  draw them along the ODE, each from its own noise
        x0 = model.sample(leaf.repeat(G), args.T, noise=lab.noise(step))         # (N,C,H,W)
        clock.lap("rollout")
        images = model.to_images(x0).cpu()
        clock.lap("decode")

        # 3  score the images; compare each with its own group
        advantage, kept, scored = lab.advantage(step, images, rows, rng)
        clock.lap("reward")

        # 4  noise a group alike to random times; there, prefer its better half to its worse half
        total = args.B * args.times
        x_t, t, target, owner = lab.noised(step, x0, kept, group=G)
        weight = advantage[kept].clamp(-args.most, args.most).repeat(args.times).to(device)
        with torch.no_grad(), swapped(model, lab.initial):
            initial_branches = lab.encode(asked, leaf)
            v_0 = lab.velocities(x_t, t, initial_branches, owner)
        seen = []
        for i in lab.parts(len(t), G):                   # whole groups
            v = model.velocity(x_t[i], t[i], leaf.rows(owner[i]))
            loss = dgpo_loss(v, v_0[i], target[i], weight[i], G, args.sharp)      # (groups,)
            (loss.sum() / total).backward()
            seen.append(loss.detach()[:, None])
        branches.pull(leaf)                              # into the bridge, if that learns
        norms = optimiser.update(step, seen, asked)
        optimiser.ema.update(step)
        clock.lap("update")

        # 5  one row per step; held-out prompts and a place to restart, now and then
        stats = lab.means(seen, "loss") | dict(kept=len(kept) / len(rows))
        lab.record(step, stats, scored | norms | clock.row())
    lab.finish()


if __name__ == "__main__":
    main()
