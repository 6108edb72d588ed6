"""Stage 3, reinforcement learning: draw or answer, score, compare with the group, do better.

Flow-GRPO (Liu et al. 2025) with what makes it cheap: few steps, no guidance, noise on a window of
steps only, that window trained in one batched forward, one update per rollout.

    torchrun grpo.py --reward geneval               # the classroom: see README for time and score
    python grpo.py --reward jpeg_compressibility    # UniRL-Zero fig. 2
    python grpo.py --recipe flow-grpo               # a paper's own flags: RECIPES in model.py
    torchrun --nproc-per-node 2 grpo.py             # prompts are shared out; the result is the same
    torchrun grpo.py --task cot                     # think, then draw: one advantage for both
    torchrun grpo.py --task vqa                     # answers alone, to questions about pictures

One iteration (DiT forwards per optimised image: at most T + 3 x window, a backward counting two):

    1  draw B prompts, encode each once, repeat it G times; with words (cot: UniRL-Zero's scenario
       5; text, vqa: 1 and 2) the language model answers each G times, every token an action
    2  roll out: Euler steps, except in the window, which steps at random and keeps its log-probs
    3  score images or answers; advantage = how much better than the group, in standard deviations
    4  climb the clipped surrogates over the window's steps and over the tokens, with one advantage
       for both; groups that all agree cost nothing
    5  log; now and then look at pictures and words and score held-out prompts
"""

import copy
import json
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval import (JUDGE, answer_of, bench_reason, bench_shapes, bench_vqa, check_scored,
                  geneval_prompts, grid, held_out_score, parse_weights, read_prompts, score, see,
                  show_answers, show_table)
from model import (GRIDS, UNREADABLE, Ema, Finite, Unified, adapter, all_mean, answers, check_ranks,
                   fail, flag, given_parts, key, keyed, log, odds, open_run, pairs, parse, plot,
                   preset, read_image, rollout, sde_step, setup, sigmas, slices, span, spans,
                   start_model, stop_flag, sum_grads, swapped, table, write)


KERNELS = ("flow", "unirl", "dance", "cps", "cps-simple")     # see model.sde_step
TASKS = {                                                     # what differs from Args by task
    "t2i": {},
    "cot": dict(init="out/sft-cot", prompts="data/shapes/prompts/reason_train.jsonl", steps=40,
                train="both", out="out/cot", format=0.2, lm_beta=0.05),
    "text": dict(prompts="data/shapes/prompts/textqa_train.jsonl", limit=32, steps=120,
                 train="lm", out="out/text", format=0.2, lm_beta=0.05),
    "vqa": dict(prompts="data/shapes/prompts/vqa_train.jsonl", B=128, G=16, limit=32, steps=1500,
                mix="caption:0.15,color:1.5,*:1", train="lm", out="out/vqa", lm_lr=5e-4,
                lm_beta=0.1, micro=512),      # sure of its yes: of 16 some differ, of 4 rarely any
}
LOOK = {                                                      # a quick score -> held-out metrics
    "t2i": dict(score="score", extra="extra_rate", kB="jpeg_kb"),
    "cot": dict(score="score", raw="raw", answer="answer", format="format", length="words"),
    "text": dict(score="accuracy", length="words"), "vqa": dict(score="accuracy", length="words"),
}
TRAIN = {                                                     # --train -> parts that learn
    "t2i": dict(dit=["dit"], bridge=["bridge"], both=["dit", "bridge"]),
    "cot": dict(lm=["vlm"], dit=["dit"], both=["dit", "bridge", "vlm"]),
    "text": dict(lm=["vlm"]), "vqa": dict(lm=["vlm"]),
}


@dataclass
class Args:
    task: str = flag("t2i", "what is trained: t2i (to draw), cot (to think, then draw), text or "
                     "vqa (to answer; flags about drawing then count for nothing)",
                     group="What matters most")
    preset: str = flag("shapes", "which model, by its name in PRESETS (model.py)")
    recipe: str = flag("fast", "which settings, by their name in RECIPES (model.py); a flag wins")
    init: str = flag("data/shapes/sft", "a checkpoint, or the folder of a diffusers DiT or peft "
                     "LoRA; empty: the preset's own weights")
    reward: str = flag("geneval", "a reward, a mix such as geneval:0.8,ocr:0.2, or a .json of such "
                       "by category; text and vqa have their own")
    prompts: str = flag("data/shapes/prompts/train.jsonl",
                        "jsonl of prompts in GenEval's schema; of questions for text and vqa")
    out: str = flag("out/grpo", "folder of the run")
    steps: int = flag(300, "updates")
    B: int = flag(16, "prompts per update, over all ranks")
    G: int = flag(8, "images (or thoughts, answers) per prompt, 2 or more: the group")
    lr: float = flag(8e-5, "peak rate of AdamW, after 5 updates; then linearly down to a tenth")
    seed: int = flag(0, "0 to 2**63 - 1; one seed, one result")
    resume: bool = flag(False, "continue the run in --out")

    T: int = flag(10, "denoising steps while training; evaluation takes --eval-T",
                  group="Sampling and exploration")
    grid: str = flag("", "times of the rollout: uniform or diffusers; empty: the preset's")
    window: int = flag(3, "consecutive steps that are random, and trained")
    window_start: int = flag(0, "first step, from 0, at which a window may start")
    window_stop: int = flag(3, "last step at which it may start; each update draws one of them")
    trained: int = flag(0, "how many of its steps are trained, drawn in each update; 0: all")
    kind: str = flag("flow", "kernel of the random steps: flow, unirl, dance, cps, cps-simple")
    eta: float = flag(0.9, "size of the fresh noise; 0: there is nothing to explore")
    shared_noise: bool = flag(True, "one initial noise per group: its members differ by actions")
    guidance: float = flag(1.0, "weight of the prompt in rollout and update; 1: no guidance, and "
                           "half the forwards")
    mix: str = flag("", "weight of each prompt by its category, as text:3,*:1; empty: all alike")

    train: str = flag("dit", "t2i: dit, bridge (with its queries) or both; cot: lm, dit or both "
                      "(and the bridge between); text, vqa: lm", group="What learns")
    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA")
    lora_alpha: int = flag(64, "output of that LoRA is scaled by this / rank")
    vlm_lora_rank: int = flag(0, "rank of a LoRA on the language model; 0: no LoRA")
    vlm_lora_alpha: int = flag(128, "output of that LoRA is scaled by this / rank")
    lm_lr: float = flag(3e-4, "as --lr, of the language model")
    wd: float = flag(0.0, "weight decay of AdamW")
    ema: float = flag(0.95, "decay, below 1, of the averaged weights that are evaluated and saved")

    norm: str = flag("group", "scale of advantages: group, joint or global, see group_advantage",
                     group="Objective")
    clip: float = flag(2e-3, "the ratio is kept within 1 +- this; times the latent's dimensions "
                       "it is nats of the true log-ratio")
    lm_clip: float = flag(0.2, "the ratio of a token is kept within 1 +- this")
    updates: int = flag(1, "optimiser steps per rollout, each on its share of the images")
    shuffle: bool = flag(False, "control: the rewards are dealt out at random over the batch")
    beta: float = flag(0.0, "weight of the KL to the initial model; 0: no copy of it is kept")
    lm_beta: float = flag(0.0, "as --beta, of words")
    kl: str = flag("mean", "which KL: mean (between step means, in closed form), flow-grpo "
                   "(without the step size) or velocity (between velocities)")

    limit: int = flag(64, "most tokens that a thought or an answer may have",
                      group="Words (--task cot, text, vqa)")
    temperature: float = flag(1.0, "of drawing words, above 0, in training and evaluation")
    top_p: float = flag(1.0, "words are drawn from the likeliest of this mass, up to 1: all")
    format: float = flag(0.0, "weight of the reward for <think> and <answer> being there")
    images_per_thought: int = flag(1, "cot: images of one thought, which learns by their mean")
    answer_only: bool = flag(False, "cot: the DiT is told the answer, not prompt and thought")

    judge: str = flag("", "VLM of the rewards preference and judge; empty: see MODELS (eval.py)",
                      group="Rewards")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    max_failed: float = flag(0.5, "a larger share of rewards that could not be had, or of judges' "
                             "answers that say nothing, ends the run")

    sft: float = flag(0.0, "weight, below 1, of the fine-tuning loss; the rewards have the rest",
                      group="Loss of fine-tuning beside it (DeepGen)")
    sft_data: str = flag("data/shapes/train", "its images and prompts, as pretrain.py's --data")
    sft_batch: int = flag(32, "its images per update, over all ranks")

    ldam: str = flag("", "which layers of a bridge lim see a reward's noise: geneval:4-6,clip:5-6",
                     group="Noise on the bridge's layers (ParaUni)")
    ldam_gamma: float = flag(0.1, "size of that noise")
    ldam_leap: float = flag(100.0, "noise waits until the gradient norm grows so many times; 0: "
                             "it waits for no growth")
    ldam_falls: int = flag(5, "noise waits until the reward has fallen so many times; 0: no wait")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own",
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")

    micro: int = flag(64, "rows of the window, or thoughts, per backward; 0: all. The gradients "
                      "are equal", group="Memory and speed")
    checkpoint: bool = flag(False, "the DiT's blocks are computed again in the backward pass, "
                            "which saves memory")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")

    eval_every: int = flag(20, "updates between quick scores on held-out prompts",
                           group="Evaluation")
    eval_prompts: str = flag("", "held-out prompts for photos, a file as --prompts; empty: "
                             "GenEval's own test if that is the reward, else none and no score")
    eval_T: int = flag(10, "ODE steps of a drawing")


def check(args, world):
    """Every error a user can make, before anything is loaded or written."""
    if args.task != "t2i" and preset(args.preset).bridge == "text":
        fail(f"preset {args.preset!r} has no language model that could answer")
    if args.prompts in (Args.prompts, TASKS[args.task].get("prompts")) and (
            not args.preset.startswith("shapes")):
        fail(f"preset {args.preset!r} draws photos and needs --prompts of its own: eval.py "
             "--write-prompts geneval-train FILE writes some")
    if args.eval_prompts and args.preset.startswith("shapes"):
        fail("--eval-prompts is for photos: the classroom has held-out prompts of its own")
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
    for name, value, valid in (("train", args.train, tuple(TRAIN[args.task])),
                               ("kl", args.kl, ("mean", "flow-grpo", "velocity")),
                               ("grid", args.grid or "uniform", GRIDS),
                               ("norm", args.norm, ("group", "joint", "global")),
                               ("kind", args.kind, KERNELS)):
        if value not in valid:
            fail(f"unknown --{name} {value!r}; there are: {', '.join(valid)}")
    learns = TRAIN[args.task][args.train]
    if args.lora_rank and "dit" not in learns or args.vlm_lora_rank and "vlm" not in learns:
        fail(f"--lora-rank adapts the DiT, --vlm-lora-rank the language model; of --task "
             f"{args.task}, --train {args.train} learns: {', '.join(learns)}")
    if args.temperature <= 0 or not 0 < args.top_p <= 1 or min(
            args.limit, args.images_per_thought) < 1:
        fail("--temperature is above 0 (else a group agrees), --top-p in (0,1], --limit and "
             "--images-per-thought at least 1")
    for name, of in (("images_per_thought", ["cot"]), ("answer_only", ["cot"]),
                     ("format", ["cot", "text", "vqa"])):
        if getattr(args, name) != getattr(Args, name) and args.task not in of:
            fail(f"--{name.replace('_', '-')} is for --task {' or '.join(of)}")
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


def read_rows(path, args, weights):
    """A file of --prompts or --eval-prompts -> its rows; every error in it, in one line"""
    draws = args.task in ("t2i", "cot")
    try:
        rows = (read_prompts if draws else read_questions)(path)
    except FileNotFoundError as e:
        photos = not args.preset.startswith("shapes")
        fail(f"{e}" if photos else f"{e}; the classroom's: python -m data.shapes.prepare data")
    except (OSError, ValueError) as e:
        fail(e)
    if not rows:
        fail(f"{path} holds no prompts")
    if args.task == "vqa" and not all(m.keys() & {"scene", "image"} for m in rows):
        fail(f"{path}: --task vqa is about pictures; a line without one is --task text's")
    for kind in {m.get("category", m.get("tag")) for m in rows} if draws else ():
        if kind not in weights and "*" not in weights:
            fail(f"{args.reward} has no mix for prompts of category {kind!r}, and no '*'")
    return rows


def held_out(args, weights, metas):
    """At most 16 rows of --eval-prompts, or of GenEval's own test where that is the reward, evenly
    spaced, so that every tag is there; none of them is among metas, which are trained. [] for the
    classroom, which has benchmarks, and where nothing is held out."""
    def whole(row):              # a question of vqa is one about its picture
        about = ("scene", "image") if args.task == "vqa" else ()
        return row["prompt"], *(str(row[k]) for k in about if k in row)
    trained, rows = {whole(m) for m in metas}, []
    if args.eval_prompts:
        rows = read_rows(args.eval_prompts, args, weights)
        if both := [m for m in rows if whole(m) in trained]:
            fail(f"{args.eval_prompts}: {both[0]['prompt']!r} is in {args.prompts}, as {len(both)} "
                 f"of its {len(rows)} prompts are: what is trained is not held out")
    elif args.task == "t2i" and not args.preset.startswith("shapes") and (
            {"geneval", "geneval_strict"} & weights.get("*", {}).keys()):
        rows = [m for m in map(json.loads, geneval_prompts()) if whole(m) not in trained]
    n = min(16, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def read_questions(path):
    """jsonl of `question`, `answer` and, to look at, `scene` (the classroom's) or `image` (a file)
    -> rows with `prompt`, the question; all can be looked at, or nothing starts."""
    rows = []
    for i, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row |= dict(prompt=row["question"], answer=answer_of(row["answer"]))
            if "image" in row:
                row["image"] = (Path(path).parent / row["image"]).resolve()
            looked_at(row)
        except (*UNREADABLE, TypeError, LookupError, AttributeError) as e:
            raise ValueError(f"{path}, line {i}: not a JSON object with `question`, `answer` and "
                             f"maybe a `scene` or `image` that can be read ({e!r})")
        rows.append(row)
    return rows


def looked_at(row):
    """-> row, with the `picture` it asks about, uint8 (3,H,W), if any."""
    if "scene" in row:
        return row | dict(picture=see(row["scene"]))
    if "image" in row:
        image = np.array(read_image(row["image"]))
        return row | dict(picture=torch.from_numpy(image).permute(2, 0, 1))
    return row


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
        rng = keyed(key(a.seed, n, 1_000_000))
        chosen = torch.tensor([any(i in self.at[k] for k in due) for i in self.layers])
        return 1 + a.ldam_gamma * chosen * torch.randn(len(self.layers), generator=rng)


def main():
    args = parse(Args, __doc__, "stage3", TASKS)
    rank, world, device = setup()
    weights, mix, layers = check(args, world)
    draws, speaks = args.task in ("t2i", "cot"), args.task != "t2i"
    ask = "think" if draws else "ask"
    JUDGE.model, JUDGE.url = args.judge, args.judge_url
    metas = read_rows(args.prompts, args, weights)
    held = held_out(args, weights, metas)
    classroom = args.preset.startswith("shapes")         # whose held-out prompts are its benchmarks
    rank_of = dict(dit=(args.lora_rank, args.lora_alpha),
                   vlm=(args.vlm_lora_rank, args.vlm_lora_alpha))
    learns = {k: adapter(k, *rank_of[k]) if k in rank_of else None
              for k in TRAIN[args.task][args.train]}
    climbs = "dit" in learns or "bridge" in learns       # by denoising steps, "vlm" by tokens
    # The reference of the KL is the initial policy: frozen copies of what learns, but for a LoRA.
    anchored = climbs and args.beta or "vlm" in learns and args.lm_beta
    copies = [k for k, lora in learns.items() if anchored and not lora]
    B, G, M = args.B // world, args.G, args.images_per_thought   # B from here on: of this rank
    rows = draws and (args.micro or args.window * B * G * M)
    reads = (args.micro or B * G) if "vlm" in learns else "bridge" in learns and B
    model = start_model(args, learns, rows, reads, rank, device, copies)
    model.dit.checkpoint = args.checkpoint
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ref = [copy.deepcopy(part).requires_grad_(False) if name in copies else part for name, part in
           (("dit", model.dit), ("bridge", model.bridge), ("vlm", model.vlm))
           ] if anchored else None
    if args.compile:                     # one graph for all lengths of context and sizes of batch
        model.dit.compile(dynamic=True)
    experts = {lr: [p for k, p in params.items() if k.startswith("vlm.") == (lr == "lm_lr")]
               for lr in ("lr", "lm_lr")}
    experts = {lr: some for lr, some in experts.items() if some}
    # Departs from Flow-GRPO, whatever the recipe: betas .9 and .999 there, and a constant rate.
    opt = torch.optim.AdamW([dict(params=some) for some in experts.values()], lr=args.lr,
                            betas=(0.9, 0.99), weight_decay=args.wd)
    ema = Ema(params, args.ema)
    start = ema.resume(args.out, opt) if args.resume else 0
    data = draws and args.sft and pairs(args.sft_data, model.cfg, args.sft_batch // world,
                                        args.seed, rank, world, skip=start * args.updates)
    ldam, noise = Ldam(args, layers, model.cfg.layers), None
    if args.ldam and args.resume:
        for row in map(json.loads, open(Path(args.out) / "log.jsonl")) if climbs else ():
            noise = ldam.after(row) if 0 < row["step"] <= start else noise
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail
    if rank == 0 and not (classroom or held):
        print("no held-out prompts: the pictures shown are of training prompts, and there is no "
              "score; --eval-prompts FILE names some")

    ts = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()   # 1 ... 0
    D, rates = math.prod(model.noise([0]).shape), odds(metas, mix)
    each, group = (M, G * M) if speaks else (G, G)   # images of one condition, images compared
    stop, finite, jury = stop_flag(), Finite(), ThreadPoolExecutor(1)

    def say(model, questions, images, seeds):
        return model.generate(questions, images, "ask", args.limit, args.temperature,
                              keys=seeds).texts

    def bench(model, limit=None, n=4, png=None):
        """Held-out prompts of the classroom, drawn or answered as in training. -> metrics"""
        if not draws:
            return bench_vqa(partial(say, model), dict(text="textqa", vqa="vqa")[args.task], n,
                             limit, png)
        draw = partial(model.draw, steps=args.eval_T, guidance=args.guidance)
        return bench_reason(draw, think(model), n, limit, png) if speaks else bench_shapes(
            draw, n, limit, png)

    def think(model):
        return partial(model.think, steps=args.eval_T, guidance=args.guidance, limit=args.limit,
                       temperature=args.temperature, answer_only=args.answer_only)

    def look(step):
        """Fixed prompts at fixed noise: pictures and words to look at; where the prompts are held
        out, a quick score. -> metrics"""
        png, faces = out / "samples" / f"step_{step:05d}.png", held or metas[:16]
        prompts, seeds = [m["prompt"] for m in faces], range(len(faces))
        with ema.applied():
            if classroom:
                r = bench(model, 96, 1, png)
                return {name: r[k] for name, k in LOOK[args.task].items()}
            if not draws:
                said = say(model, prompts, pictures_of(map(looked_at, faces)), seeds)
                right = [answer_of(t) == m["answer"] for t, m in zip(said, faces)]
                show_answers(prompts, said, right, png)
                return dict(score=sum(right) / len(right)) if held else {}
            if speaks:
                images, words = think(model)(prompts, seeds)
                texts = [f"{p}: {t}" for p, t in zip(prompts, words.texts)]
            else:
                images, texts = model.draw(prompts, seeds, args.eval_T, args.guidance), prompts
        grid(images.cpu(), texts, png)
        return held_out_score(*score(images.cpu(), faces, 1, weights)[:2]) if held else {}

    def pictures_of(rows):
        return [[row["picture"]] for row in rows] if args.task == "vqa" else None

    def conditions(rows, words, noise, grad):
        """Branches of conditions, one of each row (and of its words); leaves of the same values:
        micro-batches of the update add their gradients there, then one backward goes on into bridge
        and language model, so that all is read once whatever learns; log-probs of the words."""
        prompts, cond, logp = [m["prompt"] for m in rows], None, None
        with torch.set_grad_enabled(grad):
            if args.task == "t2i":
                cond = model.encode(prompts, layer_noise=noise)
            elif draws and not args.answer_only:
                cond, logp = model.encode_words(prompts, None, words, ask, args.temperature, noise)
            else:
                cond = model.encode(answers(prompts, words), layer_noise=noise) if draws else None
                logp = model.text_logp(prompts, pictures_of(rows), words, ask, args.temperature)
            encoded = model.guided(cond, args.guidance) if draws else []
        return encoded, [(w, c.map(lambda a: a.detach().requires_grad_(a.requires_grad)))
                         for w, c in encoded], logp

    stopped, shown = False, look(0) if rank == 0 and not args.resume else {}
    if not args.resume:
        log(out, rank, dict(step=0, at=0.0, **shown))
    bar = tqdm(range(start, args.steps), "grpo", initial=start, total=args.steps, disable=rank > 0)
    for step in bar:
        # 1  draw B prompts; encode each once and repeat it G times, or answer it G times
        g = keyed(key(args.seed, step, 0))
        chosen = (rates.multinomial(min(args.B, int((rates > 0).sum())), generator=g) if mix else
                  torch.randperm(len(metas), generator=g)[: args.B]).tolist()
        first = int(torch.randint(args.window_start, args.window_stop + 1, (), generator=g))
        window = range(first, first + args.window)
        mine = range(rank * B, rank * B + B)             # whole groups stay on one rank
        batch = [metas[chosen[i % len(chosen)]] for i in mine]
        batch = batch if draws else [looked_at(m) for m in batch]
        batch = [m for m in batch for _ in range(group)]
        clock = [("", time.time())]
        index = [i * G + j for i in mine for j in range(G)]      # global: ranks change no noise
        asked, words = batch[::each], None                       # a condition of each
        if speaks:               # log-probs are not those of drawing but of the update's own pass
            keys = [key(args.seed, step, n * M * 100 + 99) for n in index]
            words = model.generate([m["prompt"] for m in asked[::G]], pictures_of(asked[::G]), ask,
                                   args.limit, args.temperature, args.top_p, keys, G)
            clock.append(("words", time.time()))
        grad = "bridge" in learns and not speaks
        guided, anchor, logp_ref = [], None, None
        if draws:
            encoded, guided, old_logp = conditions(asked, words, noise, grad)
        if draws and ref:
            with torch.no_grad(), swapped(model, ref):
                _, guided_ref, logp_ref = conditions(asked, words, noise, False)
                anchor = ref, guided_ref

        # 2  roll out: Euler steps, except in the window. An endpoint judges the first prompts'
        #    images while the next are drawn, by the same policy; what judges here waits its turn
        keys = [(key(args.seed, step, (n // group * group if args.shared_noise else n) * 100),
                 key(args.seed, step, n * 100 + 1)) for i in index for n in range(i * M, i * M + M)]
        paths, judged, said = [], [], {}
        for some in slices(B, -(-B // 4) if JUDGE.url else B) if draws else ():
            n = slice(some.start * group, some.stop * group)
            at = slice(n.start // each, n.stop // each)
            x0, *path = rollout(model, [(w, c.rows(at)) for w, c in guided], ts, window,
                                replace(args, G=each), keys[n])
            paths.append(path)
            clock.append(("rollout", time.time()))
            images = model.to_images(x0).cpu()                                   # (n,3,H,W) uint8
            clock.append(("decode", time.time()))
            judged.append(jury.submit(score, images, batch[n], group, weights, said))

        # 3  score images or answers; compare each with its own group
        if draws:
            xs, old = (torch.cat(x, 1) for x in zip(*paths))
            R, W, names = zip(*(of.result() for of in judged))
            R, W, names = torch.cat(R), torch.cat(W), names[0]                   # (N,K) each
        else:
            R = torch.tensor([[answer_of(t) == m["answer"]] for t, m in zip(words.texts, batch)])
            R, W, names = R.float(), torch.ones(len(R), 1), ["answer"]
        if args.format:
            ok = [spans(t)["ok"] and end for t, end in zip(words.texts, words.closed.tolist())]
            ok = torch.tensor(ok).float().repeat_interleave(M)[:, None]
            R, W = torch.cat([R, ok], 1), F.pad(W, (0, 1), value=args.format)
            names = [*names, "format"]
        failures = check_scored(R, W, names, said, args, step, args.prompts)
        if args.shuffle:
            R = R[torch.randperm(len(R), generator=g)]
        A = group_advantage(R, W, group, args.norm)                              # (N,), mean 0
        if args.norm == "group":                                                 # batch z-score
            A = A / (all_mean([A.square().mean().item()])[0] ** 0.5 + 1e-4)
        keep = (A.view(B, group).abs().amax(1) > 0).repeat_interleave(G).nonzero()[:, 0]
        if not draws:                                    # log-probs of what the update will read
            old_logp, logp_ref = torch.zeros_like(words.logp), torch.zeros_like(words.logp)
            its = [asked[i] for i in keep], words.rows(keep.tolist()), None, False
            if len(keep):
                old_logp[keep] = conditions(*its)[2]
            if len(keep) and ref:
                with torch.no_grad(), swapped(model, ref):
                    logp_ref[keep] = conditions(*its)[2]
        clock.append(("reward", time.time()))

        # 4  climb the clipped surrogate; groups that all agree cost no forward. As in Flow-GRPO, an
        #    update takes its share of the images, drawn over all ranks; the first has ratio 1
        share = torch.randperm(args.B * G, generator=g)[index] % args.updates    # (N,)
        trained = sorted(torch.randperm(args.window, generator=g)[: args.trained or None].tolist())
        moves = args.B * G * M * len(trained) / args.updates / (1 - args.sft)
        weight = speaks and args.updates / args.B / (            # of a token: all groups are equal
            words.mask.view(B, -1).sum(1).repeat_interleave(G))                  # (BG,)
        seen, spoken, taught = *([[] for _ in range(args.updates)] for _ in "12"), 0.0
        for u in range(args.updates):
            if u and "bridge" in learns and not speaks:  # the bridge has learned: once more
                encoded, guided, _ = conditions(asked, None, noise, True)
            now = keep[share[keep] == u]
            for some in slices(len(now), speaks and args.micro) if len(now) else ():
                at = now[some]
                k = (at[:, None] * M + torch.arange(M)).flatten().to(device)     # their images
                branches, its_ref, whose = guided, anchor, k // each
                if speaks:               # a few thoughts, read again with gradient if the LM learns
                    n, whose = at.tolist(), torch.arange(len(k), device=device) // M
                    branches = [(w, c.rows(n)) for w, c in guided]
                    its_ref = anchor and (ref, [(w, c.rows(n)) for w, c in anchor[1]])
                if "vlm" in learns:
                    few = [asked[i] for i in n]
                    encoded, branches, logp = conditions(few, words.rows(n), noise, True)
                if climbs:
                    seen[u].append(surrogate(model, branches, whose, xs[:, k], old[:, k],
                                             A.to(device)[k], ts, window, moves, args, its_ref,
                                             trained))
                ends = []
                if "vlm" in learns:      # a thought has its images' advantage, their mean
                    loss, of = token_surrogate(
                        logp, old_logp[n], words.mask[n], A.to(device)[k].view(-1, M).mean(1),
                        weight[n], args, logp_ref if logp_ref is None else logp_ref[n])
                    spoken[u].append(of)
                    ends.append((loss, None))
                if "bridge" in learns:
                    ends += [(a, b.grad) for (_, e), (_, c) in zip(encoded, branches)
                             for a, b in ((e.ctx, c.ctx), (e.pooled, c.pooled)) if a is not None]
                if ends:
                    torch.autograd.backward(*zip(*ends))
            if data:                                     # DeepGen eq. 5: (1 - sft) RL + sft SFT
                pictures, texts = next(data)
                ids = [key(args.seed, step, 500_000 + 2 * (u * args.sft_batch + i * world + rank))
                       for i in range(len(texts))]       # by the number among all ranks' pairs
                for i in slices(len(ids), args.micro):
                    loss = model.flow_loss(pictures[i], texts[i], ids[i]).sum() / args.sft_batch
                    (args.sft * loss).backward()
                    taught += loss.item() * world / args.updates
            sum_grads(list(params.values()), seen[u] + spoken[u])
            norms = {lr.replace("lr", "grad_norm"): torch.nn.utils.clip_grad_norm_(some, 1.0).item()
                     for lr, some in experts.items()}            # each expert by its own norm
            for some, lr in zip(opt.param_groups, experts):
                some["lr"] = getattr(args, lr) * min(1, (step + 1) / 5) * (
                    1 - 0.9 * step / args.steps)
            if finite(step, [*norms.values()], [m["prompt"] for m in batch]):
                opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(step)
        clock.append(("update", time.time()))

        # 5  one row per step; held-out prompts and a place to restart, now and then
        scored, none = ~R.isnan(), torch.tensor([[1.0, 0.0]], device=device)
        sums = all_mean([*R.double().nansum(0), *scored.sum(0)])
        rewards = {f"reward_{n}": a / b for n, a, b in zip(names, sums, sums[len(names):]) if b}
        stats = dict(kept=len(keep) / len(index), stop=bool(stop))
        for who, got, clip, nats in [("", seen, args.clip, D)] * climbs + [
                ("lm_", spoken, args.lm_clip, 1)] * ("vlm" in learns):
            ratio, kl = torch.cat([x for u in got for x in u] or [none]).T
            stats |= {who + name: x for name, x in dict(
                ratio_off=(torch.cat([none, *got[0]])[:, 0] - 1).abs().max(),
                ratio_low=ratio.quantile(0.05), ratio_high=ratio.quantile(0.95), kl=kl.mean(),
                clipped=((ratio - 1).abs() > clip).float().mean(),
                # E[L^2] / 2 of log-ratios L is about the KL from the old policy: in nats
                kl_old=(nats * ratio.log()).square().mean() / 2).items()}
        if draws:
            stats |= dict(sft=taught)
        if speaks:
            stats |= dict(words=words.mask.sum(1).float().mean(),
                          closed=words.closed.float().mean())
        stats = dict(zip(stats, all_mean([*stats.values()])))
        stopped = stats.pop("stop") > 0                          # any rank: all stop together
        spent = Counter()
        for (_, a), (name, b) in zip(clock, clock[1:]):
            spent[f"s_{name}"] += b - a
        row = dict(step=step + 1, at=round(time.time() - begin, 1), **rewards, **stats,
                   **failures, ldam=noise is not None, clip_nats=args.clip * D, **norms,
                   **finite.column(), **{k: round(v, 3) for k, v in spent.items()})
        due = (step + 1) % args.eval_every == 0 or step + 1 == args.steps or stopped
        if due:
            check_ranks(params, f"after update {step + 1}")
        if rank == 0 and due:
            shown = look(step + 1)
            row |= shown
            ema.save(out, model, step + 1, opt)
        log(out, rank, row)
        noise = ldam.after(row) if args.ldam and climbs else None
        if rank == 0 and due:
            plot(out, [f"reward_{n}" for n in names], *[["score", "extra", "raw"]] * bool(shown),
                 *[["words"]] * speaks, [*norms])
        bar.set_postfix({"reward": f"{next(iter(rewards.values()), 0):.3g}",
                         **{"held out": f"{x:.3f}" for k, x in shown.items() if k == "score"},
                         "norm": f"{sum(norms.values()):.3f}"}, refresh=False)
        if stopped:
            break

    # 6  the whole benchmark, before and after, on the same noise
    if rank == 0 and classroom and not stopped:
        results = {}
        base = Unified.from_preset(args.preset, args.init, seed=args.seed, **given_parts(args))
        base.to(device)
        with ema.applied():
            for name, m in (("before", base), ("after", model)):
                results[name] = bench(m, png=out / "samples" / f"{name}.png")
        show_table(results)
        write(out / "results.json", json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
