"""Stage 3 for second looks: judge a picture, say what is wrong with it, draw it again.

Reflection RL (UniRL-Zero, scenario 6, of which its code has nothing) is cycle_edit.py with words:
a sample is a critique and, where that says no, the picture drawn because of it. One advantage is
credited to all tokens and all denoising steps, and both experts learn:

    torchrun reflect.py                             # the classroom: see README for time and score
    python reflect.py --train lm --out out/lm       # the paper's ablation: lm, dit or both
    python reflect.py --shuffle --out out/control   # the same rewards, dealt out at random
    python reflect.py --data my_pictures/ --preset unirl-zero --reward judge

One iteration (DiT forwards per sample that says no: at most T + 3 x window, as in cycle_edit.py):

    1  draw B prompts, each with a first image of the pool: half of them right, half wrong
    2  the VLM looks at it G times: "yes", or "no", and why
    3  who says no draws it again, from prompt, first image and critique; else the first one stays
       (of --redraw first images: a verdict costs little beside a drawing, most are judged alone)
    4  R = verdict is right + form is kept + score of the final picture; a group shares prompt and
       first image, a sample's words and denoising steps share one advantage
    5  climb both clipped surrogates, of tokens and of steps; groups that all agree cost nothing
    6  log; now and then look at pictures and judge held-out ones

The first image is no action, whoever drew it: nothing learns from it (the paper leaves that open).
"""

import copy
import json
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.shapes.prepare import render
from eval import (JUDGE, bench_reflect, bench_shapes, check_scored, grid, held_out_score,
                  must_score, parse_weights, read_prompts, score, show_table)
from model import (GRIDS, UNREADABLE, Ema, Finite, Unified, adapter, all_mean, check_ranks, fail,
                   flag, given_parts, key, keyed, log, open_run, parse, plot, preset, read_image,
                   rollout, sde_step, setup, shown, sigmas, slices, start_model, stop_flag,
                   sum_grads, swapped, verdict, write)


KERNELS = ("flow", "unirl", "dance", "cps", "cps-simple")     # see model.sde_step


@dataclass
class Args:
    preset: str = flag("shapes", "which model, by its name in PRESETS (model.py)",
                       group="What matters most")
    recipe: str = flag("fast", "which settings, by their name in RECIPES (model.py); a flag wins")
    init: str = flag("out/sft-reflect", "a checkpoint that redraws, or as grpo.py's --init")
    reward: str = flag("geneval", "of the final picture, as grpo.py's: a reward, a mix, or a .json")
    data: str = flag("data/shapes/prompts/reflect_train.jsonl",
                     "jsonl of prompts and first images, or a folder with metadata.jsonl")
    train: str = flag("both", "what learns: lm (by its tokens), dit (by its steps), or both and "
                      "the bridge between")
    out: str = flag("out/reflect", "folder of the run")
    steps: int = flag(200, "updates")
    B: int = flag(128, "first images per update, over all ranks")
    redraw: int = flag(8, "of so many of them each critique that says no leads to a second "
                       "drawing; the others are judged alone")
    G: int = flag(8, "critiques per first image, 2 or more: the group")
    lr: float = flag(8e-5, "peak rate of AdamW, after 5 updates; then linearly down to a tenth")
    lm_lr: float = flag(7e-4, "as --lr, of the language model")
    seed: int = flag(0, "0 to 2**63 - 1; one seed, one result")
    resume: bool = flag(False, "continue the run in --out")

    limit: int = flag(32, "most tokens that a critique may have", group="Words")
    temperature: float = flag(1.0, "of drawing words, above 0; evaluation takes the likeliest ones")
    top_p: float = flag(1.0, "words are drawn from the likeliest of this mass, up to 1: all")

    verdict: float = flag(1.0, "weight of the reward for a right verdict, 0 or 1", group="Rewards")
    format: float = flag(1.0, "weight of the reward for the critique's form, 0 or 1")
    judge: str = flag("", "VLM of the rewards preference and judge; empty: see MODELS (eval.py)")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    max_failed: float = flag(0.5, "a larger share of rewards that could not be had, or of judges' "
                             "answers that say nothing, ends the run")

    T: int = flag(10, "denoising steps while training; evaluation takes --eval-T",
                  group="Sampling and exploration")
    grid: str = flag("", "times of the rollout: uniform or diffusers; empty: the preset's")
    window: int = flag(3, "consecutive steps that are random, and trained")
    window_start: int = flag(0, "first step, from 0, at which a window may start")
    window_stop: int = flag(3, "last step at which it may start; each update draws one of them")
    kind: str = flag("flow", "kernel of the random steps: flow, unirl, dance, cps, cps-simple")
    eta: float = flag(0.9, "size of the fresh noise; 0: there is nothing to explore")
    shared_noise: bool = flag(True, "one initial noise per group: its members differ by actions")
    guidance: float = flag(1.0, "weight of prompt and critique in rollout and update; 1: none")
    refs: str = flag("", "what redraws from the picture: vlm, dit or both; empty: the preset's")

    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA",
                          group="What learns")
    lora_alpha: int = flag(64, "output of that LoRA is scaled by this / rank")
    vlm_lora_rank: int = flag(0, "rank of a LoRA on the language model; 0: no LoRA")
    vlm_lora_alpha: int = flag(128, "output of that LoRA is scaled by this / rank")
    wd: float = flag(0.0, "weight decay of AdamW")
    ema: float = flag(0.95, "decay, below 1, of the averaged weights that are evaluated and saved")

    norm: str = flag("group", "scale of advantages: group, joint or global, see group_advantage",
                     group="Objective")
    clip: float = flag(2e-3, "the ratio is kept within 1 +- this; times the latent's dimensions "
                       "it is nats of the true log-ratio")
    lm_clip: float = flag(0.2, "the ratio of a token is kept within 1 +- this")
    updates: int = flag(1, "optimiser steps per rollout, each on its share of the samples")
    shuffle: bool = flag(False, "control: the rewards are dealt out at random over the batch")
    beta: float = flag(0.0, "weight of the steps' KL to the initial model; 0: no copy of it")
    lm_beta: float = flag(0.1, "as --beta, of tokens")
    kl: str = flag("mean", "which KL: mean (between step means, in closed form), flow-grpo "
                   "(without the step size) or velocity (between velocities)")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own",
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")

    micro: int = flag(64, "critiques, or rows of the window, per backward; 0: all. The "
                      "gradients are equal", group="Memory and speed")
    checkpoint: bool = flag(False, "the DiT's blocks are computed again in the backward pass, "
                            "which saves memory")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")

    eval_every: int = flag(20, "updates between quick scores on held-out pictures",
                           group="Evaluation")
    eval_data: str = flag("", "held-out photos, as --data; empty: none, and no score")
    eval_T: int = flag(10, "ODE steps of a drawing")
    rounds: int = flag(1, "most looks at a picture; a yes ends them")


def check_flags(args, world):
    """Every error a user can make, before anything is loaded or written. -> the picture's rewards
    and weights"""
    if args.data == Args.data and not args.preset.startswith("shapes"):
        fail(f"preset {args.preset!r} draws photos and needs --data of its own: a folder with "
             "metadata.jsonl, rows of prompt, right and wrong")
    if args.eval_data and args.preset.startswith("shapes"):
        fail("--eval-data is for photos: the classroom has held-out pictures of its own")
    if preset(args.preset).bridge == "text":
        fail(f"preset {args.preset!r} has no language model that could judge a picture")
    if args.G < 2:
        fail("--G 1: a group of one has nothing to compare with, every advantage is 0; try 8")
    if args.B % world:
        fail(f"--B {args.B} first images cannot be shared by {world} ranks: choose a multiple")
    if not (args.window > 0 <= args.window_start <= args.window_stop < args.T - args.window):
        fail(f"a window of {args.window} steps starting at {args.window_start} to "
             f"{args.window_stop} must end before the last of --T {args.T} steps, which adds no "
             "noise")
    if min(args.redraw, args.B) < min(2 * world, args.B):
        fail(f"--redraw {args.redraw}: at least a pair of first images for each of {world} ranks")
    if args.updates < 1 or args.B * args.G % args.updates:
        fail(f"--B {args.B} x --G {args.G} samples cannot be shared by --updates {args.updates}")
    if args.temperature <= 0 or not 0 < args.top_p <= 1 or min(args.limit, args.rounds) < 1:
        fail("--temperature is above 0 (or all critiques of a group are one), --top-p in (0,1], "
             "--limit and --rounds at least 1")
    if args.lora_rank and args.train == "lm" or args.vlm_lora_rank and args.train == "dit":
        fail(f"a LoRA on what --train {args.train} leaves as it is")
    for name, value, valid in (("train", args.train, ("lm", "dit", "both")),
                               ("kl", args.kl, ("mean", "flow-grpo", "velocity")),
                               ("grid", args.grid or "uniform", GRIDS),
                               ("norm", args.norm, ("group", "joint", "global")),
                               ("kind", args.kind, KERNELS)):
        if value not in valid:
            fail(f"unknown --{name} {value!r}; there are: {', '.join(valid)}")
    try:                                                 # a mix of rewards, or {category: mix}
        text = Path(args.reward).read_text() if args.reward.endswith(".json") else args.reward
        mixes = json.loads(text) if text.strip().startswith("{") else {"*": text}
        return {kind: parse_weights(str(m))["*"] for kind, m in mixes.items()}
    except (OSError, ValueError) as e:
        fail(e)


def read_pool(path):
    """jsonl, or a folder with metadata.jsonl -> first images: rows of the wrong ones, of the right.

    A line has `prompt` (and GenEval's metadata for rewards that read it), and `right` or `wrong` or
    both: a picture's file beside the jsonl, or a scene."""
    file = Path(path) / "metadata.jsonl" if Path(path).is_dir() else Path(path)
    pools = [], []
    for i, row in enumerate(read_prompts(file), 1):
        for pool, side in zip(pools, ("wrong", "right")):
            if side in row:
                pool.append(row | dict(source=row[side], right=side == "right",
                                       where=f"{file}, line {i}", folder=file.parent))
    for pool, side in zip(pools, ("wrong", "right")):
        if not pool:
            raise ValueError(f"{file}: no row has a first image that is {side}, `{side}`")
    return pools


def picture(row, folder, size):
    """A row's source, uint8 (3,size,size). As in grpo.py all pictures are square: others lose what
    stands out."""
    source = row["source"]
    try:
        image = (Image.fromarray(render(source)) if isinstance(source, list) else
                 read_image(folder / source))
    except (*UNREADABLE, LookupError, TypeError) as e:   # the last two: no scene of the classroom
        fail(f"{row['where']}: its source cannot be read ({e!r})")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def group_advantage(R, W, G, norm="group"):
    """Rewards R (N,K), NaN = not scored, with weights W (N,K) -> advantages (N,).

    group   DeepGen's reward-wise normalisation: each reward is z-scored within its group of G, so
            that none outweighs another by its spread; `main` then z-scores their weighted sum over
            the batch. Departs from its code, which cuts that off at +-5
    joint   plain GRPO: the weighted sum of the rewards is z-scored within its group
    global  Flow-GRPO: its distance from the group's mean by the std of the whole batch
    joint, global: at most +-5, as UniRL-Zero, Flow-GRPO. A group that agrees gets exactly 0."""
    if norm != "group":
        R, W = torch.where(W == 0, 0, R * W).sum(1, keepdim=True), torch.ones(len(R), 1)
    # In fp64 the mean of equal fp32 numbers is that number: 3 x 1/3 agree to the last bit.
    r = R.double().view(-1, G, R.shape[1])                                       # (B,G,K)
    mean = r.nanmean(1, keepdim=True)
    # Departs from the code of UniRL-Zero and DeepGen, whose std divides by G - 1.
    std = (r - mean).square().nanmean(1, keepdim=True).sqrt()
    if norm == "global":
        squares, total = all_mean([r.square().nanmean(), r.nanmean()])           # over the ranks
        std = max(0, squares - total**2) ** 0.5
    z = ((r - mean) / (std + 1e-4)).nan_to_num(0).view_as(R)                     # (N,K)
    A = (z * W).sum(1).float()
    return A if norm == "group" else A.clamp(-5, 5)


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
        loss = -gain.sum() / denominator   # Departs from Flow-GRPO, which divides by what is kept
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


def token_surrogate(logp, old, mask, A, weight, args, ref=None):
    """The clipped objective over words (UniRL-Zero eq. 2). logp, old, for --lm-beta the reference's
    ref: (n,L) log-probs; mask (n,L) True = chosen by the policy; A (n,); weight (n,) of each token.

    Departs from eq. 2, which means over the tokens of one sample: here over those of its group. So
    a yes or no, which decides, weighs the same before few words and many (with a mean per sample
    a wrong answer costs less the longer it is), and long answers to one question do not outweigh
    short ones to another. -> loss, (tokens,2): each token's ratio and KL (k3: r - 1 - log r of
    reference to policy)"""
    ratio = (logp - old)[mask].exp()                                             # (tokens,)
    A, weight = (x[:, None].expand_as(mask)[mask] for x in (A, weight))
    gain = torch.min(ratio * A, ratio.clamp(1 - args.lm_clip, 1 + args.lm_clip) * A)
    kl = torch.zeros_like(ratio)
    if args.lm_beta:
        off = (ref - logp)[mask]
        kl = off.exp() - 1 - off
    loss = (weight * (args.lm_beta * kl - gain)).sum()
    return loss, torch.stack([ratio, kl], 1).detach()


def main():
    args = parse(Args, __doc__, "stage3")
    rank, world, device = setup()
    weights = check_flags(args, world)
    JUDGE.model, JUDGE.url = args.judge, args.judge_url
    try:
        pools, held = read_pool(args.data), read_pool(args.eval_data) if args.eval_data else ()
        for row in sum((*pools, *held), []):
            kind = row.get("category", row.get("tag"))
            if kind not in weights and "*" not in weights:
                fail(f"{args.reward} has no mix for prompts of category {kind!r}, and no '*'")
            must_score(weights.get(kind, weights.get("*")), [row])
    except FileNotFoundError as e:
        fail(f"{e}; the classroom's: python -m data.shapes.prepare data")
    except (OSError, ValueError) as e:
        fail(e)
    trained = {row["prompt"] for row in pools[0] + pools[1]}
    if both := [row for row in sum(held, []) if row["prompt"] in trained]:
        fail(f"{both[0]['where']}: its prompt is in {args.data}, as those of {len(both)} in "
             f"{len(sum(held, []))} pictures are: what is trained is not held out")

    def see(row):
        return picture(row, row["folder"], preset(args.preset).size)
    [see(row) for row in sum((*pools, *held), [])]       # all can be read, or nothing starts
    classroom = args.preset.startswith("shapes")         # whose held-out pictures are its benchmark
    lm, dit = args.train != "dit", args.train != "lm"    # who learns; the bridge if both do
    learns = dict(bridge=None) if lm and dit else {}
    if dit:
        learns["dit"] = adapter("dit", args.lora_rank, args.lora_alpha)
    if lm:
        learns["vlm"] = adapter("vlm", args.vlm_lora_rank, args.vlm_lora_alpha)
    # The reference of the KL is the initial policy: frozen copies of what learns, but for LoRAs.
    anchored = dit and args.beta or lm and args.lm_beta
    copies = [k for k, lora in learns.items() if anchored and not lora]
    B, G = args.B // world, args.G                       # B from here on: first images of this rank
    rows = dit and (args.micro or args.window * B * G)
    model = start_model(args, learns, rows, lm and (args.micro or B * G), rank, device, copies)
    ways = shown(model.cfg)                              # it can redraw, or nothing starts
    model.dit.checkpoint = args.checkpoint
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ref = [copy.deepcopy(part).requires_grad_(False) if name in copies else part for name, part in
           (("dit", model.dit), ("bridge", model.bridge), ("vlm", model.vlm))]
    if args.compile:                     # one graph for all lengths of context and sizes of batch
        model.dit.compile(dynamic=True)
    split = [[p for k, p in params.items() if k.startswith("vlm.") == words]
             for words in (False, True)]
    opt = torch.optim.AdamW([dict(params=some) for some in split], lr=args.lr, betas=(0.9, 0.99),
                            weight_decay=args.wd)
    ema = Ema(params, args.ema)
    start = ema.resume(args.out, opt) if args.resume else 0
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail
    if rank == 0 and not (classroom or held):
        print("no held-out pictures: those shown are of the training pool, and there is no score; "
              "--eval-data FILE names some")

    ts = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()   # 1 ... 0
    D, stop, finite = math.prod(model.noise([0]).shape), stop_flag(), Finite()
    faces = [pool[i * len(pool) // 5] for i in range(5) for pool in held or pools]   # half right

    def again(prompts, images, seeds, model=model):
        """As trained, but that words are the likeliest ones. -> last images, critiques of each"""
        return model.reflect(prompts, images, seeds, args.rounds, args.eval_T, args.guidance,
                             args.limit)

    def look(step):
        """Fixed pictures at fixed noise: first and last side by side, what was said below; and a
        quick score on held-out ones, if there are any. -> metrics"""
        png = out / "samples" / f"step_{step:05d}.png"
        prompts, firsts = [row["prompt"] for row in faces], torch.stack([see(row) for row in faces])
        with ema.applied():
            last, said = again(prompts, firsts, range(len(faces)))
            bench = bench_reflect(again, 1, 96) if classroom else {}
        texts = [t for p, row in zip(prompts, said) for t in (p, " / ".join(row))]
        grid(torch.stack([firsts, last.cpu()], 1).flatten(0, 1), texts, png,
             [f for row in faces for f in (row["right"], None)])
        if classroom:
            return {name: bench[name] for name in ("accuracy", "corrected", "damaged")}
        if not held:
            return {}
        faced = [row | dict(source_image=x) for row, x in zip(faces, firsts)]
        right = [verdict(row[0])[0] == face["right"] for row, face in zip(said, faces)]
        return held_out_score(*score(last.cpu(), faced, 1, weights)[:2]) | dict(
            accuracy=sum(right) / len(right))

    def conditions(n):
        """One pass of the VLM over prompt, first image and critique of samples n, and the queries
        if they are redrawn (then all are) -> branches of conditions to redraw from, log-probs (n,L)
        of the critique."""
        its, said = [[x[i] for i in n] for x in (prompts, firsts)], words.rows(n)
        if n[0] not in redrawn:
            return [], model.text_logp(*its, said, "judge", args.temperature)
        cond, logp = model.encode_words(*its, said, "judge", args.temperature)
        cond.refs = [refs[i] for i in n] if "dit" in ways else None
        return model.guided(cond, args.guidance, its[1], "edit"), logp

    stopped, latest = False, look(0) if rank == 0 and not args.resume else {}
    if not args.resume:
        log(out, rank, dict(step=0, at=0.0, **latest))
    bar = tqdm(range(start, args.steps), "reflect", initial=start, total=args.steps,
               disable=rank > 0)
    for step in bar:
        # 1  draw B prompts, each with a first image of the pool: by turns a wrong and a right one
        g = keyed(key(args.seed, step, 0))
        orders = [torch.randperm(len(pool), generator=g).tolist() for pool in pools]
        first = int(torch.randint(args.window_start, args.window_stop + 1, (), generator=g))
        window = range(first, first + args.window)
        mine = range(rank * B, rank * B + B)             # whole groups stay on one rank
        batch = [pools[i % 2][orders[i % 2][i // 2 % len(pools[i % 2])]] for i in mine]
        batch = [row | dict(source_image=see(row)) for row in batch]
        index = [i * G + j for i in mine for j in range(G)]      # global: ranks change no noise
        clock, looks = [time.time()], [row for row in batch for _ in range(G)]   # N = B G
        keys = [(key(args.seed, step, (n // G * G if args.shared_noise else n) * 100),
                 key(args.seed, step, n * 100 + 1)) for n in index]
        prompts, firsts = [row["prompt"] for row in looks], [[row["source_image"]] for row in looks]

        # 2  the VLM looks at it G times
        words = model.generate(prompts[::G], firsts[::G], "judge", args.limit, args.temperature,
                               args.top_p, [key(args.seed, step, n * 100 + 99) for n in index], G)
        says, formed = zip(*map(verdict, words.texts))
        clock.append(time.time())

        # 3  who says no draws it again: each for reasons of its own, a group from one initial
        #    noise; of --redraw first images, pairs of a wrong and a right one, evenly among the B.
        #    The log-probs kept are not those the words were drawn with but of the update's own pass
        #    over them, which conditions the DiT: so the ratio starts at 1
        drawn = [i // 2 * args.redraw % args.B < args.redraw for i in mine for _ in range(G)]
        redrawn = [n for n, yes in enumerate(says) if yes is False and drawn[n]]
        redrawn = {n: k for k, n in enumerate(redrawn)}          # sample: its row among the redrawn
        last = torch.cat([image[0][None] for image in firsts])                   # (N,3,H,W) uint8
        old_logp, refs, branches = torch.zeros_like(words.logp), {}, []
        if redrawn:
            if "dit" in ways:                            # a group shares the noise of its reference
                of = dict.fromkeys(n // G * G for n in redrawn)
                of = dict(zip(of, model.ref_latents([firsts[n] for n in of],
                                                    [keys[n][0] for n in of])))
                refs = {n: of[n // G * G] for n in redrawn}
            with torch.no_grad():
                branches, old_logp[[*redrawn]] = conditions([*redrawn])
            x0, xs, old = rollout(model, branches, ts, window, replace(args, G=1),
                                  [keys[n] for n in redrawn])
            last[[*redrawn]] = model.to_images(x0).cpu()
        clock.append(time.time())

        # 4  R = verdict + form + final picture; one advantage for words and denoising steps
        at = torch.tensor(drawn).nonzero()[:, 0]
        said = {}
        scores, odds, names = score(last[at], [looks[n] for n in at], G, weights, said)
        R = torch.full((len(looks), len(names)), math.nan).index_copy(0, at, scores)     # (N,K)
        W = torch.zeros_like(R).index_copy(0, at, odds)
        told = torch.tensor([[yes == row["right"], form and closed] for yes, form, closed, row in
                             zip(says, formed, words.closed.tolist(), looks)])
        R, names = torch.cat([told.float(), R], 1), ["verdict", "format", *names]
        W = torch.cat([torch.tensor([[args.verdict, args.format]]).expand(len(W), 2), W], 1)
        failures = check_scored(R, W, names, said, args, step, args.data)
        if args.shuffle:
            for some in (at, (~torch.tensor(drawn)).nonzero()[:, 0]):       # who has as many
                R[some] = R[some[torch.randperm(len(some), generator=g)]]
        A = group_advantage(R, W, G, args.norm)                                  # (N,), mean 0
        if args.norm == "group":                                                 # batch z-score
            A = A / (all_mean([A.square().mean().item()])[0] ** 0.5 + 1e-4)
        keep = (A.view(B, G).abs().amax(1) > 0).repeat_interleave(G).nonzero()[:, 0]
        rest = [n for n in keep.tolist() if lm and n not in redrawn]
        with torch.no_grad():
            old_logp[rest] = conditions(rest)[1] if rest else 0.0
        clock.append(time.time())

        # 5  climb both clipped surrogates; groups that all agree cost no forward. An update takes
        #    its share of the samples, drawn over all ranks; in the first every ratio is 1
        share = torch.randperm(args.B * G, generator=g)[index] % args.updates    # (N,)
        weight = args.updates / args.B / (                       # of a token: all groups are equal
            words.mask.view(B, -1).sum(1).repeat_interleave(G))                  # (N,)
        # What stays as it was moves nothing, but counts.
        moves = min(args.redraw, args.B) * G * args.window / args.updates
        seen, spoken = [[] for _ in range(args.updates)], [[] for _ in range(args.updates)]
        for u in range(args.updates):
            now = keep[share[keep] == u].tolist()
            for both in ([n for n in now if n in redrawn],
                         [n for n in now if lm and n not in redrawn]):
                for n in (both[some] for some in slices(len(both), args.micro) if both):
                    k = [redrawn[i] for i in n if i in redrawn]                  # all, or none
                    credit, encoded = A[n].to(device), [(w, c.rows(k)) for w, c in branches if k]
                    if lm:                               # read again with gradient, once
                        encoded, logp = conditions(n)
                    guided = [(w, c.map(lambda a: a.detach().requires_grad_(a.requires_grad)))
                              for w, c in encoded]       # leaves, see grpo.py
                    anchor = logp_ref = None
                    if anchored:
                        with torch.no_grad(), swapped(model, ref):
                            *anchor, logp_ref = ref, *conditions(n)
                    if k and dit:
                        seen[u].append(surrogate(
                            model, guided, torch.arange(len(k), device=device), xs[:, k],
                            old[:, k], credit, ts, window, moves, args, anchor))
                    if lm:
                        loss, of = token_surrogate(logp, old_logp[n], words.mask[n], credit,
                                                   weight[n], args, logp_ref)
                        spoken[u].append(of)
                        ends = [(a, b.grad) for (_, e), (_, c) in zip(encoded, guided) if dit
                                for a, b in ((e.ctx, c.ctx), (e.pooled, c.pooled)) if a is not None]
                        torch.autograd.backward(*zip((loss, None), *ends))
            sum_grads(list(params.values()), seen[u] + spoken[u])
            norms = [torch.nn.utils.clip_grad_norm_(some, 1.0).item() for some in split]
            for group, lr in zip(opt.param_groups, (args.lr, args.lm_lr)):
                group["lr"] = lr * min(1, (step + 1) / 5) * (1 - 0.9 * step / args.steps)
            if finite(step, norms, prompts[::G]):
                opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(step)
        clock.append(time.time())

        # 6  one row per step; held-out pictures and a place to restart, now and then
        none, scored = torch.tensor([[1.0, 0.0]], device=device), ~R.isnan()
        sums = all_mean([*R.double().nansum(0), *scored.sum(0)])
        rewards = {f"reward_{n}": a / b for n, a, b in zip(names, sums, sums[len(names):]) if b}
        stats = dict(kept=len(keep) / len(A), redrawn=len(redrawn) / len(A),
                     words=words.mask.sum(1).float().mean(), stop=bool(stop))
        for who, got, clip, nats in (("", seen, args.clip, D), ("lm_", spoken, args.lm_clip, 1)):
            ratio, kl = torch.cat(sum(got, [] if any(got) else [none])).T
            stats |= {who + name: x for name, x in dict(
                ratio_off=(torch.cat([none, *got[0]])[:, 0] - 1).abs().max(),
                ratio_low=ratio.quantile(0.05), ratio_high=ratio.quantile(0.95), kl=kl.mean(),
                clipped=((ratio - 1).abs() > clip).float().mean(),
                # E[L^2] / 2 of log-ratios L is about the KL from the old policy: in nats
                kl_old=(nats * ratio.log()).square().mean() / 2).items()}
        stats = dict(zip(stats, all_mean([*stats.values()])))
        stopped = stats.pop("stop") > 0                          # any rank: all stop together
        row = dict(step=step + 1, at=round(time.time() - begin, 1), **rewards, **stats,
                   **failures, clip_nats=args.clip * D, grad_norm=norms[0], lm_grad_norm=norms[1],
                   **finite.column(), **{f"s_{name}": round(b - a, 3) for name, a, b in zip(
                       ("words", "redraw", "reward", "update"), clock, clock[1:])})
        due = (step + 1) % args.eval_every == 0 or step + 1 == args.steps or stopped
        if due:
            check_ranks(params, f"after update {step + 1}")
        if rank == 0 and due:
            latest = look(step + 1)
            row |= latest
            ema.save(out, model, step + 1, opt)
        log(out, rank, row)
        if rank == 0 and due:
            plot(out, [f"reward_{n}" for n in names],
                 *[["accuracy", "corrected", "damaged", "score"]] * bool(latest), ["words"],
                 ["grad_norm", "lm_grad_norm"])
        bar.set_postfix({"verdict": f"{rewards['reward_verdict']:.3g}",
                         **{"held out": f"{x:.3f}" for k, x in latest.items() if k == "accuracy"},
                         "norm": f"{norms[0]:.3f}"}, refresh=False)
        if stopped:
            break

    # 7  held-out pictures and, since one model does both, drawings, before and after, on one noise
    if rank == 0 and classroom and not stopped:
        results = {}
        base = Unified.from_preset(args.preset, args.init, seed=args.seed, **given_parts(args))
        base.to(device)
        with ema.applied():
            for name, m in (("before", base), ("after", model)):
                results[name] = bench_reflect(partial(again, model=m),
                                              png=out / "samples" / f"{name}.png")
                t2i = bench_shapes(partial(m.draw, steps=args.eval_T), 1)
                results[name] |= dict(t2i=t2i["score"], t2i_se=t2i["score_se"])
        show_table(results)
        write(out / "results.json", json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
