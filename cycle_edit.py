"""Stage 3 for edits: edit a picture, edit it back, and learn from what came of both.

Cycle Edit RL (UniRL-Zero, scenario 4) needs sources, instructions and their inverses, no targets.
It is grpo.py with two trajectories per sample, which share one advantage:

    torchrun cycle_edit.py                          # the classroom: see README for time and score
    python cycle_edit.py --reward edit --out out/edit       # a checker: no way back, half the cost
    python grpo.py --init out/edit --out out/pdtr           # ... and then to draw: UniPic2's PDTR
    python cycle_edit.py --data my_edits/ --preset unirl-zero --reward judge

One iteration (DiT forwards per sample: at most 2 x (T + 3 x window), of twice grpo.py's tokens):

    1  draw B sources with their instructions, encode each once, repeat it G times
    2  roll out the edit; its picture is the reference of the way back: roll that out as well
    3  R = l1 edit + l2 CLIP(source, cycled) + l3 quality; one advantage for both trajectories
    4  climb the clipped surrogate over both windows; groups that all agree cost nothing
    5  log; now and then look at pictures and score held-out edits
"""

import copy
import json
import math
import re
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.shapes.prepare import render
from eval import (JUDGE, ask_all, bench_edit, bench_shapes, check_scored, grid, held_out_score,
                  must_score, parse_weights, score, show_table, spread)
from model import (GRIDS, UNREADABLE, Ema, Finite, Unified, adapter, all_mean, check_ranks, fail,
                   flag, given_parts, key, keyed, log, open_run, parse, plot, preset, read_image,
                   rollout, sde_step, setup, shown, sigmas, start_model, stop_flag, sum_grads,
                   swapped, write)


KERNELS = ("flow", "unirl", "dance", "cps", "cps-simple")     # see model.sde_step
CYCLED = ("clip_image",)            # rewards of the cycled picture; all others see the edited one
# Eq. 5 with the weights of UniRL-Zero's code. It names no judge of quality, and its code has none:
# here the CLIP score of the edited picture and the target's caption; for photos add aesthetic.
SHORT = dict(cycle="clip_direction:4,clip_image:1,clip:1", judge="edit_judge")
BACK = ('A picture will be edited by the instruction "{}". You see it before that. Write the one '
        'instruction that turns the edited picture back into this one. Answer with it only.')


@dataclass
class Args:
    preset: str = flag("shapes", "which model, by its name in PRESETS (model.py)",
                       group="What matters most")
    recipe: str = flag("fast", "which settings, by their name in RECIPES (model.py); a flag wins")
    init: str = flag("data/shapes/sft-edit", "a checkpoint that edits, or as grpo.py's --init")
    reward: str = flag("cycle", "cycle (eq. 5), edit, judge, edit_model, a mix (edit:1,clip:4), or "
                       "a .json of such by kind of edit")
    reverse: str = flag("auto", "edit back? auto: if a reward looks at the result; yes; no")
    data: str = flag("data/shapes/prompts/edit_train.jsonl",
                     "jsonl of sources and instructions, or a folder with metadata.jsonl")
    out: str = flag("out/cycle", "folder of the run")
    steps: int = flag(150, "updates")
    B: int = flag(8, "sources per update, over all ranks")
    G: int = flag(8, "edits per source, 2 or more: the group")
    lr: float = flag(1.6e-4, "peak rate of AdamW, after 5 updates; then linearly down to a tenth")
    seed: int = flag(0, "0 to 2**63 - 1; one seed, one result")
    resume: bool = flag(False, "continue the run in --out")

    T: int = flag(10, "denoising steps while training; evaluation takes --eval-T",
                  group="Sampling and exploration")
    grid: str = flag("", "times of the rollout: uniform or diffusers; empty: the preset's")
    window: int = flag(3, "consecutive steps that are random, and trained")
    window_start: int = flag(0, "first step, from 0, at which a window may start")
    window_stop: int = flag(3, "last step at which it may start; each update draws one of them")
    kind: str = flag("flow", "kernel of the random steps: flow, unirl, dance, cps, cps-simple")
    eta: float = flag(0.9, "size of the fresh noise; 0: there is nothing to explore")
    shared_noise: bool = flag(True, "one initial noise per group: its members differ by actions")
    guidance: float = flag(1.0, "weight of the text in rollout and update; 1: no guidance")
    image_guidance: float = flag(1.0, "weight of the source in rollout and update; 1: no guidance")
    refs: str = flag("", "what is shown the pictures: vlm, dit or both; empty: as it was trained")

    train: str = flag("dit", "dit, bridge (with its queries) or both", group="What learns")
    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA")
    lora_alpha: int = flag(64, "output of that LoRA is scaled by this / rank")
    wd: float = flag(0.0, "weight decay of AdamW")
    ema: float = flag(0.95, "decay, below 1, of the averaged weights that are evaluated and saved")

    norm: str = flag("group", "scale of advantages: group, joint or global, see group_advantage",
                     group="Objective")
    clip: float = flag(2e-3, "the ratio is kept within 1 +- this; times the latent's dimensions "
                       "it is nats of the true log-ratio")
    updates: int = flag(1, "optimiser steps per rollout, each on its share of the samples")
    shuffle: bool = flag(False, "control: the rewards are dealt out at random over the batch")
    beta: float = flag(0.0, "weight of the KL to the initial model; 0: no copy of it is kept")
    kl: str = flag("mean", "which KL: mean (between step means, in closed form), flow-grpo "
                   "(without the step size) or velocity (between velocities)")

    judge: str = flag("", "VLM that judges, and that writes what inverses are missing; empty: see "
                      "MODELS (eval.py)", group="Rewards")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    max_failed: float = flag(0.5, "a larger share of rewards that could not be had, or of judges' "
                             "answers that say nothing, ends the run")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own",
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")

    micro: int = flag(64, "rows of the window per backward; 0: all. The gradients are equal",
                      group="Memory and speed")
    checkpoint: bool = flag(False, "the DiT's blocks are computed again in the backward pass, "
                            "which saves memory")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")

    eval_every: int = flag(20, "updates between quick scores on held-out edits", group="Evaluation")
    eval_data: str = flag("", "held-out edits of photos, as --data; empty: none, and no score")
    eval_T: int = flag(10, "ODE steps of an edit")


def checked(args, world):
    """Every error a user can make, before anything is loaded or written. -> weights of the edited
    and of the cycled picture's rewards; is there a way back?"""
    if args.data == Args.data and not args.preset.startswith("shapes"):
        fail(f"preset {args.preset!r} edits photos and needs --data of its own: a folder with "
             "metadata.jsonl, rows of source, instruction and inverse")
    if args.eval_data and args.preset.startswith("shapes"):
        fail("--eval-data is for photos: the classroom has held-out edits of its own")
    if args.G < 2:
        fail("--G 1: a group of one has nothing to compare with, every advantage is 0; try 8")
    if args.B % world:
        fail(f"--B {args.B} sources cannot be shared by {world} ranks: choose a multiple")
    if not (args.window > 0 <= args.window_start <= args.window_stop < args.T - args.window):
        fail(f"a window of {args.window} steps starting at {args.window_start} to "
             f"{args.window_stop} must end before the last of --T {args.T} steps, which adds no "
             "noise")
    if args.updates < 1 or args.B * args.G % args.updates:
        fail(f"--B {args.B} x --G {args.G} samples cannot be shared by --updates {args.updates}")
    if args.lora_rank and args.train == "bridge":
        fail("--lora-rank adapts the DiT: --train dit or both")
    for name, value, valid in (("train", args.train, ("dit", "bridge", "both")),
                               ("reverse", args.reverse, ("auto", "yes", "no")),
                               ("kl", args.kl, ("mean", "flow-grpo", "velocity")),
                               ("grid", args.grid or "uniform", GRIDS),
                               ("norm", args.norm, ("group", "joint", "global")),
                               ("kind", args.kind, KERNELS)):
        if value not in valid:
            fail(f"unknown --{name} {value!r}; there are: {', '.join(valid)}")
    try:                                                 # a mix of rewards, or {kind of edit: mix}
        text = Path(args.reward).read_text() if args.reward.endswith(".json") else args.reward
        mixes = json.loads(text) if text.strip().startswith("{") else {"*": text}
        for short, mix in SHORT.items():                 # whole words: not in edit_judge
            mixes = {k: re.sub(rf"\b{short}\b", mix, str(m)) for k, m in mixes.items()}
        weights = {kind: parse_weights(m)["*"] for kind, m in mixes.items()}
    except (OSError, ValueError) as e:
        fail(e)
    asks = any(w.get(name) for w in weights.values() for name in CYCLED)
    back = args.reverse == "yes" or args.reverse == "auto" and asks
    return [{kind: {n: x for n, x in w.items() if x and (back and n in CYCLED) == leg}
             for kind, w in weights.items()} for leg in (False, True)], back


def read_edits(path):
    """jsonl, or a folder with metadata.jsonl -> rows, each with what rewards read.

    A row has `source` (a picture's file beside the jsonl, or a scene) and `instruction`; `inverse`
    for the way back; for CLIP `source_prompt`, `target_prompt`, or GenEval metadata `source_meta`,
    `target_meta`. Without captions a reward of `prompt` reads the instruction."""
    file = Path(path) / "metadata.jsonl" if Path(path).is_dir() else Path(path)
    rows = []
    for i, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            good = isinstance(row["instruction"], str) and isinstance(row["source"], (str, list))
            captions = [row.get(f"{k}_meta", {}).get("prompt", row.get(f"{k}_prompt"))
                        for k in ("source", "target")]
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise ValueError(f"{file}, line {i}: not a JSON object with `source` (a file or a "
                             "scene) and `instruction`")
        about = row.get("target_meta", {}) | row | dict(
            where=f"{file}, line {i}", folder=file.parent, tag=row.get("kind", "edit"),
            prompt=captions[1] or row["instruction"])
        rows.append(about | (dict(captions=captions) if all(captions) else {}))
    return rows


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


def write_inverses(rows, see, args):
    """Rows without `inverse` get the one that a VLM writes: --judge's, or the preset's own."""
    lacks = [row for row in rows if not row.get("inverse")]
    if lacks and args.preset.startswith("shapes") and not (args.judge or args.judge_url):
        fail(f"{lacks[0]['where']}: no `inverse` (nor have {len(lacks) - 1} other rows), and the "
             "classroom's VLM writes none: give a --judge that can, or --reward edit")
    JUDGE.model = args.judge or args.vlm or preset(args.preset).vlm
    answers = ask_all([([see(row).permute(1, 2, 0).numpy()], BACK.format(row["instruction"]))
                       for row in lacks]) if lacks else []
    JUDGE.model = args.judge
    for row, answer in zip(lacks, answers):
        if not answer:
            fail(f"{row['where']}: no `inverse`, and the VLM wrote none {JUDGE.error}")
        row["inverse"] = answer


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


def main():
    args = parse(Args, __doc__, "stage3")
    rank, world, device = setup()
    weights, back = checked(args, world)
    JUDGE.model, JUDGE.url = args.judge, args.judge_url
    try:
        rows, held = read_edits(args.data), read_edits(args.eval_data) if args.eval_data else []
        for row in rows + held:
            must_score([n for w in weights for n in w.get(row["tag"], w.get("*", ()))], [row])
    except (OSError, ValueError) as e:
        fail(e)
    for path, its in ((args.data, rows), (args.eval_data, held)):
        if path and not its:
            fail(f"{path} holds no edits")
    other = {row["tag"] for row in rows + held} - weights[0].keys()
    if other and "*" not in weights[0]:
        fail(f"{args.reward} has no mix for edits of kind {min(other)!r}, and no '*'")

    def see(row):
        return picture(row, row["folder"], preset(args.preset).size)

    def pair(row):
        return row["instruction"], hash(see(row).numpy().tobytes())
    trained = {pair(row) for row in rows}                # all can be read, or nothing starts
    if both := [row for row in held if pair(row) in trained]:
        fail(f"{both[0]['where']}: its picture and instruction are in {args.data}, as those of "
             f"{len(both)} in {len(held)} rows are: what is trained is not held out")
    if back:
        write_inverses(rows + held, see, args)
    classroom = args.preset.startswith("shapes")         # whose held-out edits are its benchmark
    learns = {k: None for k in ("dit", "bridge") if args.train in (k, "both")}
    if args.lora_rank:
        learns["dit"] = adapter("dit", args.lora_rank, args.lora_alpha)
    # The reference of the KL is the initial policy: frozen copies of what learns, but for a LoRA.
    copies = [k for k, lora in learns.items() if args.beta and not lora]
    B, G = args.B // world, args.G                       # B from here on: sources of this rank
    reads = "bridge" in learns and B * (1 + back * G)
    model = start_model(args, learns, args.micro or args.window * B * G, reads, rank, device,
                        copies)
    shown(model.cfg)                                     # it can edit, or nothing starts
    model.dit.checkpoint = args.checkpoint
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ref = [copy.deepcopy(part).requires_grad_(False) if name in copies else part
           for name, part in (("dit", model.dit), ("bridge", model.bridge))] if args.beta else None
    if args.compile:                     # one graph for all lengths of context and sizes of batch
        model.dit.compile(dynamic=True)
    opt = torch.optim.AdamW(params.values(), lr=args.lr, betas=(0.9, 0.99), weight_decay=args.wd)
    ema = Ema(params, args.ema)
    start = ema.resume(args.out, opt) if args.resume else 0
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail
    if rank == 0 and not (classroom or held):
        print("no held-out edits: the pictures shown are of training edits, and there is no score; "
              "--eval-data FILE names some")

    ts = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()   # 1 ... 0
    D, stop, finite = math.prod(model.noise([0]).shape), stop_flag(), Finite()
    faces = held or rows
    faces = [faces[i] for i in spread(faces, -(-10 // len({row["tag"] for row in faces})))][:10]

    def edit(prompts, images, seeds, model=model):
        """With the guidance of training."""
        return model.edit(prompts, images, seeds, args.eval_T, args.guidance,
                          args.image_guidance).cpu()

    def look(step):
        """Fixed edits at fixed noise: source, edited and cycled side by side, and a quick score of
        what is held out, if anything. -> metrics"""
        png, n = out / "samples" / f"step_{step:05d}.png", len(faces)
        with ema.applied():
            columns = [torch.stack([see(row) for row in faces])]                 # (n,3,H,W) each
            texts = [["source"] * n]
            for leg, say in enumerate(("instruction", "inverse")):
                if all(row.get(say) for row in faces):
                    texts.append([row[say] for row in faces])
                    columns.append(edit(texts[-1], [[x] for x in columns[-1]],
                                        [100 * leg + i for i in range(n)]))
            bench = bench_edit(edit, 1, 100) if classroom else {}
        grid(torch.stack(columns, 1).flatten(0, 1), [t for line in zip(*texts) for t in line], png,
             columns=2 * len(columns))
        if classroom:
            return dict(score=bench["both"], success=bench["success"],
                        preservation=bench["preservation"])
        faced = [row | dict(source_image=x) for row, x in zip(faces, columns[0])]
        return held_out_score(*judged(faced, 1, columns[1:])[:2]) if held else {}

    def judged(batch, group, drawn, said=None):
        """Rewards of the edited picture beside those of the cycled one: as score, R, W, names"""
        R, W, names = zip(*[score(x, batch, group, w, said) for x, w in zip(drawn, weights)])
        return torch.cat(R, 1), torch.cat(W, 1), sum(names, [])

    def conditions(prompts, images, keys):
        """Branches of encoded prompts, leaves of the same values (micro-batches of the update add
        their gradients there, then one backward goes on into the bridge), and for the KL the
        reference with its own branches."""
        def branches():
            return model.edit_branches(prompts, images, args.guidance, args.image_guidance, keys)
        with torch.set_grad_enabled(args.train != "dit"):
            encoded = branches()
        guided = [(w, c.map(lambda a: a.detach().requires_grad_(a.requires_grad)))
                  for w, c in encoded]
        anchor = ref and (ref, guided)
        if ref and args.train != "dit":                  # that of the bridge as it was
            with torch.no_grad(), swapped(model, ref):
                anchor = ref, branches()
        return encoded, guided, anchor

    stopped, latest = False, look(0) if rank == 0 and not args.resume else {}
    if not args.resume:
        log(out, rank, dict(step=0, at=0.0, **latest))
    bar = tqdm(range(start, args.steps), "cycle_edit", initial=start, total=args.steps,
               disable=rank > 0)
    for step in bar:
        # 1  draw B sources with their instructions, encode each once, repeat it G times
        g = keyed(key(args.seed, step, 0))
        chosen = torch.randperm(len(rows), generator=g)[: args.B].tolist()
        first = int(torch.randint(args.window_start, args.window_stop + 1, (), generator=g))
        window = range(first, first + args.window)
        mine = range(rank * B, rank * B + B)             # whole groups stay on one rank
        batch = [rows[chosen[i % len(chosen)]] for i in mine]
        batch = [row | dict(source_image=see(row)) for row in batch]
        index = [i * G + j for i in mine for j in range(G)]      # global: ranks change no noise
        clock, edits = [time.time()], [row for row in batch for _ in range(G)]   # N = B G

        # 2  roll out the edit; its picture is the reference of the way back: roll that out as well
        asked, legs, paths, drawn = [], [], [], []
        for leg in range(1 + back):
            keys = [(key(args.seed, step, (n // G * G if args.shared_noise else n) * 200
                         + 100 * leg), key(args.seed, step, n * 200 + 100 * leg + 1))
                    for n in index]
            if leg:       # N references, so N conditions; a group starts from one noise nonetheless
                asked.append([[row["inverse"] for row in edits], [[x] for x in drawn[0]],
                              [initial for initial, _ in keys]])
            else:         # B conditions, so that a group also shares the noise of its reference
                asked.append([[row["instruction"] for row in batch],
                              [[row["source_image"]] for row in batch],
                              [initial for initial, _ in keys[::G]]])
            legs.append(conditions(*asked[leg]))
            x0, *path = rollout(model, legs[leg][1], ts, window, replace(args, G=1 if leg else G),
                                keys)
            paths.append(path)                                                   # xs, old
            drawn.append(model.to_images(x0).cpu())                              # (N,3,H,W) uint8
            clock.append(time.time())

        # 3  R = l1 edit + l2 CLIP(source, cycled) + l3 quality; one advantage for both trajectories
        said = {}
        R, W, names = judged(edits, G, drawn, said)                              # (N,K) each
        failures = check_scored(R, W, names, said, args, step, args.data)
        if args.shuffle:
            R = R[torch.randperm(len(R), generator=g)]
        A = group_advantage(R, W, G, args.norm)                                  # (N,), mean 0
        if args.norm == "group":                                                 # batch z-score
            A = A / (all_mean([A.square().mean().item()])[0] ** 0.5 + 1e-4)
        keep = (A.view(B, G).abs().amax(1) > 0).repeat_interleave(G).nonzero()[:, 0]
        clock.append(time.time())

        # 4  climb the clipped surrogate over both windows; groups that all agree cost no forward.
        #    An update takes its share of the samples, drawn over all ranks; the first has ratio 1
        share = torch.randperm(args.B * G, generator=g)[index] % args.updates    # (N,)
        denominator = len(legs) * args.B * G * args.window / args.updates
        seen = []
        for u in range(args.updates):
            if u and args.train != "dit":                # the bridge has learned: once more
                legs = [conditions(*inputs) for inputs in asked]
            now = keep[share[keep] == u]
            got, k = [], now.to(device)
            for (encoded, guided, anchor), (xs, old) in zip(legs, paths) if len(now) else ():
                prompt = k * len(guided[0][1].ctx) // len(edits)                 # k // G, or k
                got.append(surrogate(model, guided, prompt, xs[:, k], old[:, k], A[now].to(device),
                                     ts, window, denominator, args, anchor))
                if args.train != "dit":
                    ends = [(a, b.grad) for (_, e), (_, c) in zip(encoded, guided)
                            for a, b in ((e.ctx, c.ctx), (e.pooled, c.pooled)) if a is not None]
                    torch.autograd.backward(*zip(*ends))
            seen.append(torch.cat(got or [torch.tensor([[1.0, 0.0]], device=device)]))
            sum_grads(list(params.values()), [seen[u]])
            norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0).item()
            for group in opt.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / 5) * (1 - 0.9 * step / args.steps)
            if finite(step, [norm], [row["instruction"] for row in batch]):
                opt.step()
            opt.zero_grad(set_to_none=True)
        ema.update(step)
        clock.append(time.time())

        # 5  one row per step; held-out edits and a place to restart, now and then
        (ratio, kl), scored = torch.cat(seen).T, ~R.isnan()
        sums = all_mean([*R.double().nansum(0), *scored.sum(0)])
        rewards = {f"reward_{n}": a / b for n, a, b in zip(names, sums, sums[len(names):]) if b}
        stats = dict(kept=len(keep) / len(A),
                     ratio_off=(seen[0][:, 0] - 1).abs().max(), ratio_low=ratio.quantile(0.05),
                     ratio_high=ratio.quantile(0.95), kl=kl.mean(), stop=bool(stop),
                     clipped=((ratio - 1).abs() > args.clip).float().mean(),
                     # E[L^2] / 2 of log-ratios L is about the KL from the old policy: in nats
                     kl_old=(D * ratio.log()).square().mean() / 2)
        stats = dict(zip(stats, all_mean([*stats.values()])))
        stopped = stats.pop("stop") > 0                          # any rank: all stop together
        row = dict(step=step + 1, at=round(time.time() - begin, 1), **rewards, **stats,
                   **failures, clip_nats=args.clip * D, grad_norm=norm, **finite.column(),
                   **{f"s_{name}": round(b - a, 3) for name, a, b in zip(
                       ("edit", *["back"] * back, "reward", "update"), clock, clock[1:])})
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
                 *[["score", "success", "preservation"]] * bool(latest), ["grad_norm"])
        bar.set_postfix({"reward": f"{next(iter(rewards.values()), 0):.3g}",
                         **{"held out": f"{x:.3f}" for k, x in latest.items() if k == "score"},
                         "norm": f"{norm:.3f}"}, refresh=False)
        if stopped:
            break

    # 6  held-out edits and, since one model does both, drawings, before and after, on one noise
    if rank == 0 and classroom and not stopped:
        results = {}
        base = Unified.from_preset(args.preset, args.init, seed=args.seed, **given_parts(args))
        base.to(device)
        with ema.applied():
            for name, m in (("before", base), ("after", model)):
                results[name] = bench_edit(partial(edit, model=m),
                                           png=out / "samples" / f"{name}.png")
                t2i = bench_shapes(partial(m.draw, steps=args.eval_T), 1)
                results[name] |= dict(t2i=t2i["score"], t2i_se=t2i["score_se"])
        show_table(results)
        write(out / "results.json", json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
