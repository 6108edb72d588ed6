"""What the classroom's VLM is asked and answers: captions, thoughts, critiques, questions; and how
well a policy does at that, by benchmark.
"""


import numpy as np
import torch
from tqdm import tqdm

from common.layouts import all_records
from common.read import arrays
from common.show import by_tag, grid, show_answers, spread, word_table
from common.words import answer_of, spans, verdict
from data.shapes.bench import PROMPTS, scene_image
from data.shapes.captions import (article, holds, mistaken, phrase, plural, sample_meta,
                                  scene_for)
from data.shapes.edits import held
from data.shapes.judge import check
from data.shapes.world import (COLORS, MIXES, NUMBERS, RELATIONS, SHAPES, SIDE, SIDES,
                               UNSEEN_COUNT, UNSEEN_PAIRS, VERSION, box, named, relation)

IMAGE = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"  # 64 px: 4x4 merged patches
DRAW = "Generate an image: {}"
THINK = "Think, then generate an image: {}"
SHOWS = IMAGE + "Does the image show {}?"
MATCH = IMAGE + "Does the image match the prompt: {}?"
WHICH = IMAGE + IMAGE + "Which image shows {}?"
THINK_ERROR = 0.5  # of riddles, the share whose answer is wrong


def caption(scene):
    """All that a scene shows, from left to right: one right answer, so it is learned sooner."""
    if "text" in scene[0]:
        return f'a sign "{scene[0]["text"]}"'
    names = [article(named(t)) for t in sorted(scene, key=lambda t: 2 * t["x"] + t["size"])]
    shapes = {t["shape"] for t in scene}
    if len(scene) > 1 and len(shapes) == 1:
        return plural(len(scene), *shapes)
    return (" and " if len(scene) == 2 else ", ").join(names)


def picture(meta, rng, right):
    """A scene that shows meta or, half of them narrowly, does not."""
    while True:
        other = meta
        if not right:
            other = mistaken(meta, rng) if rng.random() < 0.5 else sample_meta(meta["tag"], rng)
        scene = scene_for(other, rng)
        if holds(meta, scene) == right:
            return scene


def think(meta, rng):
    """Reasoning and refined prompt, and the metadata that these words describe.  Riddles come out
    wrong at the rate of THINK_ERROR: RL has work to do."""
    if meta["tag"] != "reason":
        return f"<think>draw {phrase(meta)}</think><answer>{meta['prompt']}</answer>", meta
    told = meta
    if rng.random() < THINK_ERROR:
        told = dict(mistaken(meta, rng), reasoning=sample_meta("reason", rng)["reasoning"])
    return f"<think>{told['reasoning']}</think><answer>a photo of {phrase(told)}</answer>", told


def critique(scene, right):
    """What is said of a picture that was to match a prompt."""
    return "yes" if right else f"no, the image shows {caption(scene)}"


def split_picture(meta, rng, right, test=False):
    """picture on one side of the split of scenes; None: the few that show so little may all be on
    the other."""
    scenes = (picture(meta, rng, right) for _ in range(500))
    return next((scene for scene in scenes if held(scene) == test), None)


PICTURE_KINDS = ["exists", "color", "count", "relation", "caption"]


def picture_question(kind, rng, test=False):
    """A question about a picture that has one short answer, in words that the VLM was taught, but
    for "one" as a count; yes and no come equally often. -> tag, question, answer, scene"""
    yes = rng.random() < 0.5
    answer = "yes" if yes else "no"
    while True:
        tag = dict(relation="position", count=rng.choice(["single_object"] + ["counting"] * 3))
        scene = scene_for(sample_meta(tag.get(kind, "scene"), rng), rng)
        places = {2 * t["x"] + t["size"] for t in scene}  # one above the other: no left to right
        if held(scene) == test and (kind != "caption" or len(places) == len(scene)):
            break
    t, shapes = rng.choice(scene), {t["shape"] for t in scene}
    absent = rng.choice([s for s in SHAPES if s not in shapes])
    if kind == "exists":
        ask = f"Is there {article(t['shape'] if yes else absent)}?"
    elif kind == "color":
        color = t["color"] if yes else rng.choice([c for c in COLORS if c != t["color"]])
        ask = f"Is there {article(named(dict(t, color=color)))}?"
    elif kind == "count":
        shape = t["shape"] if rng.random() < 0.8 else absent
        ask = f"How many {plural(2, shape).split()[1]} are there?"
        answer = NUMBERS[sum(t["shape"] == shape for t in scene)]
    elif kind == "relation":
        b, a = scene
        true = relation(box(a), box(b))
        rel = rng.choice([r for r in RELATIONS if (r in true) == yes])
        what = f"{article(a['shape'])} {rel} {article(b['shape'])}"
        ask = SHOWS.removeprefix(IMAGE).format(what)
    else:
        ask, answer = "Describe the image.", f"a photo of {caption(scene)}"
    return dict(tag=kind, question=ask, answer=answer, scene=scene)


def text_question(rng):
    """A riddle, also of kinds that the VLM was never taught: sums, colors in the other order.
    -> tag, question, answer: the refined prompt"""
    tag, shape = rng.choice(["sides", "sum", "mixed", "and"]), rng.choice(SHAPES)
    if tag in ("sides", "sum"):
        of, n = rng.choice([(f"{article(s)} has sides", n) for s, n in SIDES.items()])
        if tag == "sum":
            a, b = rng.choice([(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (3, 1)])
            of, n = f"{NUMBERS[a]} and {NUMBERS[b]}", a + b
        ask, answer = f"as many {plural(2, shape).split()[1]} as {of}", plural(n, shape)
        fine = (shape, n) != UNSEEN_COUNT
    else:
        c = rng.choice(list(MIXES))
        x, y = rng.sample(MIXES[c], 2)
        by = "mixed with" if tag == "mixed" else "and"
        ask, answer = f"{article(shape)} in the color of {x} {by} {y}", article(f"{c} {shape}")
        fine = (c, shape) not in UNSEEN_PAIRS
    if not fine:
        return text_question(rng)
    return dict(tag=tag, question=THINK.format(f"a photo of {ask}"), answer=f"a photo of {answer}")


# ---------------------------------------------------------------------------------------------
# Benchmarks: thoughts before a drawing, second looks at one, answers to questions.

def in_batches(f, *columns):
    """f of 64 rows at a time of columns of equal length -> its answers, put together."""
    parts = [f(*(c[a : a + 64] for c in columns)) for a in tqdm(
        range(0, len(columns[0]), 64), unit="batch", disable=None)]
    return [row for part in parts for row in part]


def choose(name, n, limit):
    """Rows of a prompt file, at most `limit` // n of them, equally many per tag, and the seeds of n
    samples of each, which depend on a row's line and a sample's number only."""
    rows = [row for _, row, _ in all_records(PROMPTS / f"{name}.jsonl")]
    k = limit // n // len(by_tag(rows)) if limit else len(rows)
    assert k, f"limit={limit} does not reach every tag with {n} samples of a row"
    chosen = spread(rows, k)
    return [rows[i] for i in chosen], [1000 * i + j for i in chosen for j in range(n)]


def bench_think(draw, think, n_per_prompt=4, limit=None, png=None):
    """The held-out riddles, drawn from as they stand (raw) and after reasoning -> flat dict.

    draw(prompts, seeds) -> uint8 (N,3,64,64); think -> the same, and the Words that were thought.
    raw, score  share of pictures that show what the riddle means, by GenEval's rule
    answer      share of thoughts that end in the right prompt, words for words
    format      share that think and answer in their tags, and do nothing else
    words       of a thought
    png: riddles drawn both ways, what was thought below, right ones framed green."""
    rows, seeds = choose("reason", n_per_prompt, limit)
    rows_n = [row for row in rows for _ in range(n_per_prompt)]
    prompts = [row["prompt"] for row in rows_n]
    plain = in_batches(draw, prompts, seeds)

    def told(prompts, seeds):
        images, words = think(prompts, seeds)
        return zip(images, words.texts)
    images, said = zip(*in_batches(told, prompts, seeds))
    drawn = [arrays(torch.stack(list(x)).cpu()) for x in (plain, images)]
    raw, right = ([check(x, row)["correct"] for x, row in zip(xs, rows_n)] for xs in drawn)
    if png:
        show = [i * n_per_prompt for i in spread(rows, 16)]
        grid(np.stack([drawn[0][show], drawn[1][show]], 1).reshape(-1, SIDE, SIDE, 3),
             [t for i in show for t in (prompts[i], said[i])], png,
             [f[i] for i in show for f in (raw, right)])
    return dict(world=VERSION, images=len(said)) | word_table(
        rows, raw=raw, score=right, format=[spans(t)["ok"] for t in said],
        answer=[answer_of(t) == row["answer"] for t, row in zip(said, rows_n)],
        words=[len(t.split()) for t in said])


def bench_reflect(reflect, n_per_row=1, limit=None, png=None, name="reflect"):
    """Held-out first pictures, half of them right, are judged and drawn again -> flat dict; with
    `known`, unless there is a limit: the same of pictures of prompts that RL knows.

    reflect(prompts, images, seeds) -> the last pictures, uint8 (N,3,64,64), and N lists of what was
    said in each round; images uint8 (N,3,64,64). limit: at most so many first pictures.
    accuracy   share of first verdicts that are right; of those on wrong pictures: caught, on right
               ones: spared; then by tag
    corrected  share of the wrong first pictures whose last picture is right, by GenEval's rule
    damaged    share of the right ones whose last picture is wrong
    score      share of last pictures that are right; one half is where it starts
    format     share of first critiques that say yes, or no and why
    words      of a first critique
    png: first and last, the prompt and what was said below, right ones framed green."""
    rows, seeds = choose(name, 2 * n_per_row, limit)
    looks = [(row, side) for row in rows for side in ("wrong", "right") for _ in range(n_per_row)]
    prompts = [row["prompt"] for row, _ in looks]
    firsts = torch.stack([scene_image(row[side]) for row, side in looks])        # (N,3,64,64)
    last, said = zip(*in_batches(lambda *x: zip(*reflect(*x)), prompts, firsts, seeds))
    last = arrays(torch.stack(last).cpu())
    good = np.array([check(x, row)["correct"] for x, (row, _) in zip(last, looks)])
    truth = np.array([side == "right" for _, side in looks])
    yes, form = zip(*[verdict(words[0]) for words in said])
    told = np.array([y is t for y, t in zip(yes, truth.tolist())])               # neither is wrong
    if png:
        show = [j for i in spread(rows, 2) for j in (2 * i * n_per_row, (2 * i + 1) * n_per_row)]
        grid(np.stack([arrays(firsts[show]), last[show]], 1).reshape(-1, SIDE, SIDE, 3),
             [t for i in show for t in (prompts[i], " / ".join(said[i]))], png,
             [f[i] for i in show for f in (truth, good)])
    out = dict(world=VERSION, images=len(looks)) | word_table(
        rows, accuracy=told, caught=told[~truth], spared=told[truth], corrected=good[~truth],
        damaged=~good[truth], score=good, format=form, words=[len(t[0].split()) for t in said])
    told = told.reshape(len(rows), -1)
    for tag, mine in by_tag(rows).items():
        out |= word_table([rows[i] for i in mine], **{tag: told[mine]})
    if name == "reflect" and not limit:
        out["known"] = bench_reflect(reflect, n_per_row, name="reflect_known")
    return out


def bench_answer(answer, name="vqa", n_per_row=1, limit=None, png=None):
    """Held-out questions, about pictures (vqa) or not (textqa) -> flat dict.

    answer(questions, images, seeds) -> N texts; images: N lists of one uint8 (3,64,64), or None.
    accuracy: mean over kinds of the share of right answers; then by kind. words: of an answer.
    png: pictures, question and answer below, right ones framed green; of textqa a table, .md."""
    rows, seeds = choose(name, n_per_row, limit)
    rows = [dict(row, prompt=str(i)) for i, row in enumerate(rows)]              # each its own
    looks = [row for row in rows for _ in range(n_per_row)]
    questions = [row["question"] for row in looks]
    if name == "vqa":
        images = [[scene_image(row["scene"])] for row in looks]
        said = in_batches(answer, questions, images, seeds)
    else:
        said = in_batches(lambda q, s: answer(q, None, s), questions, seeds)
    right = np.array([answer_of(t) == row["answer"].lower() for t, row in zip(said, looks)])
    show = [i * n_per_row for i in spread(rows, 8)]
    if png and name == "textqa":
        show_answers(*([of[i] for i in show] for of in (questions, said, right)), png)
    elif png:
        grid(torch.stack([images[i][0] for i in show]),
             [f"{questions[i]} {said[i]}" for i in show], png, right[show])
    out = dict(world=VERSION, answers=len(said)) | word_table(rows, accuracy=right)
    right = right.reshape(len(rows), -1)
    for tag, mine in by_tag(rows).items():
        out |= word_table([rows[i] for i in mine], **{tag: right[mine]})
    return out | word_table(rows, words=[len(t.split()) for t in said])
