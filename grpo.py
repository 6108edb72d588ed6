"""Stage 3, reinforcement learning: draw, score, compare with the group, draw better.

Flow-GRPO (Liu et al. 2025) with what makes it cheap: few steps, no guidance, noise on a window of
steps only, that window trained in one batched forward, one update per rollout.

    torchrun grpo.py --reward geneval               # the classroom: see README for time and score
    python grpo.py --reward jpeg_compressibility    # UniRL-Zero fig. 2
    python grpo.py --recipe flow-grpo               # a paper's own flags: RECIPES in model.py
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from eval import JUDGE, bench_shapes, grid, parse_weights, read_prompts, score, show_table
from model import (Ema, Unified, adapter, adapters_off, all_mean, fail, given_parts, key, log,
                   odds, open_run, pairs, parse, plot, preset, sde_step, setup, sigmas, slices,
                   span, start_model, stop_flag, sum_grads, table, write)


KERNELS = ("flow", "unirl", "dance", "cps", "cps-simple")     # see model.sde_step


@dataclass
class Args:
    task: str = "t2i"                 # t2i: the DiT learns from pictures
    preset: str = "shapes"            # which model: see PRESETS in model.py
    recipe: str = "fast"              # which flags: see RECIPES in model.py
    init: str = "data/shapes/sft"     # a checkpoint, or a diffusers DiT's or peft LoRA's folder
    vlm: str = ""                     # in place of the preset's: folder, or owner/repo on the Hub
    dit: str = ""                     # the same; or owner/repo/subfolder
    vae: str = ""                     # the same
    reward: str = "geneval"           # a name, a mix: geneval:0.8,ocr:0.2, or a .json of categories
    judge: str = ""                   # VLM of rewards preference, judge; empty: see eval.MODELS
    judge_url: str = ""               # where it answers (OpenAI-compatible); empty: it runs here
    max_failed: float = 0.5           # a larger share of rewards that cannot be had ends the run
    prompts: str = "data/shapes/prompts/train.jsonl"   # jsonl in GenEval's schema
    mix: str = ""                     # odds of the prompts' categories: text:3,*:1; empty: as found
    out: str = "out/grpo"             # run folder
    steps: int = 300                  # updates
    B: int = 16                       # prompts per update, over all ranks
    G: int = 8                        # images per prompt, the group that is compared
    T: int = 10                       # denoising steps while training (evaluation: --eval-T)
    window: int = 3                   # consecutive steps that are random and trained
    window_start: int = 0             # first step a window may start at
    window_stop: int = 3              # last step it may start at; drawn anew in each iteration
    trained: int = 0                  # how many of its steps are trained, drawn anew; 0: all
    kind: str = "flow"                # kernel of the random steps: flow, unirl, dance, cps
    eta: float = 0.9                  # size of the fresh noise; 0 = nothing to explore
    shared_noise: bool = True         # one initial noise per group: its spread is then all actions
    guidance: float = 1.0             # the same in rollout and update; 1 = none, half the forwards
    norm: str = "group"               # of advantages: group, joint or global, see group_advantage
    train: str = "dit"                # what learns: dit, bridge (and its queries) or both
    lora_rank: int = 0                # of an adapter on the DiT's attention; 0: all weights learn
    lora_alpha: int = 64              # the adapter's output is scaled by alpha / rank
    lr: float = 8e-5                  # AdamW; 5 steps of warm-up, then linearly down to a tenth
    wd: float = 0.0                   # weight decay
    clip: float = 2e-3                # ratio range; x D latent dimensions = nats of true log-ratio
    updates: int = 1                  # optimiser steps per rollout, each on its share of the images
    shuffle: bool = False             # control row: rewards dealt out at random over the batch
    beta: float = 0.0                 # weight of the KL to the initial model; 0: no copy of it
    kl: str = "mean"                  # mean: between step means, closed form | flow-grpo | velocity
    sft: float = 0.0                  # weight of the loss of fine-tuning, rewards have the rest
    sft_data: str = "data/shapes/train"   # its images and prompts, as pretrain.py's --data
    sft_batch: int = 32               # its images per update, over all ranks
    ldam: str = ""                    # bridge lim: noise on a reward's layers: geneval:4-6,clip:5-6
    ldam_gamma: float = 0.1           # size of that noise
    ldam_leap: float = 100.0          # gate: so many times grows the gradient norm; 0: always open
    ldam_falls: int = 5               # gate: so many times has the reward fallen; 0: always open
    ema: float = 0.95                 # decay of the averaged weights that are evaluated and kept
    micro: int = 64                   # window rows per backward; 0: all. Gradients are equal
    checkpoint: bool = False          # the DiT's blocks compute again what backward needs: memory
    compile: bool = False             # the DiT by torch.compile: minutes at first, then faster
    eval_every: int = 20              # updates between quick scores on held-out prompts
    eval_T: int = 10                  # ODE steps in evaluation
    seed: int = 0
    resume: bool = False              # continue the run in --out


def check(args, world):
    """Every error a user can make, before anything is loaded or written."""
    if args.task != "t2i":
        fail(f"unknown task {args.task!r}; there is: t2i")
    if args.prompts == Args.prompts and not args.preset.startswith("shapes"):
        fail(f"preset {args.preset!r} draws photos and needs --prompts of its own: eval.py "
             "--write-prompts geneval-train FILE writes some")
    if args.G < 2:
        fail("--G 1: a group of one has nothing to compare with, every advantage is 0; try 8")
    if args.B % world:
        fail(f"--B {args.B} prompts cannot be shared by {world} ranks: choose a multiple")
    if not (args.window > 0 <= args.window_start <= args.window_stop < args.T - args.window):
        fail(f"a window of {args.window} steps starting at {args.window_start} to "
             f"{args.window_stop} must end before the last of --T {args.T} steps, which adds no "
             "noise")
    if not 0 <= args.trained <= args.window:
        fail(f"--trained {args.trained} of a window of {args.window} steps")
    if args.updates < 1 or args.B * args.G % args.updates:
        fail(f"--B {args.B} x --G {args.G} images cannot be shared by --updates {args.updates}")
    if not 0 <= args.sft < 1 or args.sft and args.sft_batch % world:
        fail(f"--sft {args.sft} is a share in [0,1), --sft-batch a multiple of the {world} ranks")
    if args.lora_rank and args.train == "bridge":
        fail("--lora-rank adapts the DiT: --train dit or both")
    for name, value, valid in (("train", args.train, ("dit", "bridge", "both")),
                               ("kl", args.kl, ("mean", "flow-grpo", "velocity")),
                               ("norm", args.norm, ("group", "joint", "global")),
                               ("kind", args.kind, KERNELS)):
        if value not in valid:
            fail(f"unknown --{name} {value!r}; there are: {', '.join(valid)}")
    try:                                                 # a mix of rewards, or {category: mix}
        text = Path(args.reward).read_text() if args.reward.endswith(".json") else args.reward
        mixes = json.loads(text) if text.strip().startswith("{") else {"*": text}
        weights = {kind: parse_weights(str(m))["*"] for kind, m in mixes.items()}
        mix, ldam = table(args.mix, float), table(args.ldam, span)
    except (OSError, ValueError) as e:
        fail(e)
    ldam = {name: at for name, at in ldam.items() if any(name in w for w in weights.values())}
    if args.ldam and (preset(args.preset).bridge != "lim" or not ldam):
        fail(f"--ldam {args.ldam} wants a preset with bridge lim, and one of those in --reward")
    return weights, mix, ldam


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


def group_advantage(R, W, G, norm="group"):
    """Rewards R (N,K), NaN = not scored, with weights W (N,K) -> advantages (N,).

    group   DeepGen's reward-wise normalisation: each reward is z-scored within its group of G, so
            that none outweighs another by its spread; `main` then z-scores their weighted sum over
            the batch. Departs from its code, which cuts that off at +-5
    joint   plain GRPO: the weighted sum of the rewards is z-scored within its group
    global  Flow-GRPO: its distance from the group's mean by the std of the whole batch, at most +-5
    A group that agrees gets exactly 0."""
    if norm != "group":
        R, W = torch.where(W == 0, 0, R * W).sum(1, keepdim=True), torch.ones(len(R), 1)
    # In fp64 the mean of equal fp32 numbers is that number: 3 x 1/3 agree to the last bit.
    r = R.double().view(-1, G, R.shape[1])                                       # (B,G,K)
    mean = r.nanmean(1, keepdim=True)
    std = (r - mean).square().nanmean(1, keepdim=True).sqrt()
    if norm == "global":
        squares, total = all_mean([r.square().nanmean(), r.nanmean()])           # over the ranks
        std = max(0, squares - total**2) ** 0.5
    z = ((r - mean) / (std + 1e-4)).nan_to_num(0).view_as(R)                     # (N,K)
    A = (z * W).sum(1).float()
    return A.clamp(-5, 5) if norm == "global" else A


@contextmanager
def swapped(model, ref):
    """For a while the reference policy: ref = (DiT, bridge) or (DiT, bridge, VLM) in place of those
    that learn. One whose LoRA learns is its own reference, with the LoRA switched off."""
    own = model.dit, model.bridge, model.vlm

    def put(parts):
        for name, part in zip(("dit", "bridge", "vlm"), parts):
            setattr(model, name, part)
    put(ref)
    with adapters_off(model):
        yield
    put(own)


def surrogate(model, guided, prompt, xs, old, A, ts, window, denominator, args, anchor=None,
              trained=None):
    """The clipped objective (Flow-GRPO eq. 5); calls backward, once per micro-batch.

    guided: branches of conditions of distinct prompts; prompt (n,) says whose image b is; path xs
    (w+1,n,C,H,W), old log-probs (w,n), advantages A (n,). The sum over rows is divided by the fixed
    global denominator: neither micro-batches, ranks nor dropped groups change the gradient.
    anchor: for --beta, the reference's (DiT, bridge) and its own branches of conditions.
    trained: which steps of the window, default all. -> (rows,2): each row's ratio and KL."""
    w, n = old.shape
    seen, size = [], args.micro or w * n
    # Fold the window into the batch: row (k, b) is step window[k] of image b.
    t = torch.tensor(ts, device=A.device)[list(window)].repeat_interleave(n)     # (w n,)
    s = torch.tensor(ts, device=A.device)[[k + 1 for k in window]].repeat_interleave(n)
    x, x_next = xs[:-1].flatten(0, 1), xs[1:].flatten(0, 1)                      # (w n,C,H,W)
    prompt, A, old = prompt.repeat(w), A.repeat(w), old.flatten()
    some = torch.arange(w * n, device=A.device).view(w, n)[trained or slice(None)].flatten()
    for i in some.split(size):
        rows = [(weight, c.rows(prompt[i])) for weight, c in guided]
        v = model.velocity(x[i], t[i], rows)
        _, logp, mean, std = sde_step(v, x[i], t[i], s[i], args.eta, args.kind, x_next=x_next[i])
        ratio = (logp - old[i]).exp()                                            # 1 at first
        gain = torch.min(ratio * A[i], ratio.clamp(1 - args.clip, 1 + args.clip) * A[i])
        loss = -gain.sum() / denominator
        kl = torch.zeros_like(ratio)
        if args.beta:
            ref, guided_ref = anchor
            with torch.no_grad(), swapped(model, ref):
                rows_ref = [(weight, c.rows(prompt[i])) for weight, c in guided_ref]
                v_ref = model.velocity(x[i], t[i], rows_ref)
                mean_ref = sde_step(v_ref, x[i], t[i], s[i], args.eta, args.kind, x_next[i])[2]
            if args.kl == "velocity":     # DeepGen eq. 4; its code divides by 2 std^2
                kl = (v - v_ref).square().mean((1, 2, 3))
            else:                         # closed form between Gaussians of one std, mean over D
                kl = ((mean - mean_ref).square() / (2 * std**2)).mean((1, 2, 3))
            if args.kl == "flow-grpo":    # in its code that std lacks the step size
                kl = kl * (t[i] - s[i])
            loss = loss + args.beta * kl.sum() / denominator
        loss.backward()
        seen.append(torch.stack([ratio, kl], 1).detach())
    return torch.cat(seen)


class Ldam:
    """ParaUni's algorithm 1: once the gradient norm has leapt and a reward has fallen again and
    again, the next iteration sees that reward's layers through noise, c_i (1 + gamma eps) (eq. 6);
    then comes a rest, the longer the later.

    What the paper leaves open: gamma(g, r), which is in its supplement, is a constant here; eps is
    one number per layer; it lasts for one iteration, as c_i does; of several rewards, each has its
    own falls; the null of guidance is left alone."""

    def __init__(self, args, at, layers):
        self.args, self.at, self.layers = args, at, layers       # at {reward: its range of layers}
        self.g, self.r, self.leapt = math.inf, dict.fromkeys(at, 0.0), False
        self.falls, self.rest = dict.fromkeys(at, 0), 0

    def after(self, row):
        """row: what is logged of an update, all that a restart needs. -> layer_noise (layers,) of
        the next, or None"""
        a, n, g, due = self.args, row["step"], row["grad_norm"], []
        r = {k: row[f"reward_{k}"] for k in self.at if f"reward_{k}" in row}
        self.leapt |= g >= self.g * a.ldam_leap
        self.falls |= {k: self.falls[k] + (r[k] <= self.r[k]) for k in r}
        if self.rest:
            self.rest -= 1
        elif self.leapt:
            due = [k for k in self.at if self.falls[k] >= a.ldam_falls]
        self.g, self.r = g, self.r | r
        if not due:
            return None
        self.leapt, self.rest, self.falls = False, n, self.falls | dict.fromkeys(due, 0)
        rng = torch.Generator().manual_seed(key(a.seed, n, 1_000_000))
        chosen = torch.tensor([any(i in self.at[k] for k in due) for i in self.layers])
        return 1 + a.ldam_gamma * chosen * torch.randn(len(self.layers), generator=rng)


def main():
    args = parse(Args, __doc__, "stage3")
    rank, world, device = setup()
    weights, mix, layers = check(args, world)
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
    model.dit.checkpoint = args.checkpoint
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ref = [copy.deepcopy(part).requires_grad_(False) if name in copies else part
           for name, part in (("dit", model.dit), ("bridge", model.bridge))] if args.beta else None
    if args.compile:                     # one graph for all lengths of context and sizes of batch
        model.dit.compile(dynamic=True)
    opt = torch.optim.AdamW(params.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.wd)
    ema = Ema(params, args.ema)
    start = ema.resume(args.out, opt) if args.resume else 0
    data = args.sft and pairs(args.sft_data, model.cfg, args.sft_batch // world, args.seed, rank,
                              world, skip=start * args.updates)
    ldam, noise = Ldam(args, layers, model.cfg.layers), None
    if args.ldam and args.resume:
        for row in map(json.loads, open(Path(args.out) / "log.jsonl")):
            noise = ldam.after(row) if 0 < row["step"] <= start else noise
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail

    ts = sigmas(args.T, model.cfg.sample_shift).tolist()                         # 1 ... 0
    D, rates = math.prod(model.noise([0]).shape), odds(metas, mix)
    B, G = args.B // world, args.G                       # B from here on: prompts of this rank
    stop, jury = stop_flag(), ThreadPoolExecutor(1)

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

    def conditions(prompts, noise):
        """Branches of encoded prompts, and leaves of the same values: micro-batches of the update
        add their gradients there, then one backward goes on into the bridge, so that each prompt is
        encoded once whatever learns."""
        with torch.set_grad_enabled(args.train != "dit"):
            encoded = model.guided(model.encode(prompts, layer_noise=noise), args.guidance)
        return encoded, [(w, c.map(lambda a: a.detach().requires_grad_(a.requires_grad)))
                         for w, c in encoded]

    stopped, shown = False, look(0) if rank == 0 and not args.resume else {}
    if not args.resume:
        log(out, rank, dict(step=0, at=0.0, **shown))
    bar = tqdm(range(start, args.steps), "grpo", initial=start, total=args.steps, disable=rank > 0)
    for step in bar:
        # 1  draw B prompts, encode each once, repeat it G times
        g = torch.Generator().manual_seed(key(args.seed, step, 0))
        chosen = (rates.multinomial(min(args.B, int((rates > 0).sum())), generator=g) if mix else
                  torch.randperm(len(metas), generator=g)[: args.B]).tolist()
        first = int(torch.randint(args.window_start, args.window_stop + 1, (), generator=g))
        window = range(first, first + args.window)
        mine = range(rank * B, rank * B + B)             # whole groups stay on one rank
        batch = [metas[chosen[i % len(chosen)]] for i in mine for _ in range(G)]
        clock = [("", time.time())]
        prompts = [m["prompt"] for m in batch[::G]]
        encoded, guided = conditions(prompts, noise)                             # B conditions
        anchor = None
        if ref:
            with torch.no_grad(), swapped(model, ref):
                anchor = ref, model.guided(model.encode(prompts, layer_noise=noise), args.guidance)

        # 2  roll out: Euler steps, except in the window. An endpoint judges the first prompts'
        #    images while the next are drawn, by the same policy; what judges here waits its turn
        index = [i * G + j for i in mine for j in range(G)]      # global: ranks change no noise
        keys = [(key(args.seed, step, (n // G * G if args.shared_noise else n) * 100),
                 key(args.seed, step, n * 100 + 1)) for n in index]
        paths, judged = [], []
        for some in slices(B, -(-B // 4) if JUDGE.url else B):
            n, c = slice(some.start * G, some.stop * G), [(w, c.rows(some)) for w, c in guided]
            x0, *path = rollout(model, c, ts, window, args, keys[n])
            paths.append(path)
            clock.append(("rollout", time.time()))
            images = model.to_images(x0).cpu()                                   # (n,3,H,W) uint8
            clock.append(("decode", time.time()))
            judged.append(jury.submit(score, images, batch[n], G, weights))
        xs, old = (torch.cat(x, 1) for x in zip(*paths))

        # 3  score the images; compare each with its own group
        R, W, names = zip(*(of.result() for of in judged))
        R, W, names = torch.cat(R), torch.cat(W), names[0]                       # (N,K) each
        tried = W != 0                                   # a failure moves nothing, but counts
        failed = tried & R.isnan()
        lost, of = torch.tensor(all_mean([*failed.sum(0), *tried.sum(0)])).view(2, -1)   # (K,)
        lost = lost / of.clamp(min=1e-9)                 # shares, over all ranks
        if lost.max() > args.max_failed:                 # on every rank, so all stop
            fail(f"reward {names[lost.argmax()]!r} failed for {lost.max():.0%} of the images of "
                 f"update {step + 1}, above --max-failed: does {args.prompts} hold what it reads? "
                 f"{JUDGE.error}")
        if args.shuffle:
            R = R[torch.randperm(len(R), generator=g)]
        A = group_advantage(R, W, G, args.norm)                                  # (N,), mean 0
        if args.norm == "group":                                                 # batch z-score
            A = A / (all_mean([A.square().mean().item()])[0] ** 0.5 + 1e-4)
        keep = (A.view(B, G).abs().amax(1) > 0).repeat_interleave(G).nonzero()[:, 0]
        clock.append(("reward", time.time()))

        # 4  climb the clipped surrogate; groups that all agree cost no forward. As in Flow-GRPO, an
        #    update takes its share of the images, drawn over all ranks; the first has ratio 1
        share = torch.randperm(args.B * G, generator=g)[index] % args.updates    # (N,)
        trained = sorted(torch.randperm(args.window, generator=g)[: args.trained or None].tolist())
        denominator = args.B * G * len(trained) / args.updates / (1 - args.sft)
        seen, taught = [], 0.0
        for u in range(args.updates):
            if u and args.train != "dit":                # the bridge has learned: once more
                encoded, guided = conditions(prompts, noise)
            now = keep[share[keep] == u]
            seen.append(torch.tensor([[1.0, 0.0]], device=device))
            if len(now):
                k = now.to(device)
                seen[u] = surrogate(model, guided, k // G, xs[:, k], old[:, k], A[now].to(device),
                                    ts, window, denominator, args, anchor, trained)
            if args.train != "dit" and len(now):
                ends = [(a, b.grad) for (_, e), (_, c) in zip(encoded, guided)
                        for a, b in ((e.ctx, c.ctx), (e.pooled, c.pooled)) if a is not None]
                torch.autograd.backward(*zip(*ends))
            if args.sft:                                 # DeepGen eq. 5: (1 - sft) RL + sft SFT
                pictures, texts = next(data)
                ids = [key(args.seed, step, 500_000 + 2 * (u * args.sft_batch + i * world + rank))
                       for i in range(len(texts))]       # by the number among all ranks' pairs
                for i in slices(len(ids), args.micro):
                    loss = model.flow_loss(pictures[i], texts[i], ids[i]).sum() / args.sft_batch
                    (args.sft * loss).backward()
                    taught += loss.item() * world / args.updates
            sum_grads(list(params.values()))
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
            for group in opt.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / 5) * (1 - 0.9 * step / args.steps)
            opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(step)
        clock.append(("update", time.time()))

        # 5  one row per step; held-out prompts and a place to restart, now and then
        (ratio, kl), scored = torch.cat(seen).T, ~R.isnan()
        sums = all_mean([*R.double().nansum(0), *scored.sum(0)])
        rewards = {f"reward_{n}": a / b for n, a, b in zip(names, sums, sums[len(names):]) if b}
        stats = dict(kept=len(keep) / len(A),
                     ratio_off=(seen[0][:, 0] - 1).abs().max(), ratio_low=ratio.quantile(0.05),
                     ratio_high=ratio.quantile(0.95), kl=kl.mean(), sft=taught, stop=bool(stop),
                     clipped=((ratio - 1).abs() > args.clip).float().mean(),
                     # E[L^2] / 2 of log-ratios L is about the KL from the old policy: in nats
                     kl_old=(D * ratio.log()).square().mean() / 2)
        stats = dict(zip(stats, all_mean([*stats.values()])))
        stopped = stats.pop("stop") > 0                          # any rank: all stop together
        spent = Counter()
        for (_, a), (name, b) in zip(clock, clock[1:]):
            spent[f"s_{name}"] += b - a
        row = dict(step=step + 1, at=round(time.time() - begin, 1), **rewards, **stats,
                   **{f"failed_{name}": x for name, x in zip(names, lost.tolist()) if x},
                   ldam=noise is not None, clip_nats=args.clip * D, grad_norm=norm.item(),
                   **{k: round(v, 3) for k, v in spent.items()})
        last = step + 1 == args.steps or stopped
        if rank == 0 and ((step + 1) % args.eval_every == 0 or last):
            shown = look(step + 1)
            row |= shown
            ema.save(out, model, step + 1, opt)
        log(out, rank, row)
        noise = ldam.after(row)
        if rank == 0 and "score" in row:
            plot(out, [f"reward_{n}" for n in names], ["score", "extra"], ["grad_norm"])
        bar.set_postfix({"reward": f"{next(iter(rewards.values()), 0):.3g}",
                         "held out": f"{shown.get('score', 0):.3f}",
                         "norm": f"{norm.item():.3f}"}, refresh=False)
        if stopped:
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
