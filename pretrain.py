"""Stage 1, alignment: a frozen VLM learns to speak to a frozen DiT that already draws.

Only the bridge and its query tokens learn (DeepGen section 3.2, stage 1; OpenUni; MetaQuery).

    python pretrain.py                              # the classroom: see README for time and score
    python pretrain.py --data my_photos/            # a folder with metadata.jsonl
    torchrun --nproc-per-node 8 pretrain.py ...     # one process per GPU
"""

from dataclasses import dataclass
from functools import partial

import torch

from common.cache import cache_latents
from common.checkpoint import Trained, save_weights
from common.flags import DATA, HUB, FlowFlags, flag, must_exist, parse
from common.flow import condition, train_times
from common.layouts import columns_of
from common.presets import PRESETS, REFS, reference_ways
from common.data import mixture
from common.record import Recorder, check_out
from common.run import PER_SAMPLE, Finite, adamw, descend, fail, key, keyed, setup, slices
from common.weights import start_model
from data.shapes.looks import CURVES, preview, what_to_show
from model import Unified


@dataclass
class Args(FlowFlags):
    preset: str = flag("shapes", "which model, by its name in common/presets.py", PRESETS,
                       group="What matters most")
    init: str = flag("", "a checkpoint, or the folder of a diffusers DiT or peft LoRA; "
                     "empty: the preset's own weights", HUB)
    data: str = flag("data/shapes/train",
                     "pictures with captions, in a layout of docs/data.md: a folder with "
                     "metadata.jsonl, of WebDataset shards (.tar) ...", DATA)
    edits: str = flag("", "edits (source, target, instruction): docs/data.md; empty: none", DATA)
    columns: str = flag("", "the data's own names of columns: caption=my_text,image=my_file",
                        columns_of)
    out: str = flag("out/pretrain", "folder of the run")
    steps: int = flag(900, "optimiser steps", "[1, 1e7]")
    batch: int = flag(64, "images per step, over all ranks", "[1, 1e5]")
    lr: float = flag(2e-3, "peak learning rate", "[0, 10]")
    eval_every: int = flag(450, "steps between sample grids, quick scores, checkpoints", "[1, 1e7]")
    seed: int = flag(0, "one seed, one result", "[0, 2**63)")

    warmup: int = flag(50, "steps of linear warm-up before the cosine", "[1, 1e7]",
                      group="Optimisation")
    wd: float = flag(0.01, "weight decay of AdamW, on matrices only", "[0, 10]")
    ema: float = flag(0.99, "decay of the averaged weights that are evaluated and saved", "[0, 1)")
    drop: float = flag(0.1, "share of captions replaced by the null prompt, for guidance", "[0, 1]")

    edit_share: float = flag(0.5, "share of the steps whose batch is of edits, if given", "[0, 1]",
                            group="Edits (--edits)")
    edit_drop: float = flag(0.05, "how often text, references, and both are withheld", "[0, 1/3]")
    refs: str = flag("", "what is shown references: {}; empty: the preset's", REFS)

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own", HUB,
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)


def main():
    args = parse(Args, __doc__, "stage1")
    rank, world, device = setup()
    check_out(args)
    if args.batch % world:
        fail(f"--batch {args.batch} cannot be shared by {world} ranks")
    must_exist(args, "data")
    n = args.batch // world
    rows = args.micro or n                               # images per backward
    model = start_model(Unified, args, dict(bridge=None), rows, rows, rank, device)
    cache_latents(model, args.cache)
    trained = Trained(args, model, adamw(model, args), partial(save_weights, model))
    cfg, finite = model.cfg, Finite()
    if args.edits:
        reference_ways(cfg, model.dit)
    data = mixture(args, cfg, n, rank, world, trained)
    shows = partial(preview, model, what_to_show(args, cfg, n))
    recorder = Recorder(args, rank, trained, shows, first=False)  # after all that can fail
    for step in recorder.steps():
        # 1  a batch of one task; text, references or both are withheld, so that guidance can work
        images, prompts, refs, words = next(data)           # (n,3,H,W) uint8; refs, words or None
        rng = keyed(key(args.seed, step, 0))                     # every rank draws alike
        torch.manual_seed(key(args.seed, step, rank))            # an adapter's dropout
        model.train()
        # Of edits u in [0,d) withholds the text, [d,2d) text and references, [2d,3d) references.
        u, d = torch.rand(args.batch, generator=rng)[rank::world], args.edit_drop
        gone = u < (args.drop if refs is None else 2 * d)
        prompts = [None if g else p for g, p in zip(gone, prompts)]
        if refs is not None:
            refs = [[] if g else r for g, r in zip((u >= d) & (u < 3 * d), refs)]
            refs = model.look(refs, "edit" if words is None else "critique")    # once, not twice

        # 2  a point on the straight line between image and noise
        x0 = model.to_latents(images)                                            # (n,C,h,w)
        keys = [key(args.seed, step, PER_SAMPLE * i + 1) for i in range(rank, args.batch, world)]
        eps = model.noise(keys, images.shape[2:])
        t = train_times(args.batch, cfg, rng)[rank::world].to(device, non_blocking=True)  # (n,)
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))

        # 3  the velocity that leads from one to the other; gradients of micro-batches add up
        loss = 0.0
        for i in slices(n, args.micro):
            cond = condition(model, prompts[i], refs and refs[i], words and words[i], keys[i])
            v = model.velocity(x_t[i], t[i], [(1.0, cond)])                      # (micro,C,h,w)
            part = (v - (eps - x0)[i]).square().mean((1, 2, 3)).sum() / args.batch
            part.backward()
            loss += part.detach()

        # 4  one step, warm-up then cosine down to a 25th; the average follows. Departs from DeepGen
        #    and OpenUni, whose rate ends at 0
        norm = descend(trained, finite, args, step, loss, prompts)

        # 5  one row per step; a look at the pictures and a place to restart, now and then
        name = {(0, 0): "loss", (1, 0): "edit_loss", (0, 1): "cot_loss", (1, 1): "reflect_loss"}[
            refs is not None, words is not None]
        recorder.record(step, {name: loss.item() * world}, dict(grad_norm=norm, **finite.column()),
                        CURVES)


if __name__ == "__main__":
    main()
