"""The classroom's benchmarks: held-out prompts, edits, riddles, second looks and questions."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common.read import UNREADABLE, arrays, jpeg_kb, read_image
from common.run import fail
from common.show import by_tag, grid, mean_and_error, show_answers, spread, word_table
from common.words import answer_of, spans, verdict
from data.shapes.judge import check, check_edit
from data.shapes.world import SIDE, render
PROMPTS = Path(__file__).parent / "prompts"


def geneval_table(rows, judged):
    """check()'s dicts, n for each of P rows -> metrics, x_se being the standard error of x, and
    which images are officially correct (P,n)."""
    right, partial, strict, extra = (
        np.array([[float(v[k]) for v in vs] for vs in judged])
        for k in ("correct", "partial", "strict", "extra"))                          # (P,n) each
    out = dict(images=right.size)

    def add(name, values, rows=rows):
        out[name], out[name + "_se"] = mean_and_error(values, rows)

    add("score", right)
    for tag, mine in by_tag(rows).items():
        add(tag, right[mine], [rows[i] for i in mine])
    add("partial", partial)
    add("strict", strict)
    add("extra_rate", np.float64(extra > 0))  # share of images with an object not asked for
    return out, right


def summary(rows, images):
    """As table, of images (P,n,64,64,3) drawn for P rows, with what pixels alone tell."""
    P, n = images.shape[:2]
    out, right = geneval_table(rows, [[check(x, r) for x in xs] for r, xs in zip(rows, images)])

    def add(name, values):
        out[name], out[name + "_se"] = mean_and_error(values, rows)

    if n > 1:  # RMS pixel distance, 0 ... 1, of all pairs of a row's images
        i, j = np.triu_indices(n, 1)
        flat = images.reshape(P, n, -1) / np.float32(255)
        add("diversity", np.stack([np.sqrt(((f[i] - f[j]) ** 2).mean(1)) for f in flat]))
    add("jpeg_kb", np.array([[jpeg_kb(x) for x in xs] for xs in images]))
    return out, right


def draw_rows(draw, rows, chosen, n, name=""):
    """n images for each rows[i], i in chosen -> numpy (P,n,64,64,3); draw: see bench_shapes."""
    todo = [(rows[i]["prompt"], 1000 * i + j) for i in chosen for j in range(n)]
    images = []
    for a in tqdm(range(0, len(todo), 64), name, unit="batch", disable=None):
        images.append(draw(*map(list, zip(*todo[a : a + 64]))).cpu())
    return arrays(torch.cat(images)).reshape(-1, n, SIDE, SIDE, 3)


def scene_image(scene):
    """-> uint8 (3,64,64)"""
    return torch.from_numpy(render(scene)).permute(2, 0, 1)


def source_picture(row, size):
    """A row's source, a file or a scene -> uint8 (3,size,size). As in grpo.py all pictures are
    square: others lose what stands out."""
    source = row["source"]
    try:
        image = (Image.fromarray(render(source)) if isinstance(source, list) else
                 read_image(row["folder"] / source))
    except (*UNREADABLE, LookupError, TypeError) as e:   # the last two: no scene of the classroom
        fail(f"{row['where']}: its source cannot be read ({e!r})")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def bench_shapes(draw, n_per_prompt=4, limit=None, png=None):
    """GenEval at classroom scale -> flat dict of metrics, with `unseen` for the held-out pairs.

    draw(prompts, seeds) -> uint8 (N,3,64,64).  An image's seed depends on its prompt's line and its
    number among n_per_prompt only, so a limited run draws some of the full run's very images.
    limit: at most so many images, equally many per tag, and no unseen split; n_per_prompt=1 then
    gives the smallest error.  png: a grid of four prompts per tag, right framed green."""
    results = {}
    for split in ["eval"] if limit else ["eval", "unseen"]:
        rows = [json.loads(x) for x in (PROMPTS / f"{split}.jsonl").read_text().splitlines()]
        k = limit // n_per_prompt // len(by_tag(rows)) if limit else len(rows)
        assert k, f"limit={limit} images do not reach every tag with {n_per_prompt} per prompt"
        chosen = spread(rows, k)
        images = draw_rows(draw, rows, chosen, n_per_prompt, split)
        rows = [rows[i] for i in chosen]
        out, right = summary(rows, images)
        results |= out if split == "eval" else {split: out}
        if png and split == "eval":
            show = spread(rows, 4)
            grid(images[show, 0], [rows[i]["prompt"] for i in show], png, right[show, 0] == 1)
    return results


def edit_table(rows, judged):
    """check_edit's dicts, n for each of P rows -> metrics over the kinds (a row's tag), x_se being
    the standard error of x. `both` is sqrt(mean success x mean preservation), not a mean of roots;
    its error is that of its linear part, for the two means correlate."""
    s, p = (np.array([[v[k] for v in vs] for vs in judged]) for k in ("success", "preservation"))
    units = [dict(tag=row["tag"], prompt=str(i)) for i, row in enumerate(rows)]   # each its own
    out = dict(images=s.size)
    for kind, mine in {"": range(len(rows)), **by_tag(rows)}.items():
        a, b, who = s[mine], p[mine], [units[i] for i in mine]
        (ms, es), (mp, ep) = mean_and_error(a, who), mean_and_error(b, who)
        both = math.sqrt(ms * mp)
        eb = mean_and_error((mp * a + ms * b) / (2 * both), who)[1] if both else 0.0
        for name, mean, error in ((kind or "success", ms, es), (f"{kind} preservation", mp, ep),
                                  (f"{kind} both", both, eb)):
            out[name.strip()], out[name.strip() + "_se"] = mean, error
    return out


def bench_edit(edit, n_per_row=1, limit=None, png=None, draw=None):
    """The classroom's held-out edits -> flat dict of metrics, see edit_table.

    edit(instructions, images, seeds) -> uint8 (N,3,64,64), images N lists of one uint8 (3,64,64). A
    seed depends on its row and its number among n_per_row only.  limit: at most so many images,
    equally many per kind.  png: four rows per kind, source and edited, right ones framed green.
    draw(prompts, seeds), if given, adds what two that do not edit score: `identity`, the source
    itself, and `redrawn`, the target's caption drawn from scratch."""
    rows = [json.loads(line) for line in (PROMPTS / "edit_eval.jsonl").read_text().splitlines()]
    rows = [dict(row, tag=row["kind"]) for row in rows]
    k = limit // n_per_row // len(by_tag(rows)) if limit else len(rows)
    assert k, f"limit={limit} images do not reach every kind with {n_per_row} per row"
    chosen, results = spread(rows, k), {}
    mine = [rows[i] for i in chosen]
    source = np.stack([render(row["source"]) for row in mine])                   # (P,64,64,3)
    todo = [(j, 1000 * i + m) for j, i in enumerate(chosen) for m in range(n_per_row)]
    painters = {"": edit, "identity": lambda says, x, seeds: torch.stack([own for own, in x]),
                "redrawn": draw}
    for name, painter in painters.items() if draw else [("", edit)]:
        images = []
        for a in tqdm(range(0, len(todo), 64), name or "edit", unit="batch", disable=None):
            now, seeds = zip(*todo[a : a + 64])
            if painter is draw:
                images.append(draw([mine[j]["target_meta"]["prompt"] for j in now], list(seeds)))
                continue
            seen = [[torch.from_numpy(source[j]).permute(2, 0, 1)] for j in now]
            images.append(painter([mine[j]["instruction"] for j in now], seen, list(seeds)))
        images = arrays(torch.cat([x.cpu() for x in images])).reshape(
            -1, n_per_row, SIDE, SIDE, 3)
        judged = [[check_edit(x, row) for x in xs] for row, xs in zip(mine, images)]
        out = edit_table(mine, judged)
        results |= {name: out} if name else out
        if png and not name:
            show = spread(mine, 4)
            pairs = np.stack([source[show], images[show, 0]], 1).reshape(-1, SIDE, SIDE, 3)
            right = [judged[i][0]["success"] * judged[i][0]["preservation"] == 1 for i in show]
            grid(pairs, [t for i in show for t in (mine[i]["instruction"], "")], png,
                 [f for r in right for f in (None, r)])
    return results


# ---------------------------------------------------------------------------------------------
# Words: thoughts before a drawing, second looks at one, answers to questions.


def in_batches(f, *columns):
    """f of 64 rows at a time of columns of equal length -> its answers, put together."""
    parts = [f(*(c[a : a + 64] for c in columns)) for a in tqdm(
        range(0, len(columns[0]), 64), unit="batch", disable=None)]
    return [row for part in parts for row in part]


def choose(name, n, limit):
    """Rows of a prompt file, at most `limit` // n of them, equally many per tag, and the seeds of n
    samples of each, which depend on a row's line and a sample's number only."""
    rows = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]
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
    return dict(images=len(said)) | word_table(
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
    out = dict(images=len(looks)) | word_table(
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
    out = dict(answers=len(said)) | word_table(rows, accuracy=right)
    right = right.reshape(len(rows), -1)
    for tag, mine in by_tag(rows).items():
        out |= word_table([rows[i] for i in mine], **{tag: right[mine]})
    return out | word_table(rows, words=[len(t.split()) for t in said])
