"""Stage 3, reinforcement learning: draw, score, compare with the group, do better.

Flow-GRPO (Liu et al. 2025), made cheap: few steps, no guidance, noise on a window of steps only,
that window folded into one batch, one update per rollout.

    torchrun grpo.py --reward geneval               # the classroom: see README for time and score
    python grpo.py --reward my_file.py:my_function  # a reward of your own: docs/forking.md
    python grpo.py --recipe flow-grpo               # a paper's own settings: common/presets.py
    torchrun --nproc-per-node 2 grpo.py             # prompts are shared out; the result is the same

One iteration (DiT forwards per image that is learned from: at most T + 3 x window, a backward
counting two; with --beta T + 4 x window; --guidance doubles both):

    1  draw B prompts, encode each once; a group is the G images of one prompt
    2  roll out: Euler steps, except in a window of steps that add noise and keep log-probs
    3  score the images; advantage = how much better than the group, in standard deviations
    4  climb the clipped surrogate over the window's steps; groups that all agree cost nothing
    5  log; now and then look at pictures and score held-out prompts
"""

from dataclasses import dataclass
from functools import partial

import torch

from common.data import pairs
from common.flags import DATA, FILE, HUB, RunFlags, flag, parse, read_flag
from common.layouts import columns_of
from common.presets import GRIDS, KERNELS, KLS, NORMS, PRESETS
from common.record import Recorder
from common.rl import (Anchor, Clock, Ldam, batch_std, check_flags, deal_out, disagreeing,
                       draw_rows, draw_steps, draw_window, fine_tune, latent_numbers, ldam_layers,
                       noise_keys, ratio_stats, read_mix, set_up, wants_final_bench)
from common.run import all_mean, key, keyed, setup
from common.weights import swapped
from eval import (before_and_after, bench_pictures, check_prompts, check_scored,
                  draw_while_judging, preview_of, read_prompts_of, read_weights, score)
from model import Unified, rollout, sde_step, sigmas
from rewards.judge import Judge

TRAIN = dict(                                    # --train: the parts that learn
    dit=["dit"],
    bridge=["bridge"],
    both=["dit", "bridge"],
)
CURVES = [["score", "extra"], ["grad_norm"]]     # panels of curves.png, beside the rewards


@dataclass
class Args(RunFlags):
    preset: str = flag("shapes", "which model, by its name in common/presets.py", PRESETS,
                       group="What matters most")
    recipe: str = flag("fast", "settings, by their name there, or a .json of them; a flag wins")
    init: str = flag("data/shapes/sft", "a checkpoint, or the folder of a diffusers DiT or peft "
                     "LoRA; empty: the preset's own weights", HUB)
    reward: str = flag("geneval", "a reward, a mix such as geneval:0.8,my_file.py:f:0.2, or a "
                       ".json of such by category")
    prompts: str = flag("data/shapes/prompts/train.jsonl", "jsonl (GenEval's), or .txt", FILE)
    out: str = flag("out/grpo", "folder of the run")
    steps: int = flag(150, "iterations: a rollout and what is learned from it", "[1, 1e7]")
    B: int = flag(16, "prompts per iteration, over all ranks", "[1, 10000]")
    G: int = flag(8, "images per prompt: the group", "[2, 1000]")
    T: int = flag(10, "denoising steps while training; evaluation takes --eval-T", "[1, 1000]")
    window: int = flag(3, "consecutive steps that are random, and trained", "[1, 1000]")
    eta: float = flag(0.9, "size of the fresh noise; 0: nothing to explore", "0 or [0.001, 10]")
    lr: float = flag(2e-4, "rate of AdamW, falling to a tenth of it; 5 iterations warm up",
                     "[0, 10]")
    eval_every: int = flag(20, "iterations between quick scores on held-out prompts", "[1, 1e7]")
    seed: int = flag(0, "one seed, one result", "[0, 2**63)")

    kind: str = flag("flow", "kernel of the random steps: {}", KERNELS, group="Sampling")
    window_start: int = flag(0, "earliest first step of the window", "[0, 1000]", setting=True)
    window_stop: int = flag(3, "latest first step; it is drawn anew each iteration", "[0, 1000]")
    guidance: float = flag(1.0, "weight of the prompt in rollout and update; 1: off", "[0, 100]")
    grid: str = flag("", "times: {}; empty: the preset's", GRIDS, setting=True)
    shared_noise: bool = flag(True, "a group starts from one initial noise", setting=True)
    mix: str = flag("", "weight of each prompt by its category: text:3,*:1", setting=True)

    train: str = flag("dit", "{}; the bridge with its queries", TRAIN, group="What learns")
    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA", "[0, 1000]")
    lora_alpha: int = flag(64, "a LoRA's output is scaled by this / rank", "[1, 1e5]", setting=True)
    wd: float = flag(0.0, "weight decay of AdamW", "[0, 10]", setting=True)
    ema: float = flag(0.95, "decay of the averaged weights that are evaluated and saved", "[0, 1)")

    clip: float = flag(2e-3, "the ratio is clipped to 1 +- this", "(0, 100]", group="Objective")
    norm: str = flag("group", "scale of advantages: {}, see group_advantage", NORMS)
    updates: int = flag(1, "optimiser steps per rollout, each on a share of it", "[1, 100]")
    trained: int = flag(0, "of the window's steps so many, drawn anew, are trained; 0: all",
                        "[0, 1000]", setting=True)
    beta: float = flag(0.0, "weight of the KL to the initial model; 0: no copy of it", "[0, 1000]")
    kl: str = flag("mean", "which KL: {}, see Anchor", KLS, setting=True)
    shuffle: bool = flag(False, "control: the rewards are dealt out at random over the batch")
    sft: float = flag(0.0, "weight of a fine-tuning loss (DeepGen) beside the rewards", "[0, 1)")
    sft_data: str = flag("data/shapes/train", "images and prompts, as pretrain.py's --data", DATA)
    sft_batch: int = flag(32, "its images per update", "[1, 1e5]", setting=True)
    columns: str = flag("", "own names of columns in --prompts, --sft-data: caption=my_text",
                        columns_of)
    ldam: str = flag("", "layers of a bridge lim that see a reward's noise (ParaUni): geneval:4-6")
    ldam_gamma: float = flag(0.1, "size of --ldam's noise", "[0, 100]", setting=True)
    ldam_leap: float = flag(100.0, "growth of grad_norm for --ldam", "[0, 1e9]", setting=True)
    ldam_falls: int = flag(5, "falls of the reward for --ldam", "[0, 1e6]", setting=True)

    judge: str = flag("", "VLM of the rewards preference and judge; empty: see rewards/shared.py",
                      group="Rewards")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    max_failed: float = flag(0.5, "share of unusable rewards or answers that ends a run", "[0, 1]")

    vlm: str = flag("", "folder, or owner/repo on the Hub", HUB, group="Weights not the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub", HUB)
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub", HUB)

    micro: int = flag(64, "rows of the window per backward; 0: all. The gradients are equal",
                      "[0, 1e6]", group="Memory and speed")
    checkpoint: bool = flag(False, "less memory: the backward pass computes again what learns")
    shard: bool = flag(False, "each rank keeps a part of AdamW's state and of the average (FSDP2)")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")

    eval_prompts: str = flag("", "held-out prompts for photos, a file as --prompts; empty: "
                             "GenEval's own test if that is the reward, else none and no score",
                             FILE, group="Evaluation")
    eval_T: int = flag(10, "ODE steps of a drawing", "[1, 1000]")
    final_bench: bool | None = flag(None, "at the end the whole benchmark, before and after [on, "
                                    "unless --steps is below --eval-every]")


# ---------------------------------------------------------------------------------------------
# The algorithm


def group_advantage(R, W, G, norm="group"):
    """Rewards R (N,K), NaN = not scored, with weights W (N,K) -> advantages (N,).

    group   DeepGen's reward-wise normalisation: each reward is z-scored within its group of G, so
            that none outweighs another by its spread; the loop then z-scores their weighted sum
            over the batch. Departs from its code, which cuts that off at +-5
    joint   plain GRPO: the weighted sum of the rewards is z-scored within its group
    global  Flow-GRPO: its distance from the group's mean by the std of the whole batch
    joint, global: at most +-5, as UniRL-Zero, Flow-GRPO. A group that agrees gets exactly 0.
    A reward that could not be had counts as its group's mean; joint, global: so does the image."""
    if norm != "group":
        R = torch.where(W == 0, 0, R * W).sum(1, keepdim=True)
        W = torch.ones(len(R), 1)
    # In fp64 the mean of equal fp32 numbers is that number: 3 x 1/3 agree to the last bit.
    r = R.double()
    r = r.view(-1, G, R.shape[1])                                                # (B,G,K)
    mean = r.nanmean(1, keepdim=True)
    # Departs from the code of UniRL-Zero and DeepGen, whose std divides by G - 1.
    variance = (r - mean).square().nanmean(1, keepdim=True)
    std = variance.sqrt()
    if norm == "global":
        std = batch_std(r)
    z = (r - mean) / (std + 1e-4)
    z = z.nan_to_num(0)
    z = z.view_as(R)                                                             # (N,K)
    advantage = (z * W).sum(1)
    advantage = advantage.float()
    if norm == "group":
        return advantage
    return advantage.clamp(-5, 5)


def batch_score(advantage):
    """Advantages (N,), whose mean is 0, in standard deviations of all ranks' batch."""
    variance, = all_mean([advantage.square().mean().item()])
    return advantage / (variance**0.5 + 1e-4)


def surrogate(model, branches, owner, path, advantage, times, total, args, anchor=None,
              window_steps=None):
    """The clipped objective (Flow-GRPO eq. 5); calls backward, once per micro-batch.

    branches: conditions; owner (n,): which of them an image was drawn for. path: the images'
    Trajectory, window w; advantage (n,). The sum over rows is divided by the fixed global `total`,
    so that neither micro-batches nor ranks change the gradient, and a dropped group, whose
    advantages are 0, takes only its KL along. window_steps: which of the window's are trained,
    default all. -> (rows,2): each row's ratio and KL.

    With one update per rollout the ratio is 1 and the clip cannot bind; it is for --updates 2."""
    kernel = partial(sde_step, eta=args.eta, kind=args.kind)
    device = advantage.device
    w, n = path.logp.shape
    # Fold the window into the batch: row (k, b) is step window[k] of image b.
    start, stop = path.window.start, path.window.stop
    times = torch.tensor(times, device=device)
    t = times[start:stop].repeat_interleave(n)                                   # (w n,)
    s = times[start + 1 : stop + 1].repeat_interleave(n)
    x = path.xs[:-1].flatten(0, 1)                                               # (w n,C,H,W)
    x_next = path.xs[1:].flatten(0, 1)
    old = path.logp.flatten()
    owner = owner.repeat(w)
    advantage = advantage.repeat(w)
    rows = torch.arange(w * n, device=device).view(w, n)
    rows = rows[window_steps or slice(None)].flatten()
    seen = []
    for i in rows.split(args.micro or w * n):
        v = model.velocity(x[i], t[i], branches.rows(owner[i]))
        _, logp, mean, std = kernel(v, x[i], t[i], s[i], x_next=x_next[i])
        ratio = (logp - old[i]).exp()                                            # 1 at first
        clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
        gain = torch.min(ratio * advantage[i], clipped * advantage[i])
        loss = -gain.sum() / total   # Departs from Flow-GRPO, which divides by what is kept
        kl = torch.zeros_like(ratio)
        if anchor:
            kl = anchor.kl(model, kernel, owner[i], x[i], t[i], s[i], v, mean, std)
            loss = loss + anchor.beta * kl.sum() / total
        loss.backward()
        seen.append(torch.stack([ratio, kl], 1).detach())
    return torch.cat(seen)


def check(args, world):
    """Errors that a user can make, before anything is loaded or written. -> rewards and their
    weights by category, weights of categories in the draw, layers that see a reward's noise"""
    check_prompts(args)
    check_flags(args, world, "prompts")
    weights = read_flag(args, "reward", read_weights)
    return weights, read_flag(args, "mix", read_mix), ldam_layers(args, weights)


def encode(model, prompts, args, learns, layer_noise=None):
    """The conditions of B prompts, with gradient if the bridge learns. -> Branches"""
    with torch.set_grad_enabled("bridge" in learns):
        cond = model.encode(prompts, layer_noise=layer_noise)
        return model.guided(cond, args.guidance)


def main():
    args = parse(Args, __doc__, "stage3")
    rank, world, device = setup()
    weights, mix, layers = check(args, world)
    judge = Judge(args.judge, args.judge_url)
    prompts, held = read_prompts_of(args, weights, mix)

    # The model, what trains it, and where the run is kept
    learns = TRAIN[args.train]
    B = args.B // world                                  # prompts of this rank
    G = args.G
    micro = args.micro or args.window * B * G            # rows per backward
    reads = B if "bridge" in learns else 0               # prompts that are read with gradient
    model, initial, optimiser = set_up(
        Unified, args, learns, micro, reads, args.beta, rank, device)
    if args.sft:
        data = pairs(args.sft_data, model.cfg, args.sft_batch // world, args.seed, rank, world,
                     optimiser.position.get("sft"), columns=args.columns)
        optimiser.data["sft"] = data
    ldam = Ldam(args, layers, model.cfg.layers)
    layer_noise = ldam.resumed(args.out, optimiser.start) if args.ldam else None
    preview = preview_of(model, args, prompts, held, weights, judge, rank)
    recorder = Recorder(args, rank, optimiser, preview)   # after all that can fail

    grid = args.grid or model.cfg.grid
    times = sigmas(args.T, model.cfg.sample_shift, grid)
    times = times.tolist()                               # T + 1 numbers, from 1 to 0
    D = latent_numbers(model)
    first = rank * B                                     # whole groups stay on one rank
    samples = list(range(first * G, (first + B) * G))    # this rank's, among all ranks'
    for step in recorder.steps():
        clock = Clock()
        rng = keyed(key(args.seed, step, 0))             # every rank draws alike

        # 1  draw B prompts and encode each once; a group is the G images of one prompt
        batch = draw_rows(prompts, args.B, rng, mix)
        batch = batch[first : first + B]
        window = draw_window(args, rng)
        asked = [row["prompt"] for row in batch]
        branches = encode(model, asked, args, learns, layer_noise)
        leaf = branches.leaf()           # a copy on which the micro-batches' gradients add up
        anchor = None
        if args.beta:
            initial_branches = leaf
            if "bridge" in learns:       # then the initial policy's conditions are others
                with swapped(model, initial):
                    initial_branches = encode(model, asked, args, (), layer_noise)
            anchor = Anchor(initial, initial_branches, args.beta, args.kl)

        # 2  roll out: Euler steps, except in a window of steps that add noise
        rows = [row | dict(group=i) for i, row in enumerate(batch)]  # preference compares a group's
        rows = [row for row in rows for _ in range(G)]                   # N = B G
        keys = noise_keys(args, step, samples, G)
        if args.judge_url:               # steps 2 and 3 at once: judges while the next are drawn
            path, scores = draw_while_judging(
                model, leaf, rows, weights, judge, times, window, keys, args, clock)
        else:
            path = rollout(
                model, leaf, times, window, keys, args.eta, args.kind, args.shared_noise)
            clock.lap("rollout")
            images = model.to_images(path.x0).cpu()                      # (N,3,H,W)
            clock.lap("decode")

            # 3  score the images; compare each with its own group
            scores = score(images, rows, weights, judge)                 # values (N,K)
        scored = check_scored(scores, args.max_failed, step, args.prompts)
        if args.shuffle:
            deal_out(scores, rng)
        advantage = group_advantage(scores.values, scores.weights, G, args.norm)
        if args.norm == "group":
            advantage = batch_score(advantage)                           # (N,), mean 0
        kept = disagreeing(advantage, G)
        clock.lap("reward")

        # 4  climb the clipped surrogate. As in Flow-GRPO, an update takes its share of the images,
        #    drawn over all ranks
        order = torch.randperm(args.B * G, generator=rng)[samples]
        turn = order % args.updates                      # (N,) the update that an image is part of
        window_steps = draw_steps(args, rng)
        total = args.B * G * len(window_steps) / args.updates
        total = total / (1 - args.sft)                   # DeepGen eq. 5: RL weighs 1 - sft
        advantage = advantage.to(device)
        seen = []
        taught = {}
        for update in range(args.updates):
            if update and "bridge" in learns:            # the bridge has learned: encode once more
                branches = encode(model, asked, args, learns, layer_noise)
                leaf = branches.leaf()
            seen.append([])
            chosen = kept[turn[kept] == update].to(device)
            if len(chosen):
                ratios = surrogate(
                    model, leaf, chosen // G, path.rows(chosen), advantage[chosen], times, total,
                    args, anchor, window_steps)
                seen[update].append(ratios)
                branches.pull(leaf)                      # into the bridge, if that learns
            if args.sft:
                loss = fine_tune(model, data, args, step, update, rank, world)
                taught["sft"] = taught.get("sft", 0) + loss
            norms = optimiser.update(step, seen[update], asked)
        optimiser.ema.update(step)
        clock.lap("update")

        # 5  one row per step; held-out prompts and a place to restart, now and then
        if args.ldam:
            taught["ldam"] = layer_noise is not None
        stats = ratio_stats(seen, args.clip, D, args.beta)
        stats = stats | taught | dict(kept=len(kept) / len(rows))
        columns = scored | norms | optimiser.finite.column() | clock.row()
        row = recorder.record(step, stats, columns, CURVES)
        if args.ldam:
            layer_noise = ldam.after(row)                # that the next iteration's bridge sees

    if wants_final_bench(args):
        before_and_after(args, optimiser, recorder.out, bench_pictures)


if __name__ == "__main__":
    main()
