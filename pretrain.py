"""Stage 1, alignment: a frozen VLM learns to speak to a frozen DiT that already draws.

Only the bridge and its query tokens learn (DeepGen section 3.2, stage 1; OpenUni; MetaQuery).

    python pretrain.py                              # the classroom: see README for time and score
    python pretrain.py --data my_photos/            # a folder with metadata.jsonl
    torchrun --nproc-per-node 8 pretrain.py ...     # one process per GPU
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from common.show import grid
from data.shapes.bench import bench_shapes
from data.shapes.edits import bench_edit
from common.checkpoint import Ema, resume_run, save_run
from common.draw import draw_edits
from common.flags import flag, parse
from common.flow import condition, train_times
from common.presets import reference_ways
from common.data import mixture, pairs
from common.run import (Finite, adamw, all_mean, check_ranks, fail, key, log, open_run, plot, setup,
                        stop_flag, sum_grads)
from common.weights import start_model
from model import Unified


@dataclass
class Args:
    preset: str = flag("shapes", "which model, by its name in common/presets.py",
                       group="What matters most")
    init: str = flag("", "a checkpoint, or the folder of a diffusers DiT or peft LoRA; "
                     "empty: the preset's own weights")
    data: str = flag("data/shapes/train",
                     "pictures with captions, in a layout of docs/data.md: a folder with "
                     "metadata.jsonl, of WebDataset shards (.tar) ...")
    edits: str = flag("", "edits (source, target, instruction), see docs/data.md; empty: none")
    columns: str = flag("", "the data's own names of columns: caption=my_text,image=my_file")
    out: str = flag("out/pretrain", "folder of the run")
    steps: int = flag(900, "optimiser steps")
    batch: int = flag(64, "images per step, over all ranks")
    lr: float = flag(2e-3, "peak learning rate")
    eval_every: int = flag(450, "steps between sample grids, quick scores and checkpoints")
    seed: int = flag(0, "0 to 2**63 - 1; one seed, one result")
    resume: bool = flag(False, "continue the run in --out")

    warmup: int = flag(50, "steps of linear warm-up before the cosine",
                      group="Optimisation")
    wd: float = flag(0.01, "weight decay of AdamW, on matrices only")
    ema: float = flag(0.99, "decay, below 1, of the averaged weights that are evaluated and saved")
    drop: float = flag(0.1, "share of captions replaced by the null prompt, for guidance")

    edit_share: float = flag(0.5, "share of the steps, 0 to 1, whose batch is of edits, if given",
                            group="Edits (--edits)")
    edit_drop: float = flag(0.05, "how often text, references or both are withheld: each 0 to 1/3")
    refs: str = flag("", "what is shown references: vlm, dit or both; empty: the preset's")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own",
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own")


def main():
    args = parse(Args, __doc__, "stage1")
    rank, world, device = setup()
    if args.batch % world:
        fail(f"--batch {args.batch} cannot be shared by {world} ranks")
    n = args.batch // world
    if not 0 <= args.edit_share <= 1 or not 0 <= args.edit_drop <= 1 / 3:
        fail("--edit-share is a share, 0 to 1, and --edit-drop one of three, 0 to 1/3")
    model = start_model(Unified, args, dict(bridge=None), n, n, rank, device)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    opt = adamw(params, args)
    ema = Ema(params, args.ema)
    start = resume_run(ema, args.out, opt) if args.resume else 0
    cfg, stop, finite = model.cfg, stop_flag(), Finite()
    if args.edits:
        reference_ways(cfg, model.dit)
    data = mixture(args, cfg, n, rank, world, start)
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail
    seen = partial(pairs, cfg=cfg, n=n, seed=args.seed, columns=args.columns)
    faces = next(seen(args.data))[1][:16]                        # what the sample grids show
    if args.edits:
        orders, originals = (a[:16] for a in next(seen(args.edits, form="edit"))[1:])
    bar = tqdm(range(start, args.steps), "pretrain", initial=start, total=args.steps,
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
                if cfg.preset.startswith("shapes"):
                    scores = dict(score=bench_shapes(model.draw, 1, 96)["score"])
                    if args.edits:                       # root of success x preservation
                        edit = partial(draw_edits, model)
                        scores["edit_score"] = bench_edit(edit, 1, 100)["both"]
                    row |= scores
            save_run(ema, out, model, step + 1, opt)
        bar.set_postfix({name: f"{mean:.4f}"}, **scores, refresh=False)
        log(out, rank, row)
        if stopped:
            break
    if rank == 0:
        plot(out, ["loss", "edit_loss"], ["grad_norm"], ["score", "edit_score"])


if __name__ == "__main__":
    main()


