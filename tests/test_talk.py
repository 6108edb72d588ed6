"""Thoughts, critiques and answers: the data that teach them, the cold starts, the benches."""

import json
import random
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import collect, complaint
from test_edit import mixed
from tiny import apart, same

from common.flow import condition, count_tokens, lm_loss
import common.layouts as read_py
import data.shapes.talk as talk_py
import data.shapes.world as world_py
import data.shapes.bench as bench_py
import data.shapes.prepare as prepare_py
import eval as eval_py
from benchmarks import find
import sample
import data.shapes.looks as looks_py
import sft
from common.presets import PRESETS, Config
from common.words import spell
from data.shapes.talk import bench_answer, bench_reflect, bench_think
from data.shapes.world import render

TEXTS = ["a photo of a ring", "a photo of two stars", "a photo of a red cross"]
SAID = ["<think>draw a ring</think><answer>a photo of a ring</answer>", "no", "yes"]


@pytest.fixture(scope="module")
def cfg(parts):
    return Config(**json.loads((parts / "config.json").read_text()))


@pytest.fixture(scope="module")
def model(parts, cfg):
    return tiny.build(cfg, init=parts / "sft")


def folder_of(folder, form, n=8):
    """Row i: files of grey 20 i + 5, in the order of FORMS darker by 1; texts `prompt i`, ..."""
    folder.mkdir(exist_ok=True)
    files, texts = read_py.FORMS[form]
    rows = []
    for i in range(n):
        rows.append({k: f"{k} {i}" for k in texts})
        for j, k in enumerate(files):
            rows[-1][k] = f"{k}{i}.png"
            Image.new("RGB", (64, 64), (20 * i + 5 - j,) * 3).save(folder / rows[-1][k])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


# --- data ---


@pytest.mark.parametrize("form", ["cot", "reflect"])
def test_folders_and_shards_of_words(tmp_path, monkeypatch, form):
    word = read_py.FORMS[form][1][1]
    for images, prompts, *refs, words in collect(folder_of(tmp_path / "a", form), 9, form=form):
        for b, (image, text) in enumerate(zip(images, words)):
            i = int(text.removeprefix(f"{word} "))
            assert prompts[b] == f"prompt {i}"
            assert (image == 20 * i + 5 - len(refs)).all()       # the refined one is drawn
            assert not refs or len(refs[0][b]) == 1 and (refs[0][b][0] == 20 * i + 5).all()
    monkeypatch.setattr(prepare_py, "PER_SHARD", 6)
    (tmp_path / "b").mkdir()
    make = dict(cot=prepare_py.cot_example, reflect=prepare_py.reflect_example)[form]
    prepare_py.write_shard(tmp_path / "b/0.tar", "x", make)
    rng = random.Random("x")
    truth = [make(rng) for _ in range(6)]
    known = {row["json"][word] + row["json"]["prompt"]: row for row in truth}
    seen = set()
    for images, prompts, *refs, words in collect(tmp_path / "b", 6, form=form):
        for b, (image, prompt, text) in enumerate(zip(images, prompts, words)):
            row = known[text + prompt]
            seen.add(text + prompt)
            drawn = render(row["png" if form == "cot" else "refined.png"])
            assert np.array_equal(image.permute(1, 2, 0), drawn)
            assert not refs or np.array_equal(refs[0][b][0].permute(1, 2, 0),
                                              render(row["image.png"]))
    assert seen == set(known)


def test_words_that_cannot_be_used(tmp_path, capsys):
    for form, wants in (("cot", "reasoning"), ("reflect", "critique")):
        folder = folder_of(tmp_path / form, form, 12)
        rows = (folder / "metadata.jsonl").read_text().splitlines()
        lacks = json.loads(rows[1])
        del lacks[read_py.FORMS[form][1][1]]
        (folder / "metadata.jsonl").write_text(json.dumps(lacks) + "\n")
        assert f"line 1: no {wants}" in complaint(lambda: collect(folder, 1, form=form))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        file = json.loads(rows[3])[read_py.FORMS[form][0][0]]
        (folder / file).write_text("no image")
        texts = [t for *_, words in collect(folder, 12, form=form) for t in words]
        assert len(set(texts)) == 11 and not any(t.endswith(" 3") for t in texts)
        assert "unreadable: " in capsys.readouterr().err
    prepare_py.write_shard(tmp_path / "0.tar", "x", lambda rng: dict(png=[], json=dict(prompt="a")))
    assert "0.tar, 000000: no reasoning" in complaint(lambda: collect(tmp_path, 1, form="cot"))


def test_shares_of_three_tasks(tmp_path, cfg):
    args = Namespace(data=folder_of(tmp_path / "t2i", "t2i"), seed=3, task="reflect", share=0.3,
                     columns="", workers=0,
                     edits=folder_of(tmp_path / "edit", "edit"), edit_share=0.2,
                     tuples=folder_of(tmp_path / "reflect", "reflect"))

    run = partial(mixed, args, cfg)

    def kind(row):
        return (row[2] is not None, row[3] is not None)
    rows = run(300)
    for at, share in (((False, False), 0.5), ((True, False), 0.2), ((True, True), 0.3)):
        n = sum(kind(row) == at for row in rows)
        assert abs(n / 300 - share) < 3 * (share * (1 - share) / 300) ** 0.5
    half = Namespace(start=0, position={})
    run(41, trained=half)
    for a, b in zip(run(9, trained=half), rows[41:]):      # a run that resumes
        assert torch.equal(a[0], b[0]) and a[1] == b[1] and a[3] == b[3]
    args.task, args.tuples = "cot", folder_of(tmp_path / "cot", "cot")
    assert {kind(row) for row in run(60)} == {(False, False), (True, False), (False, True)}


# --- cold starts ---


def test_what_a_batch_tells_the_dit(model):
    """Rows are told what they would be alone; who is withheld the prompt is a null in all."""
    looks = [[p] for p in tiny.pictures((64, 64), (64, 64), (64, 64))]
    for refs in (None, looks):
        def told(prompts, words=SAID, rows=refs):
            return condition(model, prompts, rows, words)

        def alone(b, prompt, words=SAID):
            return condition(model, [prompt], refs and [refs[b]], words and [words[b]])
        full = told([TEXTS[0], None, TEXTS[2]])
        null = model.null(3, refs, "critique" if refs else "t2i")     # as draw_reflecting's
        for b, cond in ((0, alone(0, TEXTS[0])), (1, null.rows([1])), (2, alone(2, TEXTS[2]))):
            L = cond.ctx.shape[1] if cond.mask is None else int(cond.mask.sum())
            same(full.ctx[b, :L], cond.ctx[0, :L])
            assert full.mask is None or int(full.mask[b].sum()) == L
        other = told(TEXTS, SAID[::-1])
        assert apart(told(TEXTS).rows([0]).ctx, other.rows([0]).ctx)       # words are heard
        assert (full.refs is None) == (refs is None)
    plain = condition(model, TEXTS)
    same(plain.ctx, model.encode(TEXTS).ctx)


def play(parts, tmp_path, out, task, *flags):
    with pytest.MonkeyPatch.context() as m:
        for name in ("bench_think", "bench_reflect"):
            bench = getattr(talk_py, name)
            some = (lambda a, b, n=1, f=bench: f(a, b, 1, 2)) if name == "bench_think" else (
                lambda a, f=bench: f(a, 1, 12))
            m.setattr(looks_py, name, some)
        return tiny.play(parts, tmp_path / out, "--data", folder_of(tmp_path / "t2i", "t2i"),
                         "--tuples", folder_of(tmp_path / task, task), "--task", task, "--batch", 4,
                         *flags, main=sft.main)


@pytest.mark.parametrize("task", ["cot", "reflect"])
def test_cold_start(parts, tmp_path, task):
    """The words' pictures are learned by bridge and DiT; of the language model nothing is saved,
    for nothing was learned; resuming changes nothing."""
    flags = ["--steps", 16, "--eval-every", 8, "--lr", 3e-3, "--warmup", 1, "--share", 0.7]
    rows = play(parts, tmp_path, "a", task, *flags)
    losses = [r[f"{task}_loss"] for r in rows if f"{task}_loss" in r]
    assert len(losses) + sum("loss" in r for r in rows) == 16 and 6 < len(losses) < 16
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert ("cot_score" if task == "cot" else "corrected") in rows[-1]
    assert {p.stem for p in (tmp_path / "a/samples").iterdir()} == {
        f"{name}_{step:05d}" for name in ("step", task) for step in (8, 16)}
    with tiny.killed_at(sft, "train_times", 11):
        play(parts, tmp_path, "b", task, *flags)
    play(parts, tmp_path, "b", task, *flags, "--resume")
    a, b = (load_file(tmp_path / n / "ckpt/model.safetensors") for n in "ab")
    assert {k.split(".")[0] for k in a} == {"bridge", "dit"}
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_loss_of_words(parts, tmp_path, model):
    """--lm-loss is what a language model's loss is; with it, and only then, it learns."""
    loss = lm_loss(model, TEXTS, None, SAID)
    words = spell(model, SAID)
    logp = model.text_logp(TEXTS, None, words, "think")
    same(loss, -logp.sum())
    assert count_tokens(model, TEXTS, SAID, 1) == words.mask.sum()
    alone = lm_loss(model, TEXTS[:1], None, SAID[:1])
    same(lm_loss(model, [TEXTS[0], None, None], None, SAID), alone)       # withheld: no word of it
    rows = play(parts, tmp_path, "a", "reflect", "--steps", 2, "--lm-loss", 0.5, "--share", 1.0)
    assert len(rows) == 2
    kept = load_file(tmp_path / "a/ckpt/model.safetensors")
    assert {k.split(".")[0] for k in kept} == {"bridge", "dit", "vlm"}
    was = model.vlm.state_dict()
    moved = {k for k, v in kept.items() if k.startswith("vlm.")
             and not torch.equal(v, was[k.removeprefix("vlm.")])}
    assert moved and not any("visual" in k for k in moved)               # its eye stays


def test_cold_starts_refuse(parts, tmp_path):
    both = ["--edits", tmp_path, "--share", 0.6]
    for flags, words in ((["--task", "think"], "there are: flow, cot, reflect"),
                         (["--task", "cot", "--share", 1.2], "--share 1.2: must be a number in"),
                         (["--task", "cot", *both], "together at most 1"),
                         (["--lm-loss", 1.0], "belong to --task cot or reflect"),
                         (["--task", "reflect", "--refs", "none"], "unknown --refs 'none'"),
                         (["--task", "cot", "--tuples", tmp_path / "none"], "must be a file")):
        data = folder_of(tmp_path / "t2i", "t2i")
        assert words in complaint(lambda: tiny.play(
            parts, tmp_path / "x", "--data", data, *flags, main=sft.main))
        assert not (tmp_path / "x").exists()
    assert "its own --tuples" in complaint(lambda: tiny.play(
        parts, tmp_path / "x", "--preset", "deepgen", "--task", "cot", main=sft.main))


# --- benches ---


def torch_image(scene):
    return torch.from_numpy(render(scene)).permute(2, 0, 1)


def test_bench_of_thoughts(tmp_path):
    """Right words and right pictures score 1; the pictures are judged, not the words."""
    rng = random.Random(0)
    rows = {r["prompt"]: r for r in eval_py.read_prompts(bench_py.PROMPTS / "reason.jsonl")}

    def paint(prompts, seeds, right=True):
        return torch.stack([torch_image(talk_py.picture(rows[p], rng, right)) for p in prompts])

    def think(prompts, seeds, sound=True):
        texts = [f"<think>{rows[p]['reasoning']}</think><answer>{rows[p]['answer']}</answer>"
                 if sound else f"<think>{p}" for p in prompts]
        return paint(prompts, seeds, sound), Namespace(texts=texts)
    r = bench_think(lambda p, s: paint(p, s, False), think, 2, png=tmp_path / "a.png")
    assert (r["raw"], r["score"], r["answer"], r["format"], r["images"]) == (0, 1, 1, 1, 120)
    assert 5 < r["words"] < 15 and Image.open(tmp_path / "a.png").width > 1000
    r = bench_think(paint, lambda p, s: think(p, s, False), 1, 10)
    assert (r["raw"], r["score"], r["answer"], r["format"], r["images"]) == (1, 0, 0, 0, 10)


def test_bench_of_second_looks(tmp_path):
    rng = random.Random(0)
    rows = [json.loads(s) for name in ("reflect", "reflect_known")
            for s in open(bench_py.PROMPTS / f"{name}.jsonl")]
    known = {(r["prompt"], render(r[k]).tobytes()): (r, k)
             for r in rows for k in ("right", "wrong")}

    def looker(says, paint):
        def reflect(prompts, images, seeds):
            which = [known[p, x.permute(1, 2, 0).contiguous().numpy().tobytes()]
                     for p, x in zip(prompts, images)]
            return torch.stack([paint(r, k, x) for (r, k), x in zip(which, images)]), [
                [says(k)] for _, k in which]
        return reflect
    honest = looker(lambda k: "yes" if k == "right" else "no, the image shows a ring",
                    lambda r, k, x: torch_image(talk_py.picture(r, rng, True)))
    r = bench_reflect(honest, png=tmp_path / "a.png")
    assert r["images"] == 360 and all(r[k] == 1 for k in (
        "accuracy", "caught", "spared", "corrected", "score", "format", *world_py.TAGS))
    assert r["known"]["images"] == 300 and r["known"]["accuracy"] == r["known"]["corrected"] == 1
    assert r["damaged"] == 0 and Image.open(tmp_path / "a.png").width > 1000
    r = bench_reflect(looker(lambda k: "yes", lambda r, k, x: x), 1, 96)
    assert (r["images"], r["accuracy"], r["caught"], r["spared"]) == (96, 0.5, 0, 1)
    assert (r["corrected"], r["damaged"], r["score"]) == (0, 0, 0.5)
    r = bench_reflect(looker(lambda k: "maybe", lambda r, k, x: 0 * x), 1, 12)
    assert (r["accuracy"], r["format"], r["damaged"], r["score"]) == (0, 0, 1, 0)


@pytest.mark.parametrize("name", ["vqa", "textqa"])
def test_bench_of_answers(tmp_path, name):
    rows = [json.loads(s) for s in open(bench_py.PROMPTS / f"{name}.jsonl")]

    def oracle(questions, images, seeds, form="{}"):
        assert (images is None) == (name == "textqa")
        return [form.format(rows[s // 1000]["answer"]) for s in seeds]
    png = tmp_path / "a.png" if name == "vqa" else None
    r = bench_answer(oracle, name, png=png)
    kinds = {row["tag"] for row in rows}
    assert r["accuracy"] == 1 and all(r[k] == 1 for k in kinds) and r["answers"] == len(rows)
    assert png is None or Image.open(png).width > 1000
    form = "<think>a</think><answer> {}. </answer>"
    assert bench_answer(lambda q, x, s: oracle(q, x, s, form), name, 1, 20)["accuracy"] == 1
    assert bench_answer(lambda *x: oracle(*x, form="{} or so"), name, 1, 20)["accuracy"] == 0
    r = bench_answer(lambda q, x, s: ["Yes"] * len(q), name, 2)
    assert r["answers"] == 2 * len(rows)
    assert 0.1 < r["accuracy"] < 0.4 if name == "vqa" else r["accuracy"] == 0


@pytest.mark.parametrize("bench", ["shapes-think", "shapes-reflect", "shapes-answer"])
def test_benches_from_the_shell(parts, cfg, tmp_path, monkeypatch, bench, capsys):
    monkeypatch.setitem(PRESETS, "shapes", cfg)
    real = talk_py.choose
    monkeypatch.setattr(talk_py, "choose", lambda name, n, limit: real(name, 1 + (n == 2), 12))
    argv = ["eval.py", "--bench", bench, "--init", parts / "sft", "--limit", 3, "--steps", 2]
    monkeypatch.setattr(sys, "argv", list(map(str, [*argv, "--out", tmp_path / "o"])))
    if bench == "shapes-think":                             # n_per_prompt is its own
        monkeypatch.setattr(find("shapes-think"), "bench_think",
                            lambda d, t, n, png, f=bench_think: f(d, t, 1, 12, png))
    eval_py.main()
    kept = json.loads((tmp_path / "o/results.json").read_text())
    assert kept["bench"] == bench and len(list((tmp_path / "o").glob("*.png"))) == 1
    said = capsys.readouterr().out
    for k in dict(zip(("shapes-think", "shapes-reflect", "shapes-answer"),
                      (("raw", "score"), ("corrected", "damaged"), ("exists", "sum"))))[bench]:
        assert f"\n{k} " in said
    monkeypatch.setattr(sys, "argv", list(map(str, [*argv, "--temperature", -1])))
    assert "--temperature -1.0: must be" in complaint(eval_py.main)


# --- sample.py ---


def run(monkeypatch, cfg, *argv):
    monkeypatch.setitem(PRESETS, "shapes", cfg)
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    sample.main()


def test_sample_thinks_reflects_talks(parts, cfg, tmp_path, monkeypatch, capsys):
    out, own = tmp_path / "o.png", ["--init", parts / "sft", "--limit", 4, "--steps", 2]
    run(monkeypatch, cfg, "a star", "a ring", "--think", "--n", 3, "--out", out, *own)
    assert Image.open(out).width == 3 * 140
    run(monkeypatch, cfg, "a star", "--reflect", "--rounds", 2, "--n", 2, "--out", out, *own)
    assert Image.open(out).width == 3 * 140                  # the first, and two rounds
    Image.new("RGB", (70, 60), "red").save(tmp_path / "in.png")
    run(monkeypatch, cfg, "a star", "--reflect", "--image", tmp_path / "in.png", "--n", 1, "--out",
        out, *own)
    assert Image.open(out).width == 2 * 84                   # its shape is kept
    capsys.readouterr()
    asked = ["--answer", "Describe the image.", "--answer", "Is there a ring?", *own]
    run(monkeypatch, cfg, *asked)
    plain = capsys.readouterr().out
    run(monkeypatch, cfg, *asked, "--image", tmp_path / "in.png")
    seen = capsys.readouterr().out
    for said in (plain, seen):
        assert said.startswith("Describe the image.\n") and "\n\nIs there a ring?\n" in said
    assert plain != seen


def test_sample_takes_the_names_of_special_tokens(parts, cfg, tmp_path, monkeypatch, capsys):
    """As letters, wherever a user's words go."""
    out, own = tmp_path / "o.png", ["--init", parts / "sft", "--limit", 4, "--steps", 2, "--n", 1]
    Image.new("RGB", (70, 60), "red").save(tmp_path / "in.png")
    image, named = ["--image", tmp_path / "in.png"], "<|image_pad|> and <|im_end|>"
    for argv in ([named, "a star"], [named, "--think"], [named, "--reflect"],
                 [*image, "--edit", named, "--guidance", 2]):
        out.unlink(missing_ok=True)
        run(monkeypatch, cfg, *argv, "--out", out, *own)
        assert Image.open(out).width >= 84
    capsys.readouterr()
    run(monkeypatch, cfg, *image, "--answer", named, *own)
    assert capsys.readouterr().out.startswith(named + "\n")


def test_sample_refuses_words(parts, cfg, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    image, out = ["--image", tmp_path / "in.png"], tmp_path / "o.png"
    for argv, words in (
            (["--think"], "required: prompts"), (["--reflect", *image], "required: prompts"),
            (["x", "--think", "--reflect"], "one at a time"),
            (["x", "--think", "--trajectory"], "one at a time"),
            (["x", "--think", *image], "an edit is an --image"),
            (["x", "--answer", "y"], "--answer answers without drawing"),
            (["x", "--reflect", *image, *image], "one --image"),
            (["x", "--reflect", "--rounds", 0], "[1, 100]")):
        assert words in complaint(run, monkeypatch, cfg, *argv, "--init", parts / "sft", "--out",
                                  out)
        assert not out.exists()
    blind = replace(cfg, bridge="text", n_query=0)
    assert "has no language model" in complaint(
        run, monkeypatch, blind, "x", "--think", "--init", "", "--preset", "shapes", "--out", out)
