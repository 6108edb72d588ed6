"""Stage 2, joint fine-tuning: bridge, query tokens and DiT learn together.

As DeepGen's stage 2, OpenUni's and UniPic2's. The VLM stays as it is, so that what it understands
cannot suffer, or learns by a LoRA, as DeepGen's (--vlm-lora-rank 64).

    python sft.py --init out/pretrain               # the classroom: see README for time and score
    python sft.py --init data/shapes/sft --lr 2e-4  # the control of every RL run: just more of it
    python sft.py --init data/shapes/sft --task cot --steps 900 --lr 2e-4 --out out/sft-cot
                                                    # a cold start: the DiT learns to heed words
    python sft.py --task reward --out out/reward --lr 1e-3  # a judge of edits: --reward edit_model
    torchrun --nproc-per-node 8 sft.py ...          # one process per GPU
"""

import math
import os
import random
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from peft import inject_adapter_in_model
from tqdm import tqdm

from common.show import grid
from data.shapes.bench import bench_shapes
from data.shapes.edits import bench_edit, scored_edit
from data.shapes.talk import bench_reflect, bench_think
from rewards.edit import EditReward, read_scored, spearman
from common.checkpoint import Ema, resume_run, save_run
from common.draw import draw_edits, draw_reflecting, draw_thinking
from common.flags import flag, parse
from common.flow import condition, lm_loss, train_times
from common.presets import preset, reference_ways
from common.data import Broken, mixture, pairs
from common.read import UNREADABLE, read_image, to_bucket
from common.run import (Finite, adamw, all_mean, check_ranks, fail, key, log, open_run, plot,
                        same_start, setup, stop_flag, sum_grads)
from common.weights import adapter, start_model
from model import Unified


@dataclass
class Args:
    task: str = flag("flow", "what is taught: flow (pictures), cot or reflect (also pictures that "
                     "words go with), reward (a judge of edits, see train_reward)",
                     group="What matters most")
    preset: str = flag("shapes", "which model, by its name in common/presets.py")
    init: str = flag("out/pretrain", "a checkpoint, or the folder of a diffusers DiT or peft "
                     "LoRA; empty: the preset's own weights")
    data: str = flag("data/shapes/train", "pictures with captions, in a layout of docs/data.md: a "
                     "folder with metadata.jsonl, of shards (.tar) ...; of task reward: jsonl of "
                     "scored edits")
    edits: str = flag("", "edits (source, target, instruction), see docs/data.md; empty: none")
    columns: str = flag("", "the data's own names of columns: caption=my_text,image=my_file")
    out: str = flag("out/sft", "folder of the run")
    steps: int = flag(3000, "optimiser steps")
    batch: int = flag(64, "images per step, over all ranks")
    train: str = flag("both", "what learns: dit, bridge (with its queries) or both")
    lr: float = flag(7e-4, "peak learning rate")
    eval_every: int = flag(500, "steps between sample grids, quick scores and checkpoints")
    seed: int = flag(0, "0 to 2**63 - 1; one seed, one result")
    resume: bool = flag(False, "continue the run in --out")

    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA",
                          group="Low-rank adapters (LoRA)")
    lora_alpha: int = flag(64, "output of that LoRA is scaled by this / rank")
    vlm_lora_rank: int = flag(0, "rank of a LoRA on the VLM; 0: no LoRA")
    vlm_lora_alpha: int = flag(128, "output of that LoRA is scaled by this / rank")
    vlm_lora_dropout: float = flag(0.05, "share of that LoRA's inputs that a step leaves out")

    warmup: int = flag(50, "steps of linear warm-up before the cosine",
                      group="Optimisation")
    wd: float = flag(0.01, "weight decay of AdamW, on matrices only")
    ema: float = flag(0.99, "decay, below 1, of the averaged weights that are evaluated and saved")
    drop: float = flag(0.1, "share of captions replaced by the null prompt, for guidance")

    edit_share: float = flag(0.5, "share of the steps, 0 to 1, whose batch is of edits, if given",
                            group="Edits (--edits)")
    edit_drop: float = flag(0.05, "how often text, references or both are withheld: each 0 to 1/3")
    refs: str = flag("", "what is shown references: vlm, dit or both; empty: the preset's")

    tuples: str = flag("", "folder of cot (file_name, prompt, reasoning) or reflect (image, "
                       "prompt, critique, refined); empty: the classroom's",
                       group="Words (--task cot, reflect)")
    share: float = flag(0.5, "share of the steps, 0 to 1, whose batch is of those")
    lm_loss: float = flag(0.0, "weight of the words' own loss, by which the language model "
                          "learns too; UniRL-Zero saw it unlearn to understand")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own",
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")


SCORE_NOISE = 0.1  # standard deviation: who scores edits by the thousand wavers
HELD_OUT = 400     # edits, at most


def scored_edits(args):
    """-> scored edits to learn from, None = the classroom's, made anew; and held-out ones"""
    if args.data == Args.data:
        if not args.preset.startswith("shapes"):
            fail(f"preset {args.preset!r} sees photos: --task reward needs --data of its own")
        rng = random.Random("held out")
        return None, [scored_edit(rng) for _ in range(HELD_OUT)]
    try:
        rows = read_scored(args.data)
    except (OSError, ValueError) as e:
        fail(e)
    if len(rows) < 20:
        fail(f"{args.data} holds {len(rows)} scored edits: too few, a tenth is held out")
    random.Random(0).shuffle(rows)
    n = min(len(rows) // 10, HELD_OUT)                   # they are kept in memory
    return rows[n:], rows[:n]


def opened(examples, cfg, broken):
    """Examples whose images are arrays or files -> those that can be read, with arrays, of the size
    that the preset draws; the others are named and counted."""
    found = []
    for old, new, *about in examples:
        try:
            if not isinstance(new, np.ndarray):
                old, new = (x.permute(1, 2, 0).numpy() for x in to_bucket(
                    [read_image(old), read_image(new)], cfg))
        except UNREADABLE as e:
            broken(f"the edit {new}", e)
            continue
        broken.good += 1
        found.append((old, new, *about))
    return found


def draw_scored(rows, n, rng, cfg, broken):
    """n examples (source, edited, instruction, score)"""
    if not rows:
        return [(*e, score + rng.gauss(0, SCORE_NOISE))
                for *e, score in (scored_edit(rng) for _ in range(n))]
    found = []
    while len(found) < n:
        found += opened(rng.choices(rows, k=n - len(found)), cfg, broken)
    return found


def predict(model, examples):
    """-> the model's scores (n,) of examples, whose images are arrays"""
    olds, news, says, _ = zip(*examples)
    return model(list(olds), list(news), list(says))


def reward_model(args, device):
    """An EditReward of which the head and the VLM, or a LoRA on it, learn."""
    model = EditReward(args.vlm or preset(args.preset).vlm).requires_grad_(False)
    model.head.requires_grad_(True)
    torch.manual_seed(args.seed)                         # all ranks start from the same adapter
    if args.vlm_lora_rank:
        inject_adapter_in_model(adapter("vlm", args.vlm_lora_rank, args.vlm_lora_alpha,
                                        args.vlm_lora_dropout), model.vlm)
    else:
        model.vlm.model.requires_grad_(True)
    return same_start(model.to(device))


def save_state(ema, opt, params, step, out):
    """Beside the reward model's folder what --resume needs."""
    state = dict(raw={k: p.detach() for k, p in params.items()}, mean=ema.mean,
                 opt=opt.state_dict(), step=step)
    torch.save(state, out / "ckpt/optim.tmp")
    os.replace(out / "ckpt/optim.tmp", out / "ckpt/optim.pt")


def train_reward(args, rank, world, device):
    """Skywork-EditReward (UniPic2): a VLM reads source, edited image and instruction, and learns
    their score by regression. --data: jsonl of `source`, `edited`, `instruction`, `score`, a tenth
    of it held out; else edits of the classroom, scored by its checker with noise. The VLM is
    --vlm, else the preset's; it learns as a whole, or by --vlm-lora-rank."""
    (rows, held), cfg, broken = scored_edits(args), preset(args.preset), Broken(args.data, 0.1)
    held, model = opened(held, cfg, broken), reward_model(args, device)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    opt = adamw(params, args)
    ema = Ema(params, args.ema)
    start = resume_run(ema, args.out, opt) if args.resume else 0
    stop, finite = stop_flag(), Finite()
    out, begin = open_run(args.out, args, args.resume, start, rank)
    bar = tqdm(range(start, args.steps), "reward", initial=start, total=args.steps,
               disable=rank > 0)
    for update in bar:
        # 1  scored edits, and how far the model is from their scores
        rng = random.Random(key(args.seed, update, rank))
        examples = draw_scored(rows, args.batch // world, rng, cfg, broken)
        torch.manual_seed(key(args.seed, update, rank))
        model.train()
        score = torch.tensor([e[-1] for e in examples], device=device)           # (n,)
        loss = (predict(model, examples) - score).square().mean() / world
        loss.backward()

        # 2  one step, warm-up then cosine down to a 25th; the average follows
        sum_grads(list(params.values()), [loss])
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0).item()
        ramp = min(1, (update + 1) / args.warmup)
        for group in opt.param_groups:
            group["lr"] = args.lr * ramp * (0.52 + 0.48 * math.cos(math.pi * update / args.steps))
        if finite(update, [norm], [e[2] for e in examples]):
            opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(update)

        # 3  now and then the order it gives to held-out edits, and a place to restart
        mean, stopped = all_mean([loss.item() * world, bool(stop)])
        row = dict(step=update + 1, loss=mean, grad_norm=norm, **finite.column(),
                   at=round(time.time() - begin, 1))
        last = update + 1 == args.steps or stopped > 0
        due = (update + 1) % args.eval_every == 0 or last
        if due:
            check_ranks(params, f"after update {update + 1}")
        if due and rank == 0:
            model.eval()
            with ema.applied(), torch.no_grad():
                said = torch.cat([predict(model, held[i : i + 64]).cpu()
                                  for i in range(0, len(held), 64)])
                row["spearman"] = spearman(said.numpy(), [e[-1] for e in held])
                model.save(out / "ckpt")
            save_state(ema, opt, params, update + 1, out)
            print(f"step {update + 1}: rank correlation {row['spearman']:.3f} on {len(held)} "
                  "held-out edits")
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        log(out, rank, row)
        if stopped:
            break
    if rank == 0:
        plot(out, ["loss"], ["grad_norm"], ["spearman"])


def main():
    args = parse(Args, __doc__, "stage2")
    rank, world, device = setup()
    if args.batch % world:
        fail(f"--batch {args.batch} cannot be shared by {world} ranks")
    if args.task not in ("flow", "cot", "reflect", "reward"):
        fail(f"unknown --task {args.task!r}; there are: flow, cot, reflect, reward")
    if args.task == "reward":
        return train_reward(args, rank, world, device)
    n = args.batch // world
    if not 0 <= args.edit_share <= 1 or not 0 <= args.edit_drop <= 1 / 3:
        fail("--edit-share is a share, 0 to 1, and --edit-drop one of three, 0 to 1/3")
    cold = args.task in ("cot", "reflect")
    if not 0 <= args.share <= 1 or cold and args.edits and args.share + args.edit_share > 1:
        fail("--share is a share, 0 to 1, and with --edit-share at most 1")
    if (args.tuples or args.lm_loss) and not cold:
        fail("--tuples and --lm-loss belong to --task cot or reflect")
    if cold and preset(args.preset).bridge == "text":
        fail(f"preset {args.preset!r} has no language model whose words could be heeded")
    if cold and not args.tuples:
        if not args.preset.startswith("shapes"):
            fail(f"preset {args.preset!r} draws photos: --task {args.task} needs its own --tuples")
        args.tuples = f"data/shapes/{args.task}"
    if args.train not in ("dit", "bridge", "both"):
        fail(f"unknown --train {args.train!r}; there are: dit, bridge, both")
    if args.lora_rank and args.train == "bridge":
        fail("--lora-rank adapts the DiT: --train dit or both")
    learns = {k: None for k in ("bridge", "dit") if args.train in (k, "both")}
    if args.lora_rank:
        learns["dit"] = adapter("dit", args.lora_rank, args.lora_alpha)
    if args.vlm_lora_rank:
        learns["vlm"] = adapter("vlm", args.vlm_lora_rank, args.vlm_lora_alpha,
                                args.vlm_lora_dropout)
    elif args.lm_loss:
        learns["vlm"] = None
    model = start_model(Unified, args, learns, n, n, rank, device)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    opt = adamw(params, args)
    ema = Ema(params, args.ema)
    start = resume_run(ema, args.out, opt) if args.resume else 0
    cfg, stop, finite = model.cfg, stop_flag(), Finite()
    if args.edits or args.task == "reflect":
        reference_ways(cfg, model.dit)
    data = mixture(args, cfg, n, rank, world, start)
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail
    seen = partial(pairs, cfg=cfg, n=n, seed=args.seed, columns=args.columns)
    faces = next(seen(args.data))[1][:16]                        # what the sample grids show
    if args.edits:
        orders, originals = (a[:16] for a in next(seen(args.edits, form="edit"))[1:])
    if cold:
        asked, *looks, _ = (a[:16] for a in next(seen(args.tuples, form=args.task))[1:])
    bar = tqdm(range(start, args.steps), "sft", initial=start, total=args.steps,
               disable=rank > 0)
    scores = {}
    for step in bar:
        # 1  a batch of one task; text, references or both are withheld, so that guidance can work
        images, prompts, refs, words = next(data)           # (n,3,H,W) uint8; refs, words or None
        rng = torch.manual_seed(key(args.seed, step, rank))      # of an adapter's dropout, too
        model.train()
        u, d = torch.rand(n, generator=rng), args.edit_drop
        gone = u < (args.drop if refs is None else 2 * d)
        prompts = [None if g else p for g, p in zip(gone, prompts)]
        if refs is not None:
            refs = [[] if g else r for g, r in zip((u >= d) & (u < 3 * d), refs)]
            refs = model.look(refs, "edit" if words is None else "critique")    # once, not twice

        # 2  a point on the straight line between image and noise
        x0 = model.to_latents(images)                                            # (n,C,h,w)
        eps = torch.randn(x0.shape, generator=rng).to(device)
        t = train_times(n, cfg, rng).to(device)                                  # (n,)
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))

        # 3  the velocity that leads from one to the other
        keys = [key(args.seed, step, rank * n + i) for i in range(n)]
        cond = condition(model, prompts, refs, words, keys)
        v = model.velocity(x_t, t, [(1.0, cond)])                                # (n,C,h,w)
        loss = (v - (eps - x0)).square().mean() / world
        loss.backward()
        if args.lm_loss and words is not None:
            (lm_loss(model, prompts, refs, words) * (args.lm_loss / world)).backward()

        # 4  one step, warm-up then cosine down to a 25th; the average follows. Departs from DeepGen
        #    and OpenUni, whose rate ends at 0
        sum_grads(list(params.values()), [loss])
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0).item()
        ramp = min(1, (step + 1) / args.warmup)
        for group in opt.param_groups:
            group["lr"] = args.lr * ramp * (0.52 + 0.48 * math.cos(math.pi * step / args.steps))
        if finite(step, [norm], prompts):
            opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(step)

        # 5  one row per step; a look at the pictures and a place to restart, now and then
        mean, stopped = all_mean([loss.item() * world, bool(stop)])
        name = {(0, 0): "loss", (1, 0): "edit_loss", (0, 1): "cot_loss", (1, 1): "reflect_loss"}[
            refs is not None, words is not None]
        row = {"step": step + 1, name: mean, "grad_norm": norm, **finite.column(),
               "at": round(time.time() - begin, 1)}
        last = step + 1 == args.steps or stopped > 0             # all ranks stop together
        due = (step + 1) % args.eval_every == 0 or last
        if due:
            check_ranks(params, f"after update {step + 1}")
        if due and rank == 0:
            model.eval()
            with ema.applied():
                grid(model.draw(faces, range(len(faces)), guidance=3.0), faces,
                     out / "samples" / f"step_{step + 1:05d}.png")
                if args.edits:
                    drawn = draw_edits(model, orders, originals, range(len(orders)),
                                       guidance=3.0).cpu()
                    grid(torch.stack([im for r, d in zip(originals, drawn) for im in (r[0], d)]),
                         [text for order in orders for text in ("", order)],
                         out / "samples" / f"edits_{step + 1:05d}.png")
                if args.task == "cot":
                    drawn, said = draw_thinking(model, asked, range(len(asked)), guidance=3.0)
                    grid(drawn, [f"{p}\n{t}" for p, t in zip(asked, said.texts)],
                         out / "samples" / f"cot_{step + 1:05d}.png")
                if args.task == "reflect":
                    firsts = torch.stack([first for first, in looks[0]])
                    drawn, said = draw_reflecting(model, asked, firsts, range(len(asked)),
                                                  guidance=3.0)
                    grid(torch.stack([firsts, drawn.cpu()], 1).flatten(0, 1),
                         [t for p, row in zip(asked, said) for t in (p, row[0])],
                         out / "samples" / f"reflect_{step + 1:05d}.png")
                if cfg.preset.startswith("shapes"):
                    scores = dict(score=bench_shapes(model.draw, 1, 96)["score"])
                    if args.edits:                       # root of success x preservation
                        edit = partial(draw_edits, model)
                        scores["edit_score"] = bench_edit(edit, 1, 100)["both"]
                    if args.task == "cot":
                        think = partial(draw_thinking, model)
                        scores["cot_score"] = bench_think(model.draw, think, 1)["score"]
                    if args.task == "reflect":
                        reflect = partial(draw_reflecting, model)
                        scores["corrected"] = bench_reflect(reflect)["corrected"]
                    row |= scores
            save_run(ema, out, model, step + 1, opt)
        bar.set_postfix({name: f"{mean:.4f}"}, **scores, refresh=False)
        log(out, rank, row)
        if stopped:
            break
    if rank == 0:
        plot(out, ["loss", "edit_loss", "cot_loss", "reflect_loss"], ["grad_norm"],
             ["score", "edit_score", "cot_score", "corrected"])


if __name__ == "__main__":
    main()


