"""Stage 2, joint fine-tuning: bridge, query tokens and DiT learn together.

As DeepGen's stage 2, OpenUni's and UniPic2's. The VLM stays as it is, so that what it understands
cannot suffer, or learns by a LoRA, as DeepGen's (--vlm-lora-rank 64).

    python sft.py --init out/pretrain               # the classroom: see README for time and score
    python sft.py --init data/shapes/sft --lr 2e-4  # the control of every RL run: just more of it
    torchrun --nproc-per-node 8 sft.py ...          # one process per GPU
"""

import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from eval import bench_shapes, grid
from model import (Ema, adapter, all_mean, fail, key, log, open_run, pairs, parse, plot, setup,
                   start_model, stop_flag, sum_grads, train_times)


@dataclass
class Args:
    preset: str = "shapes"            # which model: see PRESETS in model.py
    init: str = "out/pretrain"        # a checkpoint, or a diffusers DiT's or peft LoRA's folder
    vlm: str = ""                     # in place of the preset's: folder, or owner/repo on the Hub
    dit: str = ""                     # the same; or owner/repo/subfolder
    vae: str = ""                     # the same
    data: str = "data/shapes/train"   # folder with metadata.jsonl, or of WebDataset .tar shards
    out: str = "out/sft"              # run folder
    steps: int = 3000                 # optimiser steps
    batch: int = 64                   # images per step, over all ranks
    train: str = "both"               # what learns: dit, bridge (and its queries) or both
    lora_rank: int = 0                # of an adapter on the DiT's attention; 0: all weights learn
    lora_alpha: int = 64              # the adapter's output is scaled by alpha / rank
    vlm_lora_rank: int = 0            # of an adapter on the VLM; 0: it stays frozen
    vlm_lora_alpha: int = 128         # the same, for it
    vlm_lora_dropout: float = 0.05    # share of the adapter's inputs that a step leaves out
    lr: float = 7e-4                  # peak learning rate
    warmup: int = 50                  # steps of linear warm-up before the cosine
    wd: float = 0.01                  # weight decay, on matrices only
    drop: float = 0.1                 # share of captions replaced by the null prompt, for guidance
    ema: float = 0.99                 # decay of the averaged weights that are evaluated and kept
    eval_every: int = 500             # steps between sample grids, quick scores and checkpoints
    seed: int = 0
    resume: bool = False              # continue the run in --out


def main():
    args = parse(Args, __doc__, "stage2")
    rank, world, device = setup()
    if args.batch % world:
        fail(f"--batch {args.batch} cannot be shared by {world} ranks")
    n = args.batch // world
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
    model = start_model(args, learns, n, n, rank, device)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    opt = torch.optim.AdamW(
        [dict(params=[p for p in params.values() if p.ndim > 1], weight_decay=args.wd),
         dict(params=[p for p in params.values() if p.ndim <= 1], weight_decay=0)],
        lr=args.lr, betas=(0.9, 0.95))
    ema = Ema(params, args.ema)
    start = ema.resume(args.out, opt) if args.resume else 0
    cfg, stop = model.cfg, stop_flag()
    data = pairs(args.data, cfg, n, args.seed, rank, world, skip=start)
    out, begin = open_run(args.out, args, args.resume, start, rank)  # after all that can fail
    faces = next(pairs(args.data, cfg, n, args.seed))[1][:16]    # what the sample grids show
    bar = tqdm(range(start, args.steps), "sft", initial=start, total=args.steps,
               disable=rank > 0)
    shown = {}
    for step in bar:
        # 1  a batch of images and captions; some captions are withheld, so that guidance can work
        images, prompts = next(data)                                             # (n,3,H,W) uint8
        rng = torch.manual_seed(key(args.seed, step, rank))      # of an adapter's dropout, too
        model.train()
        gone = torch.rand(n, generator=rng) < args.drop
        prompts = [None if g else p for g, p in zip(gone, prompts)]

        # 2  a point on the straight line between image and noise
        x0 = model.to_latents(images)                                            # (n,C,h,w)
        eps = torch.randn(x0.shape, generator=rng).to(device)
        t = train_times(n, cfg, rng).to(device)                                  # (n,)
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))

        # 3  the velocity that leads from one to the other
        v = model.velocity(x_t, t, [(1.0, model.encode(prompts))])               # (n,C,h,w)
        loss = (v - (eps - x0)).square().mean() / world
        loss.backward()

        # 4  one step, warm-up then cosine down to a 25th; the average follows
        sum_grads(list(params.values()))
        norm = torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        ramp = min(1, (step + 1) / args.warmup)
        for group in opt.param_groups:
            group["lr"] = args.lr * ramp * (0.52 + 0.48 * math.cos(math.pi * step / args.steps))
        opt.step()
        opt.zero_grad(set_to_none=True)
        ema.update(step)

        # 5  one row per step; a look at the pictures and a place to restart, now and then
        mean, stopped = all_mean([loss.item() * world, bool(stop)])
        row = dict(step=step + 1, loss=mean, grad_norm=norm.item(),
                   at=round(time.time() - begin, 1))
        last = step + 1 == args.steps or stopped > 0             # all ranks stop together
        if ((step + 1) % args.eval_every == 0 or last) and rank == 0:
            model.eval()
            with ema.applied():
                grid(model.draw(faces, range(len(faces)), guidance=3.0), faces,
                     out / "samples" / f"step_{step + 1:05d}.png")
                if cfg.preset.startswith("shapes"):
                    shown = dict(score=bench_shapes(model.draw, 1, 96)["score"])
                    row |= shown
            ema.save(out, model, step + 1, opt)
        bar.set_postfix(loss=f"{row['loss']:.4f}", **shown, refresh=False)
        log(out, rank, row)
        if stopped:
            break
    if rank == 0:
        plot(out, ["loss"], ["grad_norm"], ["score"])


if __name__ == "__main__":
    main()


