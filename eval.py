"""Rewards by name, and benchmarks. One detector reads the pictures for both: the reward geneval is
the share of what was asked that is there, the benchmark counts all or nothing.

    python eval.py --bench shapes --init data/shapes/sft --out out/eval
    python eval.py --bench geneval --init out/grpo --out out/geneval    # real images: draw, score
    python eval.py --bench geneval --score-only FOLDER       # anybody's pictures, in its layout
    python eval.py --bench wise --bench-dir WISE --judge-url http://host:8000/v1 --judge NAME ...
    python eval.py --table out/geneval --table out/wise      # runs beside the papers' own rows
    python eval.py --bench shapes-edit --init data/shapes/sft-edit --guidances 1,3 --out out/edits
    python eval.py --bench shapes-think --init out/sft-cot    # also shapes-reflect, shapes-answer
    python eval.py --write-prompts geneval FILE    # its 553 prompts; geneval-train: 50,000 for RL
"""

import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path

import torch

from benchmarks import NAMES, listing
from benchmarks import find as find_benchmark
from benchmarks.drawing import Tested, draw_all, shots_of
from benchmarks.judging import score_all
from benchmarks.shapes_edit import read_guidances
from benchmarks.tables import contact_sheet, joined
from common.checkpoint import read_about
from common.flags import (FILE, HUB, can_hold, flag, given_parts, inside, number, parse, read_flag,
                          read_text, shown, there)
from common.layouts import all_records, say
from common.page import write_page
from common.presets import PRESETS, SOLVERS
from common.read import named, parse_json, read_json
from common.rl import must_be_drawn
from common.run import all_mean, category_of, fail, one_line, setup, slices, use_gpu, write
from common.show import grid, show_table
from common.stop import stopping, this_rank
from common.weights import slim
from data.shapes.bench import bench_shapes
from data.shapes.world import COLORS, SHAPES
from model import Trajectory, Unified, rollout
from rewards import find
from rewards.judge import Judge
from rewards.photos import COCO_THRESHOLDS
from rewards.prompts import COCO, geneval_prompts, read_prompts, write_prompts
from rewards.shared import MODELS

# N images, P prompts, K rewards, C H W a torch image; numpy images are (H,W,3) uint8 RGB

# ---------------------------------------------------------------------------------------------
# Scores: rewards by name, mixed by weight


@dataclass
class Scores:
    """What K rewards say of N images."""

    values: torch.Tensor                        # (N,K), NaN: not asked, or could not be had
    weights: torch.Tensor                       # (N,K), 0: not asked
    names: list                                 # K
    answers: dict = field(default_factory=dict)  # judges': {name: [(answer or None, its value)]}
    error: str = ""                             # the last failure of a judge's endpoint

    def beside(self, more):
        """These rewards, then those of `more`, of the same images -> Scores"""
        return Scores(torch.cat([self.values, more.values], 1),
                      torch.cat([self.weights, more.weights], 1), self.names + more.names,
                      self.answers | more.answers, self.error or more.error)

    @staticmethod
    def cat(parts):
        """Scores by the same rewards, of one part of the images after another."""
        judged = {name for s in parts for name in s.answers}
        answers = {name: sum((s.answers.get(name, []) for s in parts), []) for name in judged}
        return Scores(torch.cat([s.values for s in parts]), torch.cat([s.weights for s in parts]),
                      parts[0].names, answers, next((s.error for s in parts if s.error), ""))


def column_of(name):
    """A reward's name in the log: of "file.py:function" the function's."""
    return name.rpartition(":")[2]


def parse_weights(text):
    """ "geneval:0.8,my_file.py:f:0.2" -> {name: weight}; no number means 1."""
    weights = {}
    for item in text.split(","):
        name, weight = re.fullmatch(r"((?:[^:]*\.py:)?[^:]*):?(.*)", item.strip(), re.S).groups()
        find(name)
        if column_of(name) in map(column_of, weights):
            raise ValueError(f"reward {column_of(name)!r} is given twice")
        weights[name] = number(weight or 1)
        if not inside(weights[name], "[-1e6, 1e6]"):
            raise ValueError(f"weight of reward {name!r} is not a number in [-1e6, 1e6]: "
                             f"{weight!r}")
    if not any(weights.values()):
        raise ValueError(f"every weight in {text!r} is 0: nothing to train on")
    return weights


def read_weights(text, short=()):
    """--reward: a mix, or a .json of {category: mix} -> {category: {name: weight}}; ValueError.
    short: {name: the mix that it stands for}."""
    mixes = (read_json(text) if text.endswith(".json") else parse_json(text) if
             text.strip().startswith("{") else {"*": text})
    if not isinstance(mixes, dict):
        raise ValueError(f"{text} is {named(mixes)}, no JSON object of mixes by category")
    for name, mix in dict(short).items():                # whole names: edit_judge is no judge
        mixes = {k: re.sub(rf"(^|,)(\s*){name}(?=\s*(?:[:,]|$))", rf"\1\2{mix}", str(m))
                 for k, m in mixes.items()}
    weights = {kind: parse_weights(str(m)) for kind, m in mixes.items()}
    names = {}                                           # in the log -> in the mixes
    for name in (name for mix in weights.values() for name in mix):
        if names.setdefault(column_of(name), name) != name:
            raise ValueError(f"rewards {names[column_of(name)]!r} and {name!r} have one name in "
                             "the log: give a function another")
    return weights


def weights_of(row, weights):
    """{name: weight} for a row of this category."""
    category = category_of(row)
    if category not in weights and "*" not in weights:
        raise ValueError(f"no mix for prompts of category {category!r}, and no '*'")
    return weights.get(category, weights.get("*"))


def must_be_mixed(rows, weights, reward):
    """The user's error where --reward has no mix for a row of this category."""
    for row in rows:
        try:
            weights_of(row, weights)
        except ValueError as e:
            fail(f"{reward}: {e}")


@torch.no_grad()
def score(images, rows, weights, judge=None):
    """Images uint8 (N,3,H,W) and N rows -> Scores.

    weights {category: {name: weight}}; "*" holds for rows of any other category. A reward runs only
    where its weight is not 0; elsewhere, and where it fails or is not finite, its value is NaN,
    never 0. judge: the run's, for rewards that ask one."""
    if len(images) != len(rows):
        raise ValueError(f"{len(images)} images, {len(rows)} prompts")
    names = list(dict.fromkeys(k for w in weights.values() for k, x in w.items() if x))
    rewards = [find(name) for name in names]
    mine = [weights_of(row, weights) for row in rows]
    W = torch.tensor([[float(w.get(k, 0)) for k in names] for w in mine])        # (N,K)
    out = Scores(torch.full_like(W, math.nan), W, [*map(column_of, names)])
    images = images.cpu()  # once, not once per reward
    for k, reward in enumerate(rewards):
        some = W[:, k].nonzero()[:, 0]
        if not len(some):
            continue
        inputs = [images[some], [rows[i] for i in some.tolist()]]
        if "judge" in signature(reward).parameters:
            asked = replace(judge or Judge(), heard=[])
            values = reward(*inputs, asked)
            out.answers[out.names[k]] = asked.heard
            out.error = asked.error or out.error
        else:
            values = reward(*inputs)
        values = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        if values.shape != (len(some),):
            fail(f"reward {names[k]!r} returned {tuple(values.shape)} for {len(some)} images: it "
                 "must return one number for each")
        out.values[some, k] = values
    out.values.masked_fill_(~out.values.isfinite(), math.nan)
    return out


def check_scored(scores, most, step, where):
    """Did the rewards, and the judges that they asked, say anything? -> columns of the log:
    reward_<name>, its mean over the images that have it; and, where above 0, failed_<name>, of the
    images it was to score the share it could not, and unparsed_<name>, of a judge's answers the
    share that says nothing usable. Over all ranks, which all call it; a share above `most` ends the
    run on each of them."""
    names = scores.names
    tried = scores.weights != 0                      # a failure gives no gradient, but counts
    failed = tried & scores.values.isnan()
    heard = [scores.answers.get(name, []) for name in names]
    unusable = [[a for a, value in its if a is not None and math.isnan(value)] for its in heard]
    silent = [bool(scores.error) and name in scores.answers for name in names]
    mine = torch.tensor([                                                        # (8,K)
        scores.values.double().nansum(0).tolist(), (~scores.values.isnan()).sum(0).tolist(),
        failed.sum(0).tolist(), tried.sum(0).tolist(), [*map(len, unusable)], [*map(len, heard)],
        silent, [stopping.is_set()] * len(names)], dtype=torch.float64)
    everywhere = torch.tensor(all_mean(mine.flatten().tolist()), dtype=torch.float64)
    total, had, failed, tried, unparsed, asked, silent, halt = everywhere.view_as(mine)
    mean, failed, unparsed = (a / b.clamp(min=1e-9) for a, b in (
        (total, had), (failed, tried), (unparsed, asked)))
    most = 1 if halt.any() else most                 # a run that stops waits for no answers
    examples = [f" The judge said, for instance, {its[0][:80]!r}" if its else ""
                for its in unusable]
    k = int(unparsed.argmax())
    if unparsed[k] > most:                           # on every rank, so all stop
        fail(f"reward {names[k]!r}: {unparsed[k]:.0%} of the judge's answers of update {step + 1} "
             f"say nothing usable, above --max-failed.{examples[k]}")
    k = int(failed.argmax())
    if failed[k] > most:
        why = f"the judge's endpoint is at fault. {scores.error or 'Another rank says how'}" \
            if silent[k] else f"does {where} hold what it reads?"
        fail(f"reward {names[k]!r} failed for {failed[k]:.0%} of the images of update {step + 1}, "
             f"above --max-failed: {why}{examples[k]}")
    columns = {f"reward_{name}": x for name, x, n in zip(names, mean.tolist(), had) if n}
    return columns | {f"{what}_{name}": x for what, share in (
        ("failed", failed), ("unparsed", unparsed)) for name, x in zip(names, share.tolist()) if x}


def held_out_score(scores):
    """-> dict(score=...), the weighted mean of the rewards that could be had, in which what weighs
    less than 0 counts against an image; {} without any"""
    W = scores.weights * ~scores.values.isnan()
    if not W.any():
        return {}
    return dict(score=((scores.values.nan_to_num() * W).sum() / W.abs().sum()).item())


# ---------------------------------------------------------------------------------------------
# Rows: what is trained on, and what is held out


def read_rows(path, weights, reward, photos, columns=""):
    """A file of prompts -> its rows; every error in it, in one line. weights, reward: of the run,
    which must have a mix for each row; photos: does the preset draw them?"""
    try:
        rows = read_prompts(path, columns)
    except FileNotFoundError as e:
        fail(f"{e}" if photos else f"{e}; the classroom's: python -m data.shapes.prepare data")
    except (OSError, ValueError) as e:
        fail(e)
    if not rows:
        fail(f"{path} holds no prompts")
    must_be_mixed(rows, weights, reward)
    for name in ("geneval", "geneval_strict"):
        mine = [row for row in rows if weights_of(row, weights).get(name)]
        if mine and not any(row.get("include") for row in mine):
            fail(f"{path}: no row has `include`, which the reward {name} reads: docs/data.md; or "
                 "give another --reward")
    say(f"{path}: {len(rows):,} prompts, the first: {rows[0]['prompt'][:60]!r}")
    return rows


def check_prompts(args):
    """The user's error where a preset for photos has the classroom's prompts, or the reverse."""
    photos = not args.preset.startswith("shapes")
    if args.prompts == type(args).prompts and photos:            # nobody named any
        fail(f"preset {args.preset!r} draws photos and needs --prompts of its own: eval.py "
             "--write-prompts geneval-train FILE writes some")
    if args.eval_prompts and not photos:
        fail("--eval-prompts is for photos: the classroom has held-out prompts of its own")


def read_prompts_of(args, weights, mix):
    """-> rows of grpo.py's --prompts and, of photos, held-out ones: of --eval-prompts, or of
    GenEval's own test where that is the reward. mix: --mix, read"""
    photos = not args.preset.startswith("shapes")
    read = partial(read_rows, weights=weights, reward=args.reward, photos=photos,
                   columns=args.columns)
    prompts = read(args.prompts)
    must_be_drawn(args, mix, prompts, args.prompts)
    if args.eval_prompts:
        held = read(args.eval_prompts)
        must_be_held_out(held, args.eval_prompts, prompts, args.prompts)
        return prompts, sixteen(held)
    if photos and {"geneval", "geneval_strict"} & weights.get("*", {}).keys():
        trained = {row["prompt"] for row in prompts}
        test = [json.loads(line) for line in geneval_prompts()]
        return prompts, sixteen([row for row in test if row["prompt"] not in trained])
    return prompts, []


def must_be_held_out(rows, file, trained, where, same=lambda row: row["prompt"]):
    """The user's error where one of a file's rows is, by `same`, among those trained on."""
    known = {same(row) for row in trained}
    if both := [row for row in rows if same(row) in known]:
        fail(f"{file}: {both[0]['prompt']!r} is in {where}, as {len(both)} of its {len(rows)} "
             "prompts are: what is trained is not held out")


def sixteen(rows):
    """At most so many of them, evenly spaced: of a file in the order of its tags, each tag that has
    a sixteenth of it."""
    n = min(16, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


def draw_while_judging(model, leaf, rows, weights, judge, times, window, keys, args, clock):
    """Steps 2 and 3 where an endpoint judges: it has the first prompts' images while the next are
    drawn, by the same policy. -> Trajectory, Scores of all"""
    paths, waiting, G = [], [], args.G
    B = len(rows) // G
    with ThreadPoolExecutor(1, initializer=use_gpu) as pool:
        for some in slices(B, math.ceil(B / 4)):             # four parts
            mine = slice(some.start * G, some.stop * G)
            paths.append(rollout(model, leaf.rows(some), times, window, keys[mine], args.eta,
                                 args.kind, args.shared_noise))
            clock.lap("rollout")
            images = model.to_images(paths[-1].x0).cpu()
            clock.lap("decode")
            waiting.append(pool.submit(score, images, rows[mine], weights, judge))
        return Trajectory.cat(paths), Scores.cat([job.result() for job in waiting])


def preview_pictures(model, args, rows, weights, judge, png):
    """Draws fixed prompts at fixed noise into `png` and scores those that are held out. rows: the
    prompts of a preset for photos; None: the classroom's benchmark. -> metrics"""
    draw = partial(model.draw, steps=args.eval_T, guidance=args.guidance)
    if rows is None:
        r = bench_shapes(draw, 1, 96, png)
        return dict(score=r["score"], extra=r["extra_rate"], kB=r["jpeg_kb"])
    images = draw([row["prompt"] for row in rows], range(len(rows))).cpu()
    grid(images, [row["prompt"] for row in rows], png)
    return held_out_score(score(images, rows, weights, judge)) if weights else {}


def preview_of(model, args, prompts, held, weights, judge, rank):
    """preview_pictures of held-out prompts or, of photos without any, of training ones, which have
    no score, and so it says. -> f(file for a picture) -> metrics"""
    photos = not args.preset.startswith("shapes")
    if rank == 0 and photos and not held:
        print("no held-out prompts: pictures are of training ones; --eval-prompts FILE names some")
    rows = (held or prompts[:16]) if photos else None
    return partial(preview_pictures, model, args, rows, weights if held else None, judge)


def bench_pictures(model, args, png):
    """The classroom's whole benchmark of drawing -> metrics, and a grid in `png`"""
    draw = partial(model.draw, steps=args.eval_T, guidance=args.guidance)
    return bench_shapes(draw, png=png)


def before_and_after(args, trained, out, bench):
    """bench(policy, args, png) -> metrics, of the policy as it was and as it is, on the same noise:
    results.json, a table, two pictures. Every rank calls it; rank 0 draws."""
    with trained.averaged():
        if this_rank():
            return
        model = trained.model
        base = Unified.from_preset(args.preset, args.init, seed=args.seed, **given_parts(args))
        base.to(model.device)
        results = {name: bench(policy, args, out / "samples" / f"{name}.png")
                   for name, policy in (("before", base), ("after", model))}
    show_table(results)
    write(out / "results.json", json.dumps(results, indent=1))
    write_page(out)


# ---------------------------------------------------------------------------------------------
# Benchmarks


def read_thresholds(text):
    """ "0.3,0.9" -> (0.3, 0.9); ValueError"""
    values = tuple(number(x) for x in text.split(",")) if text else ()
    if text and not (len(values) == 2 and all(inside(x, "[0, 1]") for x in values)):
        raise ValueError("must be two numbers in [0, 1], such as 0.3,0.9")
    return values


@dataclass
class Args:
    bench: str = flag("shapes", "which benchmark: {}", NAMES, group="What matters most")
    init: str = flag("data/shapes/sft", "a checkpoint; with --preset also the folder of a "
                     "diffusers DiT or peft LoRA, or none: empty", HUB)
    preset: str = flag("", "which model, by its name in common/presets.py; empty: as --init says",
                       PRESETS)
    out: str = flag("", "folder for results and images; empty: they are only printed")
    steps: int = flag(10, "ODE steps of a drawing, one DiT forward each", "[1, 1000]")
    solver: str = flag("", "of the ODE: {}, the last of second order; empty: the preset's", SOLVERS)
    guidance: float = flag(1.0, "weight of the prompt; 1: no guidance, half the forwards",
                           "[0, 100]")
    image_guidance: float = flag(1.0, "of edits, weight of the source; 1: none by it", "[0, 100]")
    n: int = flag(0, "pictures of each prompt; 0: as many as the benchmark asks for", "[0, 100]")
    seed: int = flag(0, "another seed draws other noise", "[0, 2**63)")

    bench_dir: str = flag("", "folder of the benchmark's official release; of geneval perhaps a "
                          "file of prompts of your own", FILE,
                          group="Official benchmarks")
    judge: str = flag("", "VLM that judges; empty: see rewards/shared.py")
    judge_url: str = flag("", "OpenAI-compatible address that answers for it; empty: it runs here")
    parallel: int = flag(16, "most questions at the address at once", "[1, 10000]")
    max_failed: float = flag(0.0, "share of questions that may stay without an answer", "[0, 1]")
    score_only: str = flag("", "a folder of anybody's pictures in the official layout: nothing is "
                           "drawn", FILE)
    detections: str = flag("", "of geneval, another detector's boxes, as results.jsonl has ours",
                           FILE)
    thresholds: str = flag("", "its least score, and that for counting, such as 0.3,0.9",
                           read_thresholds)
    table: tuple = flag((), "a folder of a run: all that are given are joined to one table beside "
                        "the papers' rows, as Markdown; may be given again", FILE)

    guidances: str = flag("", "of edits, several such as 1,3,5,7: their trade-off, as a picture",
                          read_guidances, group="More of the classroom's benchmarks")
    temperature: float = flag(1.0, "of drawing words, as in training; 0: the likeliest ones",
                              "0 or [0.01, 100]")
    limit: int = flag(64, "most tokens that a thought or an answer may have", "[1, 10000]")
    rounds: int = flag(1, "of shapes-reflect: most looks at a picture; a yes ends them", "[1, 100]")

    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the preset's own", HUB,
                    group="Weights in place of the preset's")
    dit: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)
    vae: str = flag("", "folder, or owner/repo/subfolder on the Hub; empty: the preset's own", HUB)


def check_args(args, bench, out):
    """Where flags do not go together: the user's errors, before anything is loaded or written."""
    about = bench.ABOUT
    if out and (out / "results.json").exists():
        fail(f"{out} holds the results of another run: choose another --out")
    if args.guidances and not (args.bench == "shapes-edit" and out):
        fail("--guidances draws the curve of --bench shapes-edit into --out, a folder")
    drawn_by = args.score_only or args.preset or args.init and read_about(args.init).get("preset")
    if not args.score_only and args.bench.startswith("shapes") and not (
            drawn_by or "shapes").startswith("shapes"):
        fail(f"--bench {args.bench} is of the classroom, and preset {drawn_by!r} draws photos: "
             "--bench geneval, or one of the others")
    if (args.n or 1) > 1 and about.layout and "{k}" not in about.layout and not about.grid:
        fail(f"--n {args.n}: the official layout of {args.bench} has one picture of each prompt")
    if hasattr(bench, "run") and args.score_only:
        fail(f"--score-only: {args.bench} has no pictures in an official layout")
    if not hasattr(bench, "run") and not out:
        fail(f"--bench {args.bench} needs --out, a folder for its images")
    if about.release and not args.bench_dir:
        fail(f"--bench {args.bench} needs --bench-dir, its official release: {about.release}")
    if args.bench_dir and not about.release and args.bench != "geneval":
        fail(f"--bench-dir: --bench {args.bench} reads none")
    if (args.detections or args.thresholds) and args.bench != "geneval":
        fail("--detections and --thresholds are of --bench geneval")
    if args.thresholds and not args.detections and (
            min(read_thresholds(args.thresholds)) < COCO_THRESHOLDS[0]):
        fail(f"--thresholds below {COCO_THRESHOLDS[0]} are for --detections: ours keeps no less")
    if args.detections and not args.score_only:
        fail("--detections is of pictures that are there: --score-only FOLDER")
    if not args.score_only and not args.init and not args.preset:
        fail("--init '' draws from the weights of --preset, which is missing; --score-only FOLDER "
             "scores pictures that are there")
    if args.judge_url:
        Judge(args.judge, args.judge_url)                        # says what is wrong with it
    elif not there(args.judge, HUB):
        fail(f"--judge {shown(args.judge)}: must be {HUB}; of an endpoint give --judge-url, too")
    if out:
        read_text(f"{'--out' if args.out else '--score-only'} {out}", out, can_hold)


def read_detections(args, shots):
    """Gives Shots what --detections has found in them."""
    found = {}
    for where, row, _ in all_records(args.detections):
        file, its = row.get("file"), row.get("detections")
        if not isinstance(file, str) or not isinstance(its, list) or not all(map(is_found, its)):
            fail(f"{where}: not {{file, detections: [{{class, score, box}}]}}")
        if odd := {thing["class"] for thing in its} - {*COCO, *SHAPES}:
            fail(f"{where}: {min(odd)!r} is none of GenEval's 80 names: COCO in rewards/prompts.py")
        if odd := {thing.get("color") for thing in its} - {None, *COLORS}:
            fail(f"{where}: color {min(map(str, odd))!r} is none of {', '.join(COLORS)}")
        found[file] = its
    for shot in shots:
        if shot.file not in found:
            fail(f"--detections {args.detections} has nothing of {shot.file}")
        shot.found = found[shot.file]


def is_found(thing):
    """Is this what a detector finds: a class, a score and a box?"""
    if not (isinstance(thing, dict) and isinstance(thing.get("class"), str)
            and type(thing.get("score")) in (int, float) and isinstance(thing.get("box"), list)
            and len(thing["box"]) == 4 and all(type(x) in (int, float) for x in thing["box"])):
        return False
    x0, y0, x1, y1 = thing["box"]
    return x0 < x1 and y0 < y1 and all(map(math.isfinite, thing["box"]))


def read_items(bench, args):
    """-> a benchmark's prompts, or the user's error where the release is not as they know it"""
    try:
        items = bench.items(args.bench_dir)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
        fail(f"--bench-dir {args.bench_dir} is no release of {args.bench} as it is known here: "
             f"{type(e).__name__}, {one_line(e)}")
    return items or fail(f"--bench-dir {args.bench_dir} holds nothing to draw")


def official(bench, args, out, tested, rank, world):
    """A benchmark with an official layout: draw, or take what is there; score; -> results"""
    about, n = bench.ABOUT, args.n or bench.ABOUT.n
    items, folder = None, Path(args.score_only or out)
    if tested or not hasattr(bench, "shots_in"):
        items = read_items(bench, args)
    if tested:
        draw_all(bench, items, n, tested, out, rank, world)
    if rank:                                             # one asks the judge, and writes
        return
    shots = shots_of(bench, items, n) if items else bench.shots_in(folder)
    judge = Judge(args.judge or MODELS["judge"], args.judge_url, tokens=about.tokens,
                  parallel=args.parallel, patience=10, system=shots[0].item.get("system", ""),
                  text_first=about.text_first)
    thresholds = read_thresholds(args.thresholds)
    for shot in shots:
        shot.item["thresholds"] = thresholds
    if args.detections:
        read_flag(args, "detections", lambda _: read_detections(args, shots))
    out.mkdir(parents=True, exist_ok=True)
    rows, counts = score_all(bench, shots, folder, judge, out / "answers.jsonl", args.max_failed)
    write(out / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if not any("score" in row or "correct" in row for row in rows):
        fail(f"no picture could be scored: {counts['unparsed']} of {counts['questions']} answers "
             f"say nothing usable; {out / 'answers.jsonl'} has them")
    contact_sheet(bench, shots, folder, rows, out / "sheet.png")
    asked = dict(judge=judge.name(), **counts) if about.judge else {}
    return dict(images=len(rows)) | asked | bench.table(rows) | (
        dict(thresholds=thresholds or COCO_THRESHOLDS) if args.bench == "geneval" else {})


def main():
    if sys.argv[1:2] == ["--write-prompts"]:
        return write_prompts(*sys.argv[2:])
    args = parse(Args, __doc__, more=f"Benchmarks:\n{listing()}")
    if args.table:
        return print(joined(args.table))
    bench, out = find_benchmark(args.bench), Path(args.out or args.score_only) if (
        args.out or args.score_only) else None
    check_args(args, bench, out)
    rank, world, device = setup()
    tested = None
    if not args.score_only:
        model = slim(Unified.load(args.init, args.preset, **given_parts(args)), device).to(device)
        tested = Tested(model, args)
        if out:
            out.mkdir(parents=True, exist_ok=True)
    if hasattr(bench, "run"):
        if rank:                                         # the classroom's are quick: rank 0 alone
            return
        results, shown_as = bench.run(tested, args, out)
    else:
        results = official(bench, args, out, tested, rank, world)
        if rank:
            return
        shown_as = {args.bench: results}
    show_table(shown_as)
    if "thresholds" in results:
        print("a detection counts above {:g}, for counting above {:g}".format(
            *results["thresholds"]))
    if out:
        about = asdict(args) if tested else dict(bench=args.bench, score_only=args.score_only)
        write(out / "results.json", json.dumps(about | results, indent=1))


if __name__ == "__main__":
    main()
