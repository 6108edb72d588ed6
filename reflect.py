"""Stage 3 where the language model acts, and then perhaps the DiT (UniRL-Zero's scenarios 1, 2, 5
and 6):

    torchrun reflect.py                     # judge a picture, say what is wrong with it, draw again
    python reflect.py --task cot            # think, then draw
    python reflect.py --task text           # answer questions; --task vqa: about pictures
    python reflect.py --train lm --out out/lm       # the paper's ablation: lm, dit or both
    python reflect.py --shuffle --out out/control   # the same rewards, dealt out at random

One data flow for all of them. A sample is what the language model says and, for some samples, the
picture drawn because of it; one advantage is credited to all its tokens and denoising steps:

    1  draw B rows: prompts, questions, or prompts with a first picture, half right and half wrong
    2  the language model answers each G times, every token an action
    3  some samples draw from their words: none (text, vqa), all (cot), or those that say no
       (reflect; of --redraw first pictures: a verdict costs little beside a drawing)
    4  score words and pictures; a sample is compared with the G of its own row
    5  climb both clipped surrogates, of tokens and of steps; groups that all agree cost nothing
    6  log; now and then look at pictures and words and score held-out ones

A first picture is no action, whoever drew it: nothing learns from it (the paper leaves that open).
The paper's code has scenarios 1, 2 and 5; of 6 it has nothing.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from tqdm import tqdm

from common.draw import draw_reflecting, draw_thinking
from common.flags import FILE, HUB, RunFlags, among, flag, parse, read_flag
from common.layouts import all_records, lookup
from common.presets import GRIDS, KERNELS, KLS, NORMS, PRESETS, REFS, preset, reference_ways
from common.read import as_text, pixels, to_bucket
from common.record import Recorder
from common.rl import (Anchor, Clock, check_flags, deal_out, disagreeing, draw_rows, draw_window,
                       latent_numbers, must_be_drawn, noise_keys, ratio_stats, read_mix, set_up,
                       wants_final_bench)
from common.run import PER_SAMPLE, fail, key, keyed, setup, slices
from common.show import grid, show_answers
from common.words import answer_of, answers, spans, verdict
from data.shapes.bench import bench_shapes
from data.shapes.edits import picture_of, source_picture
from data.shapes.talk import bench_answer, bench_reflect, bench_think
from eval import (Scores, before_and_after, check_scored, held_out_score, must_be_held_out,
                  must_be_mixed, read_rows, read_weights, score, sixteen, weights_of)
from rewards.prompts import prompts_of
from grpo import batch_score, group_advantage, surrogate
from common.weights import swapped
from model import Branches, Unified, rollout, sigmas
from rewards.judge import Judge
from rewards.shared import must_score

PROMPTS = "data/shapes/prompts/"
TASKS = {                                 # what differs from Args by task
    "reflect": {},
    "cot": dict(init="out/sft-cot", data=PROMPTS + "reason_train.jsonl", out="out/cot", steps=40,
                B=16, limit=64, format=0.2, lm_lr=3e-4, lm_beta=0.05),
    "text": dict(init="data/shapes/sft", data=PROMPTS + "textqa_train.jsonl", out="out/text",
                 steps=120, B=16, train="lm", format=0.2, lm_lr=3e-4, lm_beta=0.05),
    "vqa": dict(init="data/shapes/sft", data=PROMPTS + "vqa_train.jsonl", out="out/vqa", B=128,
                G=16, steps=1500, mix="caption:0.15,color:1.5,*:1", train="lm", format=0.0,
                lm_lr=5e-4, lm_beta=0.1, micro=512),        # of 16 answers some differ, of 4 rarely
}
ASKS = dict(reflect="critique", cot="think", text="answer", vqa="answer")    # tasks of the VLM
LOOK = {                                  # a quick score -> held-out metrics
    "reflect": dict(accuracy="accuracy", corrected="corrected", damaged="damaged"),
    "cot": dict(score="score", raw="raw", answer="answer", format="format", length="words"),
    "text": dict(score="accuracy", length="words"), "vqa": dict(score="accuracy", length="words"),
}
CURVES = [["accuracy", "corrected", "damaged", "score", "raw"], ["words"]]   # beside the rewards
# Of recipes, what these tasks go without: only grpo.py has it, or nothing is drawn.
NOT_HERE = dict.fromkeys(("cot", "text", "vqa"), ("trained", "sft", "sft_batch", "ldam"))
NOT_HERE |= dict.fromkeys(("text", "vqa"), (*NOT_HERE["cot"], "train", "lora_rank", "lora_alpha"))
TRAIN = {                                 # --train -> parts that learn
    **dict.fromkeys(("reflect", "cot"), dict(lm=["vlm"], dit=["dit"],
                                             both=["dit", "bridge", "vlm"])),
    **dict.fromkeys(("text", "vqa"), dict(lm=["vlm"])),
}


@dataclass
class Args(RunFlags):
    task: str = flag("reflect", "reflect (judge, criticise, draw again), cot (think, then draw), "
                     "text or vqa (answer; flags about drawing then count for nothing)", TASKS,
                     group="What matters most")
    preset: str = flag("shapes", "which model, by its name in common/presets.py", PRESETS)
    recipe: str = flag("fast", "which settings, by their name in common/presets.py, or a .json of "
                       "them; a flag wins")
    init: str = flag("out/sft-reflect", "a checkpoint that heeds words, or as grpo.py's", HUB)
    reward: str = flag("geneval", "of the picture, as grpo.py's --reward; text and vqa have "
                       "their own")
    data: str = flag("data/shapes/prompts/reflect_train.jsonl",
                     "jsonl, or a folder with metadata.jsonl: of prompts and first pictures, "
                     "prompts, or questions", FILE)
    train: str = flag("both", "what learns: lm (by its tokens), dit (by its steps), or both and "
                      "the bridge between", TRAIN["reflect"])
    out: str = flag("out/reflect", "folder of the run")
    steps: int = flag(200, "iterations: a rollout and what is learned from it", "[1, 1e7]")
    B: int = flag(128, "rows per iteration, over all ranks", "[1, 10000]")
    G: int = flag(8, "samples per row: the group", "[2, 1000]")
    lr: float = flag(8e-5, "rate of AdamW, falling to a tenth of it; 5 iterations warm up",
                     "[0, 10]")
    lm_lr: float = flag(7e-4, "as --lr, of the language model", "[0, 10]")
    seed: int = flag(0, "one seed, one result", "[0, 2**63)")

    limit: int = flag(32, "most tokens that a sample may have", "[1, 10000]", group="Words")
    temperature: float = flag(1.0, "of drawing words; reflections are evaluated by the "
                              "likeliest ones", "[0.01, 100]")
    top_p: float = flag(1.0, "words are drawn from the likeliest of this mass; 1: all", "(0, 1]")

    redraw: int = flag(8, "reflect: of so many first pictures each critique that says no leads to "
                       "a second drawing; the others are judged alone", "[1, 10000]")
    images_per_thought: int = flag(1, "cot: images of one thought, which learns by their mean",
                                   "[1, 1000]")
    answer_only: bool = flag(False, "cot: the DiT is told the answer, not prompt and thought")
    mix: str = flag("", "weight of each row by its category, as text:3,*:1; empty: all alike",
                    setting=True)

    verdict: float = flag(1.0, "reflect: weight of the reward for a right verdict", "[0, 1000]",
                          group="Rewards")
    format: float = flag(1.0, "weight of the reward for the form of words: yes, or no and why; "
                         "<think> and <answer> tags", "[0, 1000]")
    judge: str = flag("", "VLM of the rewards preference and judge; empty: see rewards/shared.py")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    max_failed: float = flag(0.5, "a larger share of rewards that could not be had, or of judges' "
                             "answers that say nothing, ends the run", "[0, 1]")

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
    guidance: float = flag(1.0, "weight of prompt and critique in rollout and update; 1: off",
                           "[0, 100]")
    refs: str = flag("", "what redraws from the picture: {}; empty: the preset's", REFS)

    lora_rank: int = flag(0, "rank of a LoRA on the DiT's attention; 0: no LoRA", "[0, 1000]",
                          group="What learns")
    lora_alpha: int = flag(64, "a LoRA's output is scaled by this / rank", "[1, 1e5]", setting=True)
    vlm_lora_rank: int = flag(0, "rank of a LoRA on the language model; 0: no LoRA", "[0, 1000]")
    vlm_lora_alpha: int = flag(128, "its output is scaled by this / rank", "[1, 1e5]")
    wd: float = flag(0.0, "weight decay of AdamW", "[0, 10]", setting=True)
    ema: float = flag(0.95, "decay of the averaged weights that are evaluated and saved", "[0, 1)")

    norm: str = flag("group", "scale of advantages: {}, see group_advantage", NORMS,
                     group="Objective")
    clip: float = flag(2e-3, "the ratio is clipped to 1 +- this; times the latent's dimensions "
                       "it is nats of the true log-ratio", "(0, 100]")
    lm_clip: float = flag(0.2, "likewise of a token", "(0, 100]")
    updates: int = flag(1, "optimiser steps per rollout, each on a share of it", "[1, 100]")
    shuffle: bool = flag(False, "control: the rewards are dealt out at random over the batch")
    beta: float = flag(0.0, "weight of the steps' KL to the initial model; 0: no copy", "[0, 1000]")
    lm_beta: float = flag(0.1, "as --beta, of tokens", "[0, 1000]")
    kl: str = flag("mean", "which KL: mean (between step means, in closed form), flow-grpo "
                   "(without the step size) or velocity (between velocities)", KLS, setting=True)

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own", HUB,
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)

    micro: int = flag(64, "critiques, or rows of the window, per backward; 0: all. The "
                      "gradients are equal", "[0, 1e6]", group="Memory and speed")
    checkpoint: bool = flag(False, "the DiT's blocks are computed again in the backward pass, "
                            "which saves memory")
    shard: bool = flag(False, "each rank keeps a part of AdamW's state and of the average (FSDP2)")
    compile: bool = flag(False, "the DiT runs through torch.compile: minutes at first, then faster")

    eval_every: int = flag(20, "iterations between quick scores on held-out pictures", "[1, 1e7]",
                           group="Evaluation")
    eval_data: str = flag("", "held-out rows of photos, as --data; empty: none, and no score", FILE)
    eval_T: int = flag(10, "ODE steps of a drawing", "[1, 1000]")
    rounds: int = flag(1, "reflect: most looks at a picture; a yes ends them", "[1, 100]")
    final_bench: bool | None = flag(None, "at the end the whole benchmark, before and after [on, "
                                    "unless --steps is below --eval-every]")


# ---------------------------------------------------------------------------------------------
# The algorithm: what grpo.py has not


def token_surrogate(logp, old, mask, A, weight, args, reference=None):
    """The clipped objective over words (UniRL-Zero eq. 2). logp, old, for --lm-beta the
    reference's: (n,L) log-probs; mask (n,L) True = chosen by the policy; A (n,); weight (n,) of
    each token.

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
        off = (reference - logp)[mask]
        kl = off.exp() - 1 - off
    loss = (weight * (args.lm_beta * kl - gain)).sum()
    return loss, torch.stack([ratio, kl], 1).detach()


def words_again(model, args, rows, looks, words, refs, n, draw):
    """One pass of the VLM over prompts, pictures and words of samples n, with gradient where that
    is on, and over the queries if they draw. -> Branches of conditions to draw from, log-probs
    (n,L) of the words"""
    prompts, said = [rows[i]["prompt"] for i in n], words.rows(n)
    shows, ask = looks and [looks[i] for i in n], ASKS[args.task]
    if not draw or args.answer_only:
        logp = model.text_logp(prompts, shows, said, ask, args.temperature)
        cond = model.encode(answers(prompts, said)) if draw else None
    else:
        cond, logp = model.encode_words(prompts, shows, said, ask, args.temperature)
    if not draw:
        return Branches(), logp
    cond.refs = [refs[i] for i in n] if refs else None
    return model.guided(cond, args.guidance, shows, ask if shows else "t2i"), logp


# ---------------------------------------------------------------------------------------------
# What the loop calls in one line


def check(args, world):
    """Every error a user can make, before anything is loaded or written. -> rewards of pictures and
    their weights by category, weights of categories in the draw"""
    photos = not args.preset.startswith("shapes")
    if photos and args.data in (Args.data, TASKS[args.task].get("data")):
        fail(f"preset {args.preset!r} draws photos and needs --data of its own: a folder with "
             "metadata.jsonl, rows of prompt, right and wrong; prompts, or questions")
    if args.eval_data and not photos:
        fail("--eval-data is for photos: the classroom has held-out rows of its own")
    if preset(args.preset).bridge == "text":
        fail(f"preset {args.preset!r} has no language model that could answer")
    among("train", args.train, TRAIN[args.task])
    check_flags(args, world, "rows")
    for name, task in (("redraw", "reflect"), ("verdict", "reflect"), ("rounds", "reflect"),
                       ("images_per_thought", "cot"), ("answer_only", "cot")):
        if getattr(args, name) != getattr(Args, name) and args.task != task:
            fail(f"--{name.replace('_', '-')} is for --task {task}")
    if args.task == "reflect" and min(args.redraw, args.B) < min(2 * world, args.B):
        fail(f"--redraw {args.redraw}: at least a pair of first pictures for each of {world} ranks")
    if args.mix and args.task == "reflect":
        fail("the setting mix is for --task cot, text and vqa")
    learns = TRAIN[args.task][args.train]
    if args.lora_rank and "dit" not in learns or args.vlm_lora_rank and "vlm" not in learns:
        fail(f"--lora-rank adapts the DiT, --vlm-lora-rank the language model; of --task "
             f"{args.task}, --train {args.train} learns: {', '.join(learns)}")
    return read_flag(args, "reward", read_weights), read_flag(args, "mix", read_mix)


def read_pool(path):
    """jsonl, or a folder with metadata.jsonl -> first images: rows of the wrong ones, of the right.

    A line has `prompt` (and GenEval's metadata for rewards that read it), and `right` or `wrong` or
    both: a picture's file beside the jsonl, or a scene."""
    pools = [], []
    for row, where, folder in prompts_of(path):
        for pool, side in zip(pools, ("wrong", "right")):
            if row.get(side) is not None:
                pool.append(row | dict(source=row[side], right=side == "right", where=where,
                                       folder=folder))
    for pool, side in zip(pools, ("wrong", "right")):
        if not pool:
            raise ValueError(f"{path}: no row has a first image that is {side}, `{side}`")
    return pools


def read_questions(path):
    """jsonl of `question`, `answer` and, to look at, `scene` (the classroom's) or `image` (a file)
    -> rows with `prompt`, the question; all can be looked at, or nothing starts."""
    rows = []
    for where, row, folder in tqdm(all_records(path), "questions", leave=False, disable=None):
        try:
            question, answer = (as_text(lookup(row, k), k) for k in ("question", "answer"))
            about = next((row[k] for k in ("scene", "image") if row.get(k) is not None), None)
            row |= dict(prompt=question, answer=answer_of(answer), folder=folder, about=about)
            asked_about(row)
        except (ValueError, LookupError) as e:
            raise ValueError(f"{where}: no `question`, `answer` and maybe a `scene` or `image` "
                             f"that can be read ({e})") from None
        rows.append(row)
    return rows


def same_picture(row):
    """What tells the picture of a question from others: its file, or what it consists of"""
    about = row["about"]
    return str((row["folder"] / about).resolve() if isinstance(about, str) else about)


def asked_about(row, cfg=None):
    """-> the picture that a question is about, uint8 (3,H,W), or None. cfg: of the model that is to
    see it, at the area that it draws; else as it is"""
    if row["about"] is None:
        return None
    image = Image.fromarray(picture_of(row["about"], row["folder"]))
    return to_bucket([image], cfg)[0] if cfg else pixels(image)


def read_task(path, args, weights):
    """--data or --eval-data -> rows, of reflect two lists, of wrong and of right first pictures;
    every error in them, in one line."""
    photos = not args.preset.startswith("shapes")
    if args.task == "cot":
        return read_rows(path, weights, args.reward, photos)
    try:
        if args.task == "reflect":
            rows = read_pool(path)
            must_be_mixed(sum(rows, []), weights, args.reward)
            for row in tqdm(sum(rows, []), "pictures", leave=False, disable=None):
                must_score(weights_of(row, weights), [row])
                source_picture(row, preset(args.preset).size)    # or nothing starts
            return rows
        rows = read_questions(path)
    except FileNotFoundError as e:
        fail(f"{e}" if photos else f"{e}; the classroom's: python -m data.shapes.prepare data")
    except (OSError, ValueError) as e:
        fail(e)
    if not rows:
        fail(f"{path} holds no prompts")
    if args.task == "vqa" and any(row["about"] is None for row in rows):
        fail(f"{path}: --task vqa is about pictures; a line without one is --task text's")
    return rows


def read_held(args, weights, rows):
    """-> held-out rows of photos to look at and to score, none of them trained on; [] without"""
    if not args.eval_data:
        return []
    held = read_task(args.eval_data, args, weights)
    if args.task != "reflect":
        must_be_held_out(held, args.eval_data, rows, args.data, lambda row: (
            row["prompt"], args.task == "vqa" and same_picture(row)))    # a question is of its own
        return sixteen(held)
    trained = {row["prompt"] for row in sum(rows, [])}
    if both := [row for row in sum(held, []) if row["prompt"] in trained]:
        fail(f"{both[0]['where']}: its prompt is in {args.data}, as those of {len(both)} in "
             f"{len(sum(held, []))} pictures are: what is trained is not held out")
    return some_of_each(held)


def some_of_each(pools):
    """Five first pictures that are wrong and five that are right, evenly spaced, by turns."""
    return [pool[i * len(pool) // 5] for i in range(5) for pool in pools]


def draw_batch(rows, args, rng, mix):
    """args.B rows; of first pictures by turns a wrong and a right one."""
    if args.task != "reflect":
        return draw_rows(rows, args.B, rng, mix)
    orders = [torch.randperm(len(pool), generator=rng).tolist() for pool in rows]
    return [rows[i % 2][orders[i % 2][i // 2 % len(rows[i % 2])]] for i in range(args.B)]


def with_picture(row, args, cfg):
    """-> row, and as `source_image` the picture that the language model looks at, or None"""
    if args.task == "reflect":
        return row | dict(source_image=source_picture(row, cfg.size))
    return row | dict(source_image=asked_about(row, cfg) if args.task == "vqa" else None)


def may_draw(args, mine):
    """Of this rank's rows, by their numbers among all, which may draw (see step 3): none, all, or
    --redraw of them, pairs of a wrong and a right one, evenly among the B. Of B 8 with --redraw 4
    rows 0, 1, 4 and 5 may."""
    if args.task == "reflect":
        return [((i // 2) * args.redraw) % args.B < args.redraw for i in mine]
    return [args.task == "cot"] * len(mine)


def score_samples(args, rows, words, says, able, images, weights, judge):
    """Rewards of words and, where a sample was able to draw, of the picture in the end -> Scores of
    all images, a sample's (one or --images-per-thought of cot) in a row"""
    if args.task in ("text", "vqa"):
        right = torch.tensor([[answer_of(t) == row["answer"]] for t, row in zip(words.texts, rows)])
        scores = Scores(right.float(), torch.ones(len(rows), 1), ["answer"])
    elif args.task == "cot":
        scores = score(images, [row for row in rows for _ in range(args.images_per_thought)],
                       weights, judge)
    if args.task != "reflect":
        if args.format:
            formed = torch.tensor([spans(t)["ok"] and end for t, end in zip(
                words.texts, words.closed.tolist())]).float()
            formed = formed.repeat_interleave(args.images_per_thought)[:, None]      # (N M,1)
            scores = scores.beside(Scores(formed, torch.full_like(formed, args.format), ["format"]))
        return scores
    at = torch.tensor(able).nonzero()[:, 0]
    drawn = score(images[at], [rows[i] for i in at.tolist()], weights, judge)
    said = torch.tensor([[yes == row["right"], form and closed] for (yes, form), closed, row in
                         zip(says, words.closed.tolist(), rows)]).float()        # (N,2)
    values = torch.full((len(rows), len(drawn.names)), math.nan).index_copy(0, at, drawn.values)
    mixed = torch.zeros_like(values).index_copy(0, at, drawn.weights)
    own = torch.tensor([[args.verdict, args.format]]).expand(len(rows), 2)
    return Scores(said, own, ["verdict", "format"]).beside(
        Scores(values, mixed, drawn.names, drawn.answers, drawn.error))


def benched(model, args):
    """The task's benchmark of held-out rows, with the settings of training: f(n, limit, png)."""
    draw = partial(model.draw, steps=args.eval_T, guidance=args.guidance)
    if args.task == "reflect":
        return partial(bench_reflect, again(model, args))
    if args.task == "cot":
        return partial(bench_think, draw, thinking(model, args))

    def say(questions, images, seeds):
        return model.generate(questions, images, "answer", args.limit, args.temperature,
                              keys=seeds).texts
    return partial(bench_answer, say, dict(text="textqa", vqa="vqa")[args.task])


def again(model, args):
    """As trained, but that words are the likeliest ones: f(prompts, images, seeds) -> last
    pictures, critiques of each"""
    return partial(draw_reflecting, model, rounds=args.rounds, steps=args.eval_T,
                   guidance=args.guidance, limit=args.limit)


def thinking(model, args):
    return partial(draw_thinking, model, steps=args.eval_T, guidance=args.guidance,
                   limit=args.limit, temperature=args.temperature, answer_only=args.answer_only)


def preview(model, args, faces, held, weights, judge, png):
    """Fixed rows at fixed noise: pictures and words to look at; where they are held out, a quick
    score. -> metrics"""
    if args.task != "reflect" and args.preset.startswith("shapes"):
        return quick_bench(model, args, png)
    show = dict(reflect=show_reflections, cot=show_thoughts).get(args.task, show_asked)
    return show(model, args, faces, held, weights, judge, png)


def quick_bench(model, args, png=None):
    metrics = benched(model, args)(1, 96, png)
    return {name: metrics[k] for name, k in LOOK[args.task].items()}


def show_reflections(model, args, faces, held, weights, judge, png):
    """First pictures and last ones, with what was said of them."""
    prompts = [row["prompt"] for row in faces]
    firsts = torch.stack([source_picture(row, model.cfg.size) for row in faces])
    last, said = again(model, args)(prompts, firsts, range(len(faces)))
    grid(torch.stack([firsts, last.cpu()], 1).flatten(0, 1),
         [t for p, row in zip(prompts, said) for t in (p, " / ".join(row))], png,
         [f for row in faces for f in (row["right"], None)])
    if args.preset.startswith("shapes"):
        return quick_bench(model, args)
    if not held:
        return {}
    faced = [row | dict(source_image=x) for row, x in zip(faces, firsts)]
    right = [verdict(row[0])[0] == face["right"] for row, face in zip(said, faces)]
    return held_out_score(score(last.cpu(), faced, weights, judge)) | dict(
        accuracy=sum(right) / len(right))


def show_thoughts(model, args, faces, held, weights, judge, png):
    """Pictures, with what was thought before they were drawn."""
    prompts = [row["prompt"] for row in faces]
    images, words = thinking(model, args)(prompts, range(len(faces)))
    grid(images.cpu(), [f"{p}: {t}" for p, t in zip(prompts, words.texts)], png)
    return held_out_score(score(images.cpu(), faces, weights, judge)) if held else {}


def show_asked(model, args, faces, held, weights, judge, png):
    """Questions and answers."""
    prompts = [row["prompt"] for row in faces]
    pictures = [[asked_about(row, model.cfg)] for row in faces] if args.task == "vqa" else None
    said = model.generate(prompts, pictures, "answer", args.limit, args.temperature,
                          keys=range(len(faces))).texts
    right = [answer_of(t) == row["answer"] for t, row in zip(said, faces)]
    show_answers(prompts, said, right, png)
    return dict(score=sum(right) / len(right)) if held else {}


def whole_bench(model, args, png):
    """The task's benchmark and, of reflect, drawings, since one model does both. -> metrics"""
    results = benched(model, args)(1 if args.task == "reflect" else 4, None, png)
    if args.task == "reflect":
        t2i = bench_shapes(partial(model.draw, steps=args.eval_T), 1)
        results |= dict(t2i=t2i["score"], t2i_se=t2i["score_se"])
    return results


def main():
    args = parse(Args, __doc__, "stage3", TASKS, NOT_HERE)
    rank, world, device = setup()
    weights, mix = check(args, world)
    judge, photos = Judge(args.judge, args.judge_url), not args.preset.startswith("shapes")
    rows = read_task(args.data, args, weights)
    if args.task != "reflect":
        must_be_drawn(args, mix, rows, args.data)
    held = read_held(args, weights, rows)

    # The model, what trains it, and where the run is kept
    learns, B, G = TRAIN[args.task][args.train], args.B // world, args.G     # B: of this rank
    speaks, draws, M = "vlm" in learns, "dit" in learns, args.images_per_thought
    anchored = draws and args.beta or speaks and args.lm_beta
    model, initial, optimiser = set_up(
        Unified, args, learns, draws and (args.micro or args.window * B * G * M),
        speaks and (args.micro or B * G), anchored, rank, device)
    ways = reference_ways(model.cfg, model.dit) if args.task == "reflect" else ()
    if rank == 0 and photos and not held:
        print("no held-out rows: what is shown is of training rows, and there is no score; "
              "--eval-data FILE names some")
    faces = held or (some_of_each(rows) if args.task == "reflect" else rows[:16])
    recorder = Recorder(args, rank, optimiser, partial(
        preview, model, args, faces, bool(held), weights, judge),   # after all that can fail
        "accuracy" if args.task == "reflect" else "score")

    times = sigmas(args.T, model.cfg.sample_shift, args.grid or model.cfg.grid).tolist()  # 1 ... 0
    D = latent_numbers(model)
    mine = range(rank * B, rank * B + B)                 # whole groups stay on one rank
    samples = list(range(mine.start * G, mine.stop * G))         # numbers among all ranks'
    able = [allowed for allowed in may_draw(args, mine) for _ in range(G)]
    for step in recorder.steps():
        clock, rng = Clock(), keyed(key(args.seed, step, 0))     # every rank draws alike

        # 1  draw B rows; a group is the G samples of one row
        batch = draw_batch(rows, args, rng, mix)[mine.start : mine.stop]
        window = draw_window(args, rng)
        batch = [with_picture(row, args, model.cfg) | dict(group=i)
                 for i, row in enumerate(batch)]
        asked = [row for row in batch for _ in range(G)]                         # N = B G samples
        looks = None
        if batch[0]["source_image"] is not None:         # each picture is looked at once
            looks = model.look([[row["source_image"]] for row in batch])
            looks = [look for look in looks for _ in range(G)]

        # 2  the language model answers each row G times
        last = PER_SAMPLE - 1                            # of a sample's numbers: for its words
        word_keys = [key(args.seed, step, n * M * PER_SAMPLE + last) for n in samples]
        words = model.generate([row["prompt"] for row in batch], looks and looks[::G],
                               ASKS[args.task], args.limit, args.temperature, args.top_p,
                               word_keys, G)
        says = [verdict(text) for text in words.texts]           # reflect: yes or no, well formed?
        clock.lap("words")

        # 3  some draw, each from words of its own, a group from one initial noise. The log-probs
        #    kept are not those the words were drawn with but of the update's own pass over them,
        #    which conditions the DiT: so the ratio starts at 1
        drawing = [n for n, allowed in enumerate(able)
                   if allowed and (args.task == "cot" or says[n][0] is False)]
        place = {n: k for k, n in enumerate(drawing)}            # sample -> its row among these
        keys = noise_keys(args, step, [n * M + m for n in samples for m in range(M)], G * M)
        images = torch.stack([row["source_image"] for row in asked]) if (
            args.task == "reflect") else None                                    # (N,3,H,W) uint8
        old_logp, refs, branches = torch.zeros_like(words.logp), {}, Branches()
        if drawing:
            if "dit" in ways:                            # a group shares the noise of its reference
                shared = list(dict.fromkeys(n // G * G for n in drawing))
                shared = dict(zip(shared, model.ref_latents([looks[n] for n in shared],
                                                            [keys[n][0] for n in shared])))
                refs = {n: shared[n // G * G] for n in drawing}
            with torch.no_grad():
                branches, old_logp[drawing] = words_again(model, args, asked, looks, words, refs,
                                                          drawing, True)
            path = rollout(model, branches, times, window,
                           [keys[n * M + m] for n in drawing for m in range(M)], args.eta,
                           args.kind, args.shared_noise)
            redrawn = model.to_images(path.x0).cpu()
            images = redrawn if args.task == "cot" else images.index_copy(
                0, torch.tensor(drawing), redrawn)
        clock.lap("redraw")

        # 4  score words and pictures; compare a sample with the G of its row
        scores = score_samples(args, asked, words, says, able, images, weights, judge)  # (N M,K)
        scored = check_scored(scores, args.max_failed, step, args.data)
        if args.shuffle:
            deal_out(scores, rng)
        advantage = group_advantage(scores.values, scores.weights, G * M, args.norm)
        if args.norm == "group":
            advantage = batch_score(advantage)
        credit = advantage.view(-1, M)                                           # (N,M)
        kept = disagreeing(credit.abs().amax(1), G)
        rest = [n for n in kept.tolist() if speaks and n not in place]
        with torch.no_grad():
            for i in slices(len(rest), args.micro):
                old_logp[rest[i]] = words_again(model, args, asked, looks, words, refs, rest[i],
                                                False)[1]
        clock.lap("reward")

        # 5  climb both clipped surrogates. An update takes its share of the samples, drawn over all
        #    ranks; in the first every ratio is 1
        turn = torch.randperm(args.B * G, generator=rng)[samples] % args.updates       # (N,)
        weight = args.updates / args.B / (               # of a token: all groups are equal
            words.mask.view(B, -1).sum(1).repeat_interleave(G))                  # (N,)
        # A sample that might draw and does not gives no gradient, but counts.
        most = sum(may_draw(args, range(args.B)))
        total = most * G * M * args.window / args.updates
        seen, spoken = ([[] for _ in range(args.updates)] for _ in range(2))
        for update in range(args.updates):
            chosen = kept[turn[kept] == update].tolist()
            drew = [n for n in chosen if n in place]
            only_said = [n for n in chosen if speaks and n not in place]
            parts = [(drew[i], True) for i in slices(len(drew), args.micro)] if drew else []
            if only_said:
                parts += [(only_said[i], False) for i in slices(len(only_said), args.micro)]
            for n, draw in parts:                        # samples of a micro-batch draw, or do not
                drawn = [place[i] for i in n] if draw else []
                if speaks:                               # read again with gradient, once
                    fresh, logp = words_again(model, args, asked, looks, words, refs, n, draw)
                else:
                    fresh = branches.rows(drawn)
                leaf, anchor, logp_initial = fresh.leaf(), None, None
                if anchored:
                    with torch.no_grad(), swapped(model, initial):
                        before, logp_initial = words_again(model, args, asked, looks, words, refs,
                                                           n, draw and args.beta > 0)
                    anchor = Anchor(initial, before, args.beta, args.kl) if args.beta else None
                if draw and draws:
                    k = [i * M + m for i in drawn for m in range(M)]             # their images
                    owner = torch.arange(len(k), device=device) // M
                    seen[update].append(surrogate(
                        model, leaf, owner, path.rows(k), credit[n].flatten().to(device), times,
                        total, args, anchor))
                if speaks:
                    loss, ratios = token_surrogate(
                        logp, old_logp[n], words.mask[n], credit[n].mean(1).to(device), weight[n],
                        args, logp_initial)
                    spoken[update].append(ratios)
                    fresh.pull(leaf, loss)               # on into bridge and language model
            norms = optimiser.update(step, seen[update] + spoken[update],
                                     [row["prompt"] for row in batch])
        optimiser.ema.update(step)
        clock.lap("update")

        # 6  one row per step; held-out rows and a place to restart, now and then
        stats = dict(kept=len(kept) / len(asked), words=words.mask.sum(1).float().mean(),
                     closed=words.closed.float().mean())
        if args.task == "reflect":
            stats |= dict(redrawn=len(drawing) / len(asked))
        if draws:
            stats |= ratio_stats(seen, args.clip, D, args.beta)
        if speaks:
            stats |= ratio_stats(spoken, args.lm_clip, 1, args.lm_beta, "lm_")
        columns = scored | norms | optimiser.finite.column() | clock.row()
        recorder.record(step, stats, columns, CURVES + [[*norms]])

    if wants_final_bench(args):
        before_and_after(args, optimiser, recorder.out, whole_bench)


if __name__ == "__main__":
    main()
