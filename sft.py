"""Stage 2, joint fine-tuning: bridge, query tokens and DiT learn together.

As DeepGen's stage 2, OpenUni's and UniPic2's. The VLM stays as it is, so that what it understands
cannot suffer, or learns by a LoRA, as DeepGen's (--vlm-lora-rank 64).

    python sft.py --init out/pretrain               # the classroom: see README for time and score
    python sft.py --init data/shapes/sft --lr 2e-4  # the control of every RL run: just more of it
    python sft.py --init data/shapes/sft --task cot --steps 900 --lr 2e-4 --out out/sft-cot
                                                    # a cold start: the DiT learns to heed words
    torchrun --nproc-per-node 8 sft.py ...          # one process per GPU
"""

from dataclasses import dataclass
from functools import partial

import torch

from data.shapes.looks import CURVES, preview, what_to_show
from common.cache import cache_latents
from common.checkpoint import Trained, save_weights
from common.flags import DATA, HUB, FlowFlags, flag, must_exist, parse
from common.flow import condition, count_tokens, lm_loss, train_times
from common.layouts import columns_of
from common.presets import PRESETS, REFS, preset, reference_ways
from common.data import mixture
from common.record import Recorder, check_out
from common.run import PER_SAMPLE, Finite, adamw, descend, fail, key, keyed, setup, slices
from common.weights import adapter, start_model
from model import Unified


@dataclass
class Args(FlowFlags):
    task: str = flag("flow", "what is taught: flow (pictures), cot or reflect (also pictures that "
                     "words go with)", ("flow", "cot", "reflect"), group="What matters most")
    preset: str = flag("shapes", "which model, by its name in common/presets.py", PRESETS)
    init: str = flag("out/pretrain", "a checkpoint, or the folder of a diffusers DiT or peft "
                     "LoRA; empty: the preset's own weights", HUB)
    data: str = flag("data/shapes/train", "pictures with captions, in a layout of docs/data.md: a "
                     "folder with metadata.jsonl, of shards (.tar) ...", DATA)
    edits: str = flag("", "edits (source, target, instruction): docs/data.md; empty: none", DATA)
    columns: str = flag("", "the data's own names of columns: caption=my_text,image=my_file",
                        columns_of)
    out: str = flag("out/sft", "folder of the run")
    steps: int = flag(5000, "optimiser steps", "[1, 1e7]")
    batch: int = flag(64, "images per step, over all ranks", "[1, 1e5]")
    train: str = flag("both", "{}; the bridge with its queries", ("dit", "bridge", "both"))
    lr: float = flag(7e-4, "peak learning rate", "[0, 10]")
    eval_every: int = flag(500, "steps between sample grids, quick scores, checkpoints", "[1, 1e7]")
    seed: int = flag(0, "one seed, one result", "[0, 2**63)")

    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA", "[0, 1000]",
                          group="Low-rank adapters (LoRA)")
    lora_alpha: int = flag(64, "its output is scaled by this / rank", "[1, 1e5]")
    vlm_lora_rank: int = flag(0, "rank of a LoRA on the VLM; 0: no LoRA", "[0, 1000]")
    vlm_lora_alpha: int = flag(128, "its output is scaled by this / rank", "[1, 1e5]")
    vlm_lora_dropout: float = flag(0.05, "share of its inputs that a step leaves out", "[0, 1)")

    warmup: int = flag(50, "steps of linear warm-up before the cosine", "[1, 1e7]",
                      group="Optimisation")
    wd: float = flag(0.01, "weight decay of AdamW, on matrices only", "[0, 10]")
    ema: float = flag(0.99, "decay of the averaged weights that are evaluated and saved", "[0, 1)")
    drop: float = flag(0.1, "share of captions replaced by the null prompt, for guidance", "[0, 1]")

    edit_share: float = flag(0.5, "share of the steps whose batch is of edits, if given", "[0, 1]",
                            group="Edits (--edits)")
    edit_drop: float = flag(0.05, "how often text, references, and both are withheld", "[0, 1/3]")
    refs: str = flag("", "what is shown references: {}; empty: the preset's", REFS)

    tuples: str = flag("", "folder of cot (file_name, prompt, reasoning) or reflect (image, "
                       "prompt, critique, refined); empty: the classroom's", DATA,
                       group="Words (--task cot, reflect)")
    share: float = flag(0.5, "share of the steps whose batch is of those", "[0, 1]")
    lm_loss: float = flag(0.0, "weight of the words' own loss, by which the language model "
                          "learns too; UniRL-Zero saw it unlearn to understand", "[0, 1000]")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own", HUB,
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)


def check(args, world):
    """Errors that a user can make, before anything is loaded or written. -> what learns, {part: its
    LoRA or None}"""
    if args.batch % world:
        fail(f"--batch {args.batch} cannot be shared by {world} ranks")
    cold = args.task in ("cot", "reflect")
    if cold and args.edits and args.share + args.edit_share > 1:
        fail(f"--share {args.share} and --edit-share {args.edit_share} are together at most 1")
    if (args.tuples or args.lm_loss) and not cold:
        fail("--tuples and --lm-loss belong to --task cot or reflect")
    if cold and preset(args.preset).bridge == "text":
        fail(f"preset {args.preset!r} has no language model whose words could be heeded")
    if cold and not args.tuples:
        if not args.preset.startswith("shapes"):
            fail(f"preset {args.preset!r} draws photos: --task {args.task} needs its own --tuples")
        args.tuples = f"data/shapes/{args.task}"
    if args.lora_rank and args.train == "bridge":
        fail("--lora-rank adapts the DiT: --train dit or both")
    must_exist(args, "data", "tuples")
    learns = {k: None for k in ("bridge", "dit") if args.train in (k, "both")}
    if args.lora_rank:
        learns["dit"] = adapter("dit", args.lora_rank, args.lora_alpha)
    if args.vlm_lora_rank:
        learns["vlm"] = adapter("vlm", args.vlm_lora_rank, args.vlm_lora_alpha,
                                args.vlm_lora_dropout)
    elif args.lm_loss:
        learns["vlm"] = None
    return learns


def main():
    args = parse(Args, __doc__, "stage2")
    rank, world, device = setup()
    check_out(args)
    learns = check(args, world)
    n = args.batch // world
    rows = args.micro or n                               # images per backward
    model = start_model(Unified, args, learns, rows, rows, rank, device)
    cache_latents(model, args.cache)
    trained = Trained(args, model, adamw(model, args), partial(save_weights, model))
    cfg, finite = model.cfg, Finite()
    if args.edits or args.task == "reflect":
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
        if args.lm_loss and words is not None:
            tokens = count_tokens(model, prompts, words, world)
        for i in slices(n, args.micro):
            cond = condition(model, prompts[i], refs and refs[i], words and words[i], keys[i])
            v = model.velocity(x_t[i], t[i], [(1.0, cond)])                      # (micro,C,h,w)
            part = (v - (eps - x0)[i]).square().mean((1, 2, 3)).sum() / args.batch
            part.backward()
            loss += part.detach()
            if args.lm_loss and words is not None:
                nll = lm_loss(model, prompts[i], refs and refs[i], words[i])
                (args.lm_loss * nll / tokens).backward()

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
