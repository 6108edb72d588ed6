"""Stage 3 for edits: edit a picture, edit it back, and learn from what came of both.

Cycle Edit RL (UniRL-Zero, scenario 4) needs sources, instructions and their inverses, no targets.
It is grpo.py with two trajectories per sample, which share one advantage:

    torchrun cycle_edit.py                          # the classroom: docs/editing.md says how long
    python cycle_edit.py --reward edit --out out/edit       # a checker: no way back, half the cost
    python grpo.py --init out/edit --out out/pdtr           # ... and then to draw: UniPic2's PDTR
    python cycle_edit.py --data my_edits/ --preset unirl-zero --reward judge

One iteration (DiT forwards per sample: at most 2 x (T + 3 x window), of twice grpo.py's tokens):

    1  draw B sources with their instructions, encode each once; a group is G edits of one source
    2  roll out the edit; its picture is the reference of the way back: roll that out as well
    3  R = l1 edit + l2 CLIP(source, cycled) + l3 quality; one advantage for both trajectories
    4  climb the clipped surrogate over both windows; groups that all agree cost nothing
    5  log; now and then look at pictures and score held-out edits
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from common.draw import draw_edits
from common.flags import FILE, HUB, RunFlags, flag, parse, read_flag
from common.layouts import all_records, lookup, say
from common.presets import GRIDS, KERNELS, KLS, NORMS, PRESETS, REFS, preset, reference_ways
from common.read import as_text, record
from common.record import Recorder
from common.rl import (Anchor, Clock, check_flags, deal_out, disagreeing, draw_rows, draw_window,
                       latent_numbers, noise_keys, ratio_stats, set_up, wants_final_bench)
from common.run import PER_SAMPLE, fail, key, keyed, setup
from common.show import grid, spread
from data.shapes.bench import bench_shapes
from data.shapes.edits import bench_edit, must_be_checked, source_picture
from eval import before_and_after, check_scored, held_out_score, read_weights, score
from grpo import batch_score, group_advantage, surrogate
from common.weights import swapped
from model import Unified, rollout, sigmas
from rewards.inverses import keep_inverses, write_inverses
from rewards.judge import Judge
from rewards.prompts import check_meta, without_nulls
from rewards.shared import must_score

TRAIN = dict(dit=["dit"], bridge=["bridge"], both=["dit", "bridge"])  # --train: parts that learn
CURVES = [["score", "success", "preservation"], ["grad_norm"]]         # beside the rewards
CYCLED = ("clip_image",)            # rewards of the cycled picture; all others see the edited one
# Eq. 5 with the weights of UniRL-Zero's code. It names no judge of quality, and its code has none:
# here the CLIP score of the edited picture and the target's caption; for photos add aesthetic.
SHORT = dict(cycle="clip_direction:4,clip_image:1,clip:1", judge="edit_judge")
CAPTIONS = dict(source="caption", target="target_caption")       # UniRL-Zero's own names


@dataclass
class Args(RunFlags):
    preset: str = flag("shapes", "which model, by its name in common/presets.py", PRESETS,
                       group="What matters most")
    recipe: str = flag("fast", "which settings, by their name in common/presets.py, or a .json of "
                       "them; a flag wins")
    init: str = flag("data/shapes/sft-edit", "a checkpoint that edits, or as grpo.py's --init", HUB)
    reward: str = flag("cycle", "cycle (eq. 5), edit, judge, edit_model, a mix (edit:1,clip:4), or "
                       "a .json of such by kind of edit")
    reverse: str = flag("auto", "edit back? auto: if a reward looks at the result; yes; no",
                        ("auto", "yes", "no"))
    data: str = flag("data/shapes/prompts/edit_train.jsonl",
                     "jsonl of sources and instructions, or a folder with metadata.jsonl", FILE)
    out: str = flag("out/cycle", "folder of the run")
    steps: int = flag(150, "iterations: a rollout and what is learned from it", "[1, 1e7]")
    B: int = flag(8, "sources per iteration, over all ranks", "[1, 10000]")
    G: int = flag(8, "edits per source: the group", "[2, 1000]")
    lr: float = flag(1.6e-4, "rate of AdamW, falling to a tenth of it; 5 iterations warm up",
                     "[0, 10]")
    seed: int = flag(0, "one seed, one result", "[0, 2**63)")

    T: int = flag(10, "denoising steps while training; evaluation takes --eval-T",
                  "[1, 1000]", group="Sampling and exploration")
    grid: str = flag("", "times of the rollout: {}; empty: the preset's", GRIDS, setting=True)
    window: int = flag(3, "consecutive steps that are random, and trained", "[1, 1000]")
    window_start: int = flag(0, "earliest first step of the window", "[0, 1000]", setting=True)
    window_stop: int = flag(3, "latest first step; it is drawn anew each iteration", "[0, 1000]")
    kind: str = flag("flow", "kernel of the random steps: {}", KERNELS)
    eta: float = flag(0.9, "size of the fresh noise; 0: nothing to explore", "0 or [0.001, 10]")
    shared_noise: bool = flag(True, "one initial noise per group: its members differ by actions",
                              setting=True)
    guidance: float = flag(1.0, "weight of the text in rollout and update; 1: off", "[0, 100]")
    image_guidance: float = flag(1.0, "weight of the source in both; 1: off", "[0, 100]")
    refs: str = flag("", "what is shown the pictures: {}; empty: as it was trained", REFS)

    train: str = flag("dit", "{}; the bridge with its queries", TRAIN, group="What learns")
    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA", "[0, 1000]")
    lora_alpha: int = flag(64, "a LoRA's output is scaled by this / rank", "[1, 1e5]", setting=True)
    wd: float = flag(0.0, "weight decay of AdamW", "[0, 10]", setting=True)
    ema: float = flag(0.95, "decay of the averaged weights that are evaluated and saved", "[0, 1)")

    norm: str = flag("group", "scale of advantages: {}, see group_advantage", NORMS,
                     group="Objective")
    clip: float = flag(2e-3, "the ratio is clipped to 1 +- this; times the latent's dimensions "
                       "it is nats of the true log-ratio", "(0, 100]")
    updates: int = flag(1, "optimiser steps per rollout, each on a share of it", "[1, 100]")
    shuffle: bool = flag(False, "control: the rewards are dealt out at random over the batch")
    beta: float = flag(0.0, "weight of the KL to the initial model; 0: no copy of it", "[0, 1000]")
    kl: str = flag("mean", "which KL: mean (between step means, in closed form), flow-grpo "
                   "(without the step size) or velocity (between velocities)", KLS, setting=True)

    judge: str = flag("", "VLM that judges, and that writes what inverses are missing; empty: see "
                      "rewards/shared.py", group="Rewards")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    max_failed: float = flag(0.5, "a larger share of rewards that could not be had, or of judges' "
                             "answers that say nothing, ends the run", "[0, 1]")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own", HUB,
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)

    micro: int = flag(64, "rows of the window per backward; 0: all. The gradients are equal",
                      "[0, 1e6]", group="Memory and speed")
    checkpoint: bool = flag(False, "the DiT's blocks are computed again in the backward pass, "
                            "which saves memory")
    shard: bool = flag(False, "each rank keeps a part of AdamW's state and of the average (FSDP2)")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")

    eval_every: int = flag(20, "iterations between quick scores on held-out edits", "[1, 1e7]",
                           group="Evaluation")
    eval_data: str = flag("", "held-out edits of photos, as --data; empty: none, no score", FILE)
    eval_T: int = flag(10, "ODE steps of an edit", "[1, 1000]")
    final_bench: bool | None = flag(None, "at the end held-out edits and drawings, before and "
                                    "after [on, unless --steps is below --eval-every]")


# ---------------------------------------------------------------------------------------------
# What the loop calls in one line


def check(args, world):
    """Every error a user can make, before anything is loaded or written. -> weights of the edited
    and of the cycled picture's rewards; is there a way back?"""
    if args.data == Args.data and not args.preset.startswith("shapes"):
        fail(f"preset {args.preset!r} edits photos and needs --data of its own: a folder with "
             "metadata.jsonl, rows of source, instruction and inverse")
    if args.eval_data and args.preset.startswith("shapes"):
        fail("--eval-data is for photos: the classroom has held-out edits of its own")
    check_flags(args, world, "sources")
    weights = read_flag(args, "reward", partial(read_weights, short=SHORT))
    asks = any(w.get(name) for w in weights.values() for name in CYCLED)
    back = args.reverse == "yes" or args.reverse == "auto" and asks
    return [{kind: {n: x for n, x in w.items() if x and (back and n in CYCLED) == leg}
             for kind, w in weights.items()} for leg in (False, True)], back


def read_edits(path):
    """jsonl, a folder with metadata.jsonl or another layout of docs/data.md -> rows, each with what
    rewards read.

    A row has `source` (a picture's file beside the jsonl, or a scene) and `instruction`; `inverse`
    for the way back; for CLIP `source_prompt`, `target_prompt`, or GenEval metadata `source_meta`,
    `target_meta`. Without captions a reward of `prompt` reads the instruction. --reward's mixes go
    by `category`, which is the row's `kind`; `tag` is that of the target's metadata."""
    rows = []
    for where, row, folder in all_records(path, "edit"):
        try:
            asked = as_text(lookup(row, "instruction"), "instruction", where)
            about, captions = {}, []
            for k in ("source", "target"):
                about = without_nulls(record(row.get(f"{k}_meta") or {}))  # in the end the target's
                check_meta(about)
                row = row | {f"{k}_meta": about} if about else row
                caption = about.get("prompt", row.get(f"{k}_prompt", row.get(CAPTIONS[k])))
                captions.append(caption if caption is None else as_text(caption, f"{k}_prompt"))
            about = about | row | dict(
                where=where, folder=folder, source=lookup(row, "source"), instruction=asked,
                category=as_text(row.get("kind", "edit"), "kind"), tag=about.get("tag", "edit"),
                prompt=captions[1] or asked)
            if row.get("inverse"):
                about["inverse"] = as_text(row["inverse"], "inverse")
        except (ValueError, LookupError) as e:
            raise ValueError(f"{where}: {e}") from None
        rows.append(about | (dict(captions=captions) if all(captions) else {}))
    return rows


def read_all(args, weights):
    """-> rows of --data and of --eval-data; every error in them, in one line"""
    try:
        rows, held = read_edits(args.data), read_edits(args.eval_data) if args.eval_data else []
        for row in rows + held:
            names = [n for w in weights for n in w.get(row["category"], w.get("*", ()))]
            must_score(names, [row])
            if "edit" in names:
                must_be_checked(row)
    except (OSError, ValueError) as e:
        fail(e)
    for path, its in ((args.data, rows), (args.eval_data, held)):
        if path and not its:
            fail(f"{path} holds no edits")
        if path:
            say(f"{path}: {len(its):,} edits, the first: {its[0]['instruction'][:60]!r}")
    other = {row["category"] for row in rows + held} - weights[0].keys()
    if other and "*" not in weights[0]:
        fail(f"{args.reward} has no mix for edits of kind {min(other)!r}, and no '*'")
    size = preset(args.preset).size

    def pair(row):
        return row["instruction"], hash(source_picture(row, size).numpy().tobytes())
    with ThreadPoolExecutor() as pool:                   # all can be read, or nothing starts
        trained = {*tqdm(pool.map(pair, rows), "sources", len(rows), leave=False, disable=None)}
    if both := [row for row in held if pair(row) in trained]:
        fail(f"{both[0]['where']}: its picture and instruction are in {args.data}, as those of "
             f"{len(both)} in {len(held)} rows are: what is trained is not held out")
    return rows, held


def ten_of(rows):
    """At most so many edits, evenly of each kind."""
    kinds = [dict(tag=row["category"]) for row in rows]
    each = max(1, 10 // len({kind["tag"] for kind in kinds}))
    return [rows[i] for i in spread(kinds, each)][:10]


def encode(model, args, learns, prompts, images, keys):
    """Branches of conditions of instructions and what they edit, with gradient if the bridge
    learns. keys: of the noise that a preset's references have."""
    with torch.set_grad_enabled("bridge" in learns):
        return model.edit_branches(prompts, images, args.guidance, args.image_guidance, keys)


def score_both(drawn, rows, weights, judge):
    """Rewards of the edited picture, then those of the cycled one, if there is one -> Scores"""
    scores = score(drawn[0], rows, weights[0], judge)                            # values (N,K)
    for images, mix in zip(drawn[1:], weights[1:]):
        scores = scores.beside(score(images, rows, mix, judge))
    return scores


def edit_as_trained(model, args, prompts, images, seeds):
    return draw_edits(model, prompts, images, seeds, args.eval_T, args.guidance,
                      args.image_guidance).cpu()


def preview(model, args, faces, weights, judge, png):
    """Fixed edits at fixed noise: source, edited and cycled side by side; of the classroom's
    benchmark, or of held-out `faces` (weights: else None), a quick score. -> metrics"""
    n, size = len(faces), model.cfg.size
    columns = [torch.stack([source_picture(row, size) for row in faces])]        # (n,3,H,W) each
    texts = [["source"] * n]
    for leg, way in enumerate(("instruction", "inverse")):
        if all(row.get(way) for row in faces):
            texts.append([row[way] for row in faces])
            columns.append(edit_as_trained(model, args, texts[-1], [[x] for x in columns[-1]],
                                           [100 * leg + i for i in range(n)]))
    grid(torch.stack(columns, 1).flatten(0, 1), [t for line in zip(*texts) for t in line], png,
         columns=2 * len(columns))
    if args.preset.startswith("shapes"):
        bench = bench_edit(partial(edit_as_trained, model, args), 1, 100)
        return dict(score=bench["both"], success=bench["success"],
                    preservation=bench["preservation"])
    if not weights:
        return {}
    faced = [row | dict(source_image=x) for row, x in zip(faces, columns[0])]
    return held_out_score(score_both(columns[1:], faced, weights, judge))


def bench(model, args, png):
    """Held-out edits and, since one model does both, drawings. -> metrics"""
    t2i = bench_shapes(partial(model.draw, steps=args.eval_T), 1)
    return bench_edit(partial(edit_as_trained, model, args), png=png) | dict(
        t2i=t2i["score"], t2i_se=t2i["score_se"])


def main():
    args = parse(Args, __doc__, "stage3")
    rank, world, device = setup()
    weights, back = check(args, world)
    judge, photos = Judge(args.judge, args.judge_url), not args.preset.startswith("shapes")
    rows, held = read_all(args, weights)
    inverses = write_inverses(rows + held, args, rank, world) if back else {}

    # The model, what trains it, and where the run is kept
    learns, B, G = TRAIN[args.train], args.B // world, args.G    # B from here on: of this rank
    model, initial, optimiser = set_up(
        Unified, args, learns, args.micro or args.window * B * G,
        "bridge" in learns and B * (1 + back * G), args.beta, rank, device)
    reference_ways(model.cfg, model.dit)                          # it can edit, or nothing starts
    if rank == 0 and photos and not held:
        print("no held-out edits: the pictures shown are of training edits, and there is no score; "
              "--eval-data FILE names some")
    faces = ten_of(held or rows)
    recorder = Recorder(args, rank, optimiser, partial(
        preview, model, args, faces, held and weights, judge))      # after all that can fail
    keep_inverses(recorder.out, inverses, rank)

    times = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()  # 1 ... 0
    D = latent_numbers(model)
    mine = range(rank * B, rank * B + B)                 # whole groups stay on one rank
    samples = list(range(mine.start * G, mine.stop * G))         # numbers among all ranks'
    for step in recorder.steps():
        clock, rng = Clock(), keyed(key(args.seed, step, 0))     # every rank draws alike

        # 1  draw B sources with their instructions; a group is the G edits of one source
        batch = draw_rows(rows, args.B, rng)[mine.start : mine.stop]
        window = draw_window(args, rng)
        batch = [row | dict(source_image=source_picture(row, model.cfg.size), group=i)
                 for i, row in enumerate(batch)]
        edits = [row for row in batch for _ in range(G)]                         # N = B G

        # 2  roll out the edit; its picture is the reference of the way back: roll that out as well
        asked, legs, anchors, paths, drawn = [], [], [], [], []
        for leg in range(1 + back):
            keys = noise_keys(args, step, samples, G, 2 * PER_SAMPLE, leg * PER_SAMPLE)
            if leg:       # N references, so N conditions; a group starts from one noise nonetheless
                asked.append([[row["inverse"] for row in edits],
                              model.look([[image] for image in drawn[0]], "edit"),
                              [initial_noise for initial_noise, _ in keys]])
            else:         # B conditions, so that a group also shares the noise of its reference
                asked.append([[row["instruction"] for row in batch],
                              model.look([[row["source_image"]] for row in batch], "edit"),
                              [initial_noise for initial_noise, _ in keys[::G]]])
            legs.append(encode(model, args, learns, *asked[leg]))
            if args.beta:
                initial_branches = legs[leg]
                if "bridge" in learns:       # then the initial policy's conditions are others
                    with swapped(model, initial):
                        initial_branches = encode(model, args, (), *asked[leg])
                anchors.append(Anchor(initial, initial_branches, args.beta, args.kl))
            paths.append(rollout(model, legs[leg].leaf(), times, window, keys, args.eta, args.kind,
                                 args.shared_noise))
            drawn.append(model.to_images(paths[leg].x0).cpu())                   # (N,3,H,W) uint8
            clock.lap(("edit", "back")[leg])

        # 3  R = l1 edit + l2 CLIP(source, cycled) + l3 quality; one advantage for both trajectories
        scores = score_both(drawn, edits, weights, judge)                        # values (N,K)
        scored = check_scored(scores, args.max_failed, step, args.data)
        if args.shuffle:
            deal_out(scores, rng)
        advantage = group_advantage(scores.values, scores.weights, G, args.norm)     # (N,), mean 0
        if args.norm == "group":
            advantage = batch_score(advantage)
        kept = disagreeing(advantage, G)
        clock.lap("reward")

        # 4  climb the clipped surrogate over both windows. An update takes its share of the
        #    samples, drawn over all ranks
        turn = torch.randperm(args.B * G, generator=rng)[samples] % args.updates       # (N,)
        total = len(paths) * args.B * G * args.window / args.updates
        seen = [[] for _ in range(args.updates)]
        for update in range(args.updates):
            if update and "bridge" in learns:            # the bridge has learned: encode once more
                legs = [encode(model, args, learns, *inputs) for inputs in asked]
            chosen = kept[turn[kept] == update].to(device)
            for leg, path in enumerate(paths) if len(chosen) else ():
                leaf = legs[leg].leaf()                  # where micro-batches add their gradients
                owner = chosen * len(asked[leg][0]) // len(edits)        # chosen // G, or chosen
                seen[update].append(surrogate(
                    model, leaf, owner, path.rows(chosen), advantage.to(device)[chosen], times,
                    total, args, anchors[leg] if args.beta else None))
                legs[leg].pull(leaf)                     # on into the bridge, if it learns
            norms = optimiser.update(step, seen[update], [row["instruction"] for row in batch])
        optimiser.ema.update(step)
        clock.lap("update")

        # 5  one row per step; held-out edits and a place to restart, now and then
        ratios = ratio_stats(seen, args.clip, D, args.beta)
        columns = scored | norms | optimiser.finite.column() | clock.row()
        recorder.record(step, dict(kept=len(kept) / len(edits), **ratios), columns, CURVES)

    if wants_final_bench(args):
        before_and_after(args, optimiser, recorder.out, bench)


if __name__ == "__main__":
    main()
