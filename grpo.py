"""Stage 3, reinforcement learning: draw, score, compare with the group, draw better.

Flow-GRPO (Liu et al. 2025) with what makes it cheap: few steps, no guidance, noise on a window of
steps only, that window trained in one batched forward, one update per rollout.

    torchrun grpo.py --reward geneval               # the classroom: see README for time and score
    python grpo.py --reward jpeg_compressibility    # UniRL-Zero fig. 2
    torchrun --nproc-per-node 2 grpo.py             # prompts are shared out; the result is the same

One iteration (DiT forwards per optimised image: at most T + 3 x window, a backward counting two):

    1  draw B prompts, encode each once, repeat it G times
    2  roll out: Euler steps, except in the window, which steps at random and keeps its log-probs
    3  score the images; advantage = how much better than the group, in standard deviations
    4  climb the clipped surrogate over the window's steps; groups that all agree cost nothing
    5  log; now and then look at pictures and score held-out prompts
"""

import copy
import json
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from eval import JUDGE, bench_shapes, grid, parse_weights, read_prompts, score, show_table
from model import (Ema, Unified, adapter, adapters_off, all_mean, fail, given_parts, key, log,
                   open_run, parse, plot, sde_step, setup, sigmas, start_model, stop_flag,
                   sum_grads, write)


KERNELS = ("flow", "unirl", "dance", "cps", "cps-simple")     # see model.sde_step


@dataclass
class Args:
    task: str = "t2i"                 # t2i: the DiT learns from pictures
    preset: str = "shapes"            # which model: see PRESETS in model.py
    init: str = "data/shapes/sft"     # a checkpoint, or a diffusers DiT's or peft LoRA's folder
    vlm: str = ""                     # in place of the preset's: folder, or owner/repo on the Hub
    dit: str = ""                     # the same; or owner/repo/subfolder
    vae: str = ""                     # the same
    reward: str = "geneval"           # a name, or a mix: geneval:0.8,jpeg_compressibility:0.2
    judge: str = ""                   # VLM of rewards preference, judge; empty: see eval.MODELS
    judge_url: str = ""               # where it answers (OpenAI-compatible); empty: it runs here
    prompts: str = "data/shapes/prompts/train.jsonl"   # jsonl in GenEval's schema
    out: str = "out/grpo"             # run folder
    steps: int = 300                  # updates
    B: int = 16                       # prompts per update, over all ranks
    G: int = 8                        # images per prompt, the group that is compared
    T: int = 10                       # denoising steps while training (evaluation: --eval-T)
    window: int = 3                   # consecutive steps that are random and trained
    window_start: int = 0             # first step a window may start at
    window_stop: int = 3              # last step it may start at; drawn anew for each update
    kind: str = "flow"                # kernel of the random steps: flow, unirl, dance, cps
    eta: float = 0.9                  # size of the fresh noise; 0 = nothing to explore
    shared_noise: bool = True         # one initial noise per group: its spread is then all actions
    guidance: float = 1.0             # the same in rollout and update; 1 = none, half the forwards
    train: str = "dit"                # what learns: dit, bridge (and its queries) or both
    lora_rank: int = 0                # of an adapter on the DiT's attention; 0: all weights learn
    lora_alpha: int = 64              # the adapter's output is scaled by alpha / rank
    lr: float = 8e-5                  # AdamW; 5 steps of warm-up, then linearly down to a tenth
    wd: float = 0.0                   # weight decay
    clip: float = 2e-3                # ratio range; x D latent dimensions = nats of true log-ratio
    updates: int = 1                  # optimiser steps per rollout; 1: the ratio is exactly 1
    shuffle: bool = False             # control row: rewards dealt out at random over the batch
    beta: float = 0.0                 # weight of the KL to the initial model; 0: no copy of it
    kl: str = "mean"                  # mean: between step means, closed form | velocity
    ema: float = 0.95                 # decay of the averaged weights that are evaluated and kept
    micro: int = 64                   # window rows per backward; 0: all. Gradients are equal
    eval_every: int = 20              # updates between quick scores on held-out prompts
    eval_T: int = 10                  # ODE steps in evaluation
    seed: int = 0
    resume: bool = False              # continue the run in --out


def check(args, world):
    """Every error a user can make, before anything is loaded or written."""
    if args.task != "t2i":
        fail(f"unknown task {args.task!r}; there is: t2i")
    if args.G < 2:
        fail("--G 1: a group of one has nothing to compare with, every advantage is 0; try 8")
    if args.B % world:
        fail(f"--B {args.B} prompts cannot be shared by {world} ranks: choose a multiple")
    if not (args.window > 0 <= args.window_start <= args.window_stop < args.T - args.window):
        fail(f"a window of {args.window} steps starting at {args.window_start} to "
             f"{args.window_stop} must end before the last of --T {args.T} steps, which adds no "
             "noise")
    if args.lora_rank and args.train == "bridge":
        fail("--lora-rank adapts the DiT: --train dit or both")
    for name, value, valid in (("train", args.train, ("dit", "bridge", "both")),
                               ("kl", args.kl, ("mean", "velocity")),
                               ("kind", args.kind, KERNELS)):
        if value not in valid:
            fail(f"unknown --{name} {value!r}; there are: {', '.join(valid)}")
    try:
        return parse_weights(args.reward)
    except ValueError as e:
        fail(e)


@torch.no_grad()
def rollout(model, guided, ts, window, args, keys):
    """G images for each of B prompts. guided: branches of their B conditions; ts: T+1 floats,
    1 ... 0; noise keyed by keys[b] = (initial noise, fresh noise), a group's images in a row.
    With shared noise a group is one image until the window tells its members apart.

    -> latents x_0 (N,C,H,W), N = B G, and the window's path: xs (w+1,N,C,H,W), old log-probs (w,N),
    fp32."""
    n = args.G if args.shared_noise else 1
    x = model.noise([initial for initial, _ in keys[::n]])                       # (N/n,C,H,W)
    rows = [(weight, c.repeat(args.G // n)) for weight, c in guided]
    xs, logps = [], []
    for k, (t, s) in enumerate(zip(ts, ts[1:])):
        if k == window[0]:
            x, rows = x.repeat_interleave(n, 0), [(weight, c.repeat(n)) for weight, c in rows]
        v = model.velocity(x, t, rows)
        if k in window:
            noise = model.noise([fresh + k for _, fresh in keys])                # (N,C,H,W)
            xs.append(x)
            x, logp, _, _ = sde_step(v, x, t, s, args.eta, args.kind, noise=noise)
            logps.append(logp)
            if k == window[-1]:
                xs.append(x)
        else:
            x = x - (t - s) * v
    return x, torch.stack(xs), torch.stack(logps)


def group_advantage(R, W, G):
    """Rewards R (N,K), NaN = not scored, with weights W (N,K) -> advantages (N,).

    DeepGen's reward-wise normalisation: each reward is z-scored within its group of G, so that none
    outweighs another by its spread; `main` then z-scores the weighted sum over the batch. A group
    that agrees gets exactly 0."""
    # In fp64 the mean of equal fp32 numbers is that number: 3 x 1/3 agree to the last bit.
    r = R.double().view(-1, G, R.shape[1])                                       # (B,G,K)
    mean = r.nanmean(1, keepdim=True)
    std = (r - mean).square().nanmean(1, keepdim=True).sqrt()
    z = ((r - mean) / (std + 1e-4)).nan_to_num(0).view_as(R)                     # (N,K)
    return (z * W).sum(1).float()


@contextmanager
def swapped(model, ref):
    """For a while the reference policy: ref = (DiT, bridge) in place of those that learn. A DiT
    whose LoRA learns is its own reference, with the LoRA switched off."""
    own, (model.dit, model.bridge) = (model.dit, model.bridge), ref
    with adapters_off(model.dit):
        yield
    model.dit, model.bridge = own


def surrogate(model, guided, prompt, xs, old, A, ts, window, denominator, args, anchor=None):
    """The clipped objective (Flow-GRPO eq. 5); calls backward, once per micro-batch.

    guided: branches of conditions of distinct prompts; prompt (n,) says whose image b is; path xs
    (w+1,n,C,H,W), old log-probs (w,n), advantages A (n,). The sum over rows is divided by the fixed
    global denominator: neither micro-batches, ranks nor dropped groups change the gradient.
    anchor: for --beta, the reference's (DiT, bridge) and its own branches of conditions.
    -> largest |ratio - 1|, share of clipped rows, KL."""
    w, n = old.shape
    stats, size = [], args.micro or w * n
    # Fold the window into the batch: row (k, b) is step window[k] of image b.
    t = torch.tensor(ts, device=A.device)[list(window)].repeat_interleave(n)     # (w n,)
    s = torch.tensor(ts, device=A.device)[[k + 1 for k in window]].repeat_interleave(n)
    x, x_next = xs[:-1].flatten(0, 1), xs[1:].flatten(0, 1)                      # (w n,C,H,W)
    prompt, A, old = prompt.repeat(w), A.repeat(w), old.flatten()
    for i in torch.arange(w * n, device=A.device).split(size):
        rows = [(weight, c.rows(prompt[i])) for weight, c in guided]
        v = model.velocity(x[i], t[i], rows)
        _, logp, mean, std = sde_step(v, x[i], t[i], s[i], args.eta, args.kind, x_next=x_next[i])
        ratio = (logp - old[i]).exp()                                            # 1 at first
        gain = torch.min(ratio * A[i], ratio.clamp(1 - args.clip, 1 + args.clip) * A[i])
        loss = -gain.sum() / denominator
        kl = A.new_zeros(())
        if args.beta:
            ref, guided_ref = anchor
            with torch.no_grad(), swapped(model, ref):
                rows_ref = [(weight, c.rows(prompt[i])) for weight, c in guided_ref]
                v_ref = model.velocity(x[i], t[i], rows_ref)
                mean_ref = sde_step(v_ref, x[i], t[i], s[i], args.eta, args.kind, x_next[i])[2]
            if args.kl == "mean":         # closed form between Gaussians of one std, mean over D
                kl = ((mean - mean_ref).square() / (2 * std**2)).mean((1, 2, 3))
            else:
                kl = (v - v_ref).square().mean((1, 2, 3))
            loss = loss + args.beta * kl.sum() / denominator
        loss.backward()
        with torch.no_grad():
            off = (ratio - 1).abs()
            stats.append(torch.stack([off.max(), (off > args.clip).float().mean(), kl.mean()]))
    off, clipped, kl = torch.stack(stats).T
    return off.max(), clipped.mean(), kl.mean()


def main():
    args = parse(Args, __doc__, "stage3")
    rank, world, device = setup()
    weights = check(args, world)
    JUDGE.model, JUDGE.url = args.judge, args.judge_url
    try:
        metas = read_prompts(args.prompts)
    except (OSError, ValueError) as e:
        fail(e)
    if not metas:
        fail(f"{args.prompts} holds no prompts")
    learns = {k: None for k in ("dit", "bridge") if args.train in (k, "both")}
    if args.lora_rank:
        learns["dit"] = adapter("dit", args.lora_rank, args.lora_alpha)
    # The reference of the KL is the initial policy: frozen copies of what learns, but for a LoRA.
    copies = [k for k, lora in learns.items() if args.beta and not lora]
    rows = args.micro or args.window * args.B * args.G // world
    model = start_model(args, learns, rows, "bridge" in learns and args.B // world, rank, device,
                        copies)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ref = [copy.deepcopy(part).requires_grad_(False) if name in copies else part
           for name, part in (("dit", model.dit), ("bridge", model.bridge))] if args.beta else None
    opt = torch.optim.AdamW(params.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.wd)
    ema = Ema(params, args.ema)
    start = ema.resume(args.out, opt) if args.resume else 0
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail

    ts = sigmas(args.T, model.cfg.sample_shift).tolist()                         # 1 ... 0
    D = math.prod(model.noise([0]).shape)
    B, G = args.B // world, args.G                       # B from here on: prompts of this rank
    stop = stop_flag()

    def look(step):
        """Fixed prompts at fixed noise: a grid to look at, a quick score. -> metrics"""
        png = out / "samples" / f"step_{step:05d}.png"
        draw = partial(model.draw, steps=args.eval_T, guidance=args.guidance)
        with ema.applied():
            if args.preset.startswith("shapes"):                     # held-out prompts
                r = bench_shapes(draw, 1, 96, png)
                return dict(score=r["score"], extra=r["extra_rate"], kB=r["jpeg_kb"])
            faces = [m["prompt"] for m in metas[:16]]
            images = draw(faces, range(len(faces))).cpu()
        grid(images, faces, png)
        R, W, _ = score(images, metas[:16], 1, weights)
        return dict(score=((R * W).nansum() / W.sum()).item())

    def conditions(prompts):
        """Branches of encoded prompts, and leaves of the same values: micro-batches of the update
        add their gradients there, then one backward goes on into the bridge, so that each prompt is
        encoded once whatever learns."""
        with torch.set_grad_enabled(args.train != "dit"):
            encoded = model.guided(model.encode(prompts), args.guidance)
        return encoded, [(w, c.map(lambda a: a.detach().requires_grad_(a.requires_grad)))
                         for w, c in encoded]

    stopped, shown = False, look(0) if rank == 0 and not args.resume else {}
    if not args.resume:
        log(out, rank, dict(step=0, at=0.0, **shown))
    bar = tqdm(range(start, args.steps), "grpo", initial=start, total=args.steps, disable=rank > 0)
    for step in bar:
        # 1  draw B prompts, encode each once, repeat it G times
        g = torch.Generator().manual_seed(key(args.seed, step, 0))
        chosen = torch.randperm(len(metas), generator=g)[: args.B].tolist()
        first = int(torch.randint(args.window_start, args.window_stop + 1, (), generator=g))
        window = range(first, first + args.window)
        mine = range(rank * B, rank * B + B)             # whole groups stay on one rank
        batch = [metas[chosen[i % len(chosen)]] for i in mine for _ in range(G)]
        clock = [time.time()]
        prompts = [m["prompt"] for m in batch[::G]]
        encoded, guided = conditions(prompts)                                    # B conditions
        anchor = None
        if ref:
            with torch.no_grad(), swapped(model, ref):
                anchor = ref, model.guided(model.encode(prompts), args.guidance)

        # 2  roll out: Euler steps, except in the window
        index = [i * G + j for i in mine for j in range(G)]      # global: ranks change no noise
        keys = [(key(args.seed, step, (n // G * G if args.shared_noise else n) * 100),
                 key(args.seed, step, n * 100 + 1)) for n in index]
        x0, xs, old = rollout(model, guided, ts, window, args, keys)
        clock.append(time.time())
        images = model.to_images(x0).cpu()                                       # (N,3,H,W) uint8
        clock.append(time.time())

        # 3  score the images; compare each with its own group
        R, W, names = score(images, batch, G, weights)                           # (N,K) each
        tried, failed = W != 0, R.isnan() & (W != 0)     # a failure moves nothing, but counts
        lost, of = torch.tensor(all_mean([*failed.sum(0), *tried.sum(0)])).view(2, -1)   # (K,)
        lost = lost / of.clamp(min=1e-9)                 # shares, over all ranks
        if lost.max() > 0.5:                             # on every rank, so all stop
            fail(f"reward {names[lost.argmax()]!r} failed for {lost.max():.0%} of the images "
                 f"of update {step + 1}, more than half {JUDGE.error}")
        if args.shuffle:
            R = R[torch.randperm(len(R), generator=g)]
        A = group_advantage(R, W, G)                                             # (N,), mean 0
        A = A / (all_mean([A.square().mean().item()])[0] ** 0.5 + 1e-4)          # batch z-score
        keep = (A.view(B, G).abs().amax(1) > 0).repeat_interleave(G).nonzero()[:, 0]
        clock.append(time.time())

        # 4  climb the clipped surrogate; groups that all agree cost no forward
        for u in range(args.updates):
            if u and args.train != "dit":                # the bridge has learned: once more
                encoded, guided = conditions(prompts)
            off = clipped = kl = torch.zeros(())
            if len(keep):
                k = keep.to(device)
                off, clipped, kl = surrogate(
                    model, guided, k // G, xs[:, k], old[:, k], A[keep].to(device), ts, window,
                    args.B * G * args.window, args, anchor)
            if args.train != "dit" and len(keep):
                ends = [(a, b.grad) for (_, e), (_, c) in zip(encoded, guided)
                        for a, b in ((e.ctx, c.ctx), (e.pooled, c.pooled)) if a is not None]
                torch.autograd.backward(*zip(*ends))
            sum_grads(list(params.values()))
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            for group in opt.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / 5) * (1 - 0.9 * step / args.steps)
            opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(step)
        clock.append(time.time())

        # 5  one row per step; held-out prompts and a place to restart, now and then
        mean = all_mean([*R.nanmean(0).tolist(), len(keep) / len(A), off, clipped, kl, bool(stop)])
        row = dict(step=step + 1, at=round(time.time() - begin, 1),
                   **{f"reward_{name}": m for name, m in zip(names, mean)},
                   **{f"failed_{name}": x for name, x in zip(names, lost.tolist()) if x},
                   **dict(zip(("kept", "ratio_off", "clipped", "kl"), mean[len(names):])),
                   clip_nats=args.clip * D, grad_norm=norm.item(),
                   **{f"s_{name}": round(b - a, 3) for name, a, b in zip(
                       ("rollout", "decode", "reward", "update"), clock, clock[1:])})
        stopped = mean[-1] > 0                                   # any rank: all stop together
        last = step + 1 == args.steps or stopped
        if rank == 0 and ((step + 1) % args.eval_every == 0 or last):
            shown = look(step + 1)
            row |= shown
            ema.save(out, model, step + 1, opt)
        log(out, rank, row)
        if rank == 0 and "score" in row:
            plot(out, [f"reward_{n}" for n in names], ["score", "extra"], ["grad_norm"])
        bar.set_postfix({"reward": f"{mean[0]:.3g}", "held out": f"{shown.get('score', 0):.3f}",
                         "norm": f"{norm.item():.2f}"}, refresh=False)
        if last:
            break

    # 6  the whole benchmark, before and after, on the same noise
    if rank == 0 and args.preset.startswith("shapes") and not stopped:
        results = {}
        base = Unified.from_preset(args.preset, args.init, **given_parts(args)).to(device)
        with ema.applied():
            for name, m in (("before", base), ("after", model)):
                results[name] = bench_shapes(
                    partial(m.draw, steps=args.eval_T, guidance=args.guidance),
                    png=out / "samples" / f"{name}.png")
        show_table(results)
        write(out / "results.json", json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
