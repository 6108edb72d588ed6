"""Edits are judged against the truth: scenes that were rendered, drawn anew or seen by the VAE."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import complaint, files
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

import data.shapes.edits as edits_py
import data.shapes.captions as captions_py
import benchmarks.drawing as drawing_py
import eval as eval_py
from common.show import mean_and_error, show_table
from data.shapes.edits import (KINDS, bench_edit, check_edit, edit_scene, edit_table, sample_edit,
                               scored_edit)
from data.shapes.prepare import CHAT, HERE, to_tensor, tokenizer
from data.shapes.captions import scene_for
from data.shapes.world import VERSION, render
from eval import main, score
from labs import edit_reward
from rewards import find, scored
from rewards.edit import EditReward
from rewards.judge import Judge
from rewards.scored import read_scored, spearman
from rewards.shared import MODELS, must_score


def edits(kind, n, seed=0):
    rng = random.Random(f"{kind} {seed}")
    return [sample_edit(rng, kind) for _ in range(n)]


def torch_image(scene):
    return torch.from_numpy(render(scene)).permute(2, 0, 1)


def verdicts(images, rows):
    """-> success and preservation (N,) each"""
    v = [check_edit(x, e) for x, e in zip(images, rows, strict=True)]
    return (np.array([x[k] for x in v]) for k in ("success", "preservation"))


# ---------------------------------------------------------------------------------------------
# The checker


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_right_and_the_source_is_not(kind):
    rng, rows = random.Random(1), edits(kind, 100)
    s, p = verdicts([render(e["target"]) for e in rows], rows)
    assert s.all() and (p == 1).all()
    s, p = verdicts([render(e["source"]) for e in rows], rows)
    assert not s.any() and (p == 1).all()
    s, p = verdicts([render(scene_for(e["target_meta"], rng)) for e in rows], rows)
    assert s.mean() > 0.9 and p.mean() < 0.2                     # the right caption, other places


@pytest.mark.parametrize("kind", KINDS)
def test_the_vae_does_not_confuse_it(kind):
    vae, rows = AutoencoderKL.from_pretrained(HERE / "vae").eval(), edits(kind, 100, 1)
    with torch.no_grad():
        x = to_tensor([render(e["target"]) for e in rows])
        y = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample for b in x.split(50)])
    images = ((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    s, p = verdicts(images, rows)
    assert (s * p == 1).mean() >= 0.95


A = dict(shape="circle", color="red", size=16, x=0, y=0)
B = dict(shape="star", color="blue", size=20, x=32, y=32)
C = dict(shape="ring", color="green", size=24, x=0, y=32)


def row(kind, target, source=(A, B, C)):
    source, target = list(source), list(target)
    about = captions_py.make_meta("scene", [{"class": t["shape"], "count": 1, "color": t["color"]}
                                       for t in target], "-")
    if kind == "move":
        about = captions_py.make_meta("position", [{"class": "circle", "count": 1}, {
            "class": "star", "count": 1, "position": ["right of", 0]}], "-")
    return dict(kind=kind, source=source, target_meta=about, instruction="-")


YELLOW, SQUARE = dict(A, color="yellow"), dict(A, shape="square", color="pink")
EXTRA = dict(shape="heart", color="white", size=16, x=32, y=0)
BELOW, RIGHT = dict(B, x=0), dict(B, x=40, y=0)


@pytest.mark.parametrize("name, edit, shown, success, preservation", [
    ("recoloured", row("recolor", (YELLOW, B, C)), (YELLOW, B, C), 1, 1),
    ("to another colour", row("recolor", (YELLOW, B, C)), (dict(A, color="pink"), B, C), 0, 2 / 3),
    ("but elsewhere", row("recolor", (YELLOW, B, C)), (dict(YELLOW, x=32), B, C), 1, 2 / 3),
    ("but twice", row("recolor", (YELLOW, B, C)), (YELLOW, B, C, dict(YELLOW, x=32)), 0, 3 / 4),
    ("a second thing's colour too", row("recolor", (YELLOW, B, C)),
     (YELLOW, dict(B, color="pink"), C), 1, 2 / 3),
    ("a second thing 4 px away", row("recolor", (YELLOW, B, C)), (YELLOW, B, dict(C, x=4)), 1, 1),
    ("a second thing 8 px away", row("recolor", (YELLOW, B, C)),
     (YELLOW, B, dict(C, x=8)), 1, 2 / 3),
    ("a second thing much smaller", row("recolor", (YELLOW, B, C)),
     (YELLOW, B, dict(C, size=16)), 1, 2 / 3),
    ("a second thing lost", row("recolor", (YELLOW, B, C)), (YELLOW, B), 1, 2 / 3),
    ("and a thing from nowhere", row("recolor", (YELLOW, B, C)), (YELLOW, B, C, EXTRA), 1, 3 / 4),
    ("replaced", row("replace", (SQUARE, B, C)), (SQUARE, B, C), 1, 1),
    ("the old one stays", row("replace", (SQUARE, B, C)), (A, B, C, dict(SQUARE, x=32)), 0, 1),
    ("replaced elsewhere", row("replace", (SQUARE, B, C)), (dict(SQUARE, x=32), B, C), 1, 2 / 3),
    ("only gone", row("replace", (SQUARE, B, C)), (B, C), 0, 2 / 3),
    ("removed", row("remove", (B, C)), (B, C), 1, 1),
    ("all removed", row("remove", (B, C)), (), 1, 0),
    ("another one removed", row("remove", (B, C)), (A, B), 0, 1 / 2),
    ("added", row("add", (A, B, C, EXTRA)), (A, B, C, EXTRA), 1, 1),
    ("added in another colour", row("add", (A, B, C, EXTRA)),
     (A, B, C, dict(EXTRA, color="black")), 0, 1),
    ("added by replacing", row("add", (A, B, C, EXTRA)), (dict(EXTRA, x=0), B, C), 1, 2 / 3),
    ("moved", row("move", (), (A, BELOW)), (A, RIGHT), 1, 1),
    ("not moved", row("move", (), (A, BELOW)), (A, BELOW), 0, 1),
    ("moved elsewhere", row("move", (), (A, BELOW)), (dict(A, x=48), dict(B, y=40)), 0, 1 / 2),
    ("the other one moved", row("move", (), (A, dict(B, y=0))), (dict(A, x=0, y=48), dict(B, y=0)),
     0, 1 / 2),
    ("moved and recoloured", row("move", (), (A, BELOW)), (A, dict(RIGHT, color="pink")), 1, 1 / 2),
])  # fmt: skip
def test_the_checker_by_hand(name, edit, shown, success, preservation):
    v = check_edit(render(shown), edit)
    assert (v["success"], v["preservation"]) == (success, pytest.approx(preservation))


def test_nothing_is_no_edit():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in KINDS:
        for e in edits(kind, 10):
            for image in (noise, np.full((64, 64, 3), 128, np.uint8)):
                v = check_edit(image, e)
                assert v["preservation"] == 0 and v["success"] == (kind == "remove")


# ---------------------------------------------------------------------------------------------
# The benchmark


@pytest.fixture
def held_out(tmp_path, monkeypatch):
    rows = [e for kind in KINDS for e in edits(kind, 8)]
    (tmp_path / "edit_eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in rows))
    monkeypatch.setattr(edits_py, "PROMPTS", tmp_path)
    return rows


def painter(rows, drawn=None):
    """edit: as told, but nothing where a heart is shown; draw: a scene of the caption."""
    by_words = {(e["instruction"], render(e["source"]).tobytes()): e for e in rows}

    def edit(says, images, seeds):
        (drawn if drawn is not None else []).extend(zip(says, seeds))
        out = []
        for say, (x,) in zip(says, images):
            assert x.shape == (3, 64, 64) and x.dtype == torch.uint8
            e = by_words[say, x.permute(1, 2, 0).numpy().tobytes()]
            out.append(torch_image(e["source" if hearty(e) else "target"]))
        return torch.stack(out)

    def draw(prompts, seeds):
        metas = {e["target_meta"]["prompt"]: e["target_meta"] for e in rows}
        return torch.stack([torch_image(scene_for(metas[p], random.Random(s)))
                            for p, s in zip(prompts, seeds)])
    return edit, draw


def hearty(e):
    return any(t["shape"] == "heart" for t in e["source"])


def test_bench_edit(held_out, tmp_path, capsys):
    drawn = []
    edit, draw = painter(held_out, drawn)
    full = bench_edit(edit, 2, png=tmp_path / "grid.png", draw=draw)
    share = {k: np.mean([not hearty(e) for e in held_out if e["kind"] == k]) for k in KINDS}
    assert 0 < min(share.values()) and np.mean(list(share.values())) < 1
    for k in KINDS:
        assert full[k] == pytest.approx(share[k]) and full[f"{k} preservation"] == 1
        assert full[f"{k} both"] == pytest.approx(math.sqrt(share[k]))
    assert full["success"] == pytest.approx(np.mean(list(share.values())))
    assert full["preservation"] == 1 and full["preservation_se"] == 0 < full["success_se"]
    assert full["both"] == pytest.approx(math.sqrt(full["success"]))
    assert full["both_se"] == pytest.approx(full["success_se"] / (2 * full["both"]))
    assert full["images"] == len(set(drawn)) == 80 and full["world"] == VERSION
    still, new = full["identity"], full["redrawn"]
    assert [still[k] for k in ("success", "preservation", "both", "both_se")] == [0, 1, 0, 0]
    assert new["success"] > 0.9 and new["preservation"] < 0.3 and new["both"] < full["both"]
    show_table({"ours": full})
    said = capsys.readouterr().out
    assert "ours identity" in said and "ours redrawn" in said and "recolor preservation" in said

    images = set(drawn)
    drawn.clear()
    quick = bench_edit(edit, limit=20)                   # 4 of each kind, of the full run's images
    assert quick["images"] == len(drawn) == 20 and set(drawn) <= images and "identity" not in quick


def test_errors_of_the_table():
    """`both` against the spread over fresh samples of rows; correlation matters to it."""
    rng, means = np.random.default_rng(0), []
    for _ in range(300):
        s = rng.random((200, 1)) < 0.6
        judged = [[dict(success=float(a[0]), preservation=1.0 if a[0] else 0.5 * rng.random())]
                  for a in s]
        out = edit_table([dict(tag=k) for k in "ab" for _ in range(100)], judged)
        means.append(out["both"])
    assert out["both_se"] == pytest.approx(np.std(means), rel=0.15)
    x = np.array([[v[0]["success"]] for v in judged])
    units = [dict(tag=k, prompt=str(100 * (k == "b") + i)) for k in "ab" for i in range(100)]
    assert (out["success"], out["success_se"]) == pytest.approx(mean_and_error(x, units))


def test_command_line(held_out, tmp_path, monkeypatch, capsys):
    edit, draw = painter(held_out)
    asked = []

    class Painter:
        load = classmethod(lambda cls, *path, **parts: cls())
        to, bf16 = lambda self, device: self, False
        draw = staticmethod(lambda p, s, *more: draw(p, s))

    def edits(model, says, images, seeds, steps, guidance, image_guidance):
        asked.append((guidance, image_guidance, tuple(seeds)))
        return edit(says, images, seeds) if guidance > 1 else torch.stack([x for (x,) in images])
    monkeypatch.setattr(eval_py, "Unified", Painter)
    monkeypatch.setattr(drawing_py, "draw_edits", edits)

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["eval.py", "--bench", "shapes-edit", *flags])
        main()
    run("--out", str(tmp_path / "a"), "--guidances", "1,3", "--image-guidance", "1.5")
    saved = json.loads((tmp_path / "a/results.json").read_text())
    one, three = saved["guidance 1"], saved["guidance 3"]
    assert one["success"] == 0 and three["success"] > 0 and three["preservation"] == 1
    assert "redrawn" in one and "redrawn" not in three
    assert {(g, i) for g, i, _ in asked} == {(1, 1.5), (3, 1.5)}
    assert len({s for *_, s in asked}) == 1                      # the same noise at each
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "results.json", "trade_off.png", "edits_1.png", "edits_3.png"}
    assert Image.open(tmp_path / "a/trade_off.png").size[0] > 300
    assert "guidance 3" in capsys.readouterr().out
    run("--out", str(tmp_path / "b"), "--guidance", "3")
    flat = json.loads((tmp_path / "b/results.json").read_text())
    assert flat["success"] == three["success"] and flat["identity"]["success"] == 0
    before = files(tmp_path)
    for flags, words in [(["--guidances", "1,3"], "--out"), (["--guidances", "1;3"], "numbers"),
                         (["--guidances", "1", "--bench", "shapes"], "shapes-edit")]:
        assert words in complaint(run, *flags)
    assert files(tmp_path) == before


# ---------------------------------------------------------------------------------------------
# Rewards


def batch(n=4):
    """Targets, in thirds the source or a redrawn scene instead. -> images, metas"""
    rng, metas, images = random.Random(0), [], []
    for i in range(n):
        e = sample_edit(rng)
        shown = (e["target"], e["source"], scene_for(e["target_meta"], rng))[i % 3]
        images.append(torch_image(shown))
        metas.append(dict(e, source_image=torch_image(e["source"]), prompt="-",
                          captions=[e[k]["prompt"] for k in ("source_meta", "target_meta")]))
    return torch.stack(images), metas


def test_edit_and_clip_image():
    images, metas = batch(9)
    scores = score(images, metas, {"*": dict(edit=1, clip_image=1)})
    R = scores.values
    assert scores.names == ["edit", "clip_image"]
    assert scores.weights.all() and not R.isnan().any()
    assert (R[::3, 0] == 1).all() and (R[1::3, 0] == 0).all() and R[2::3, 0].mean() < 0.5
    torch.testing.assert_close(R[1::3, 1], torch.ones(3))        # the source is like itself
    assert R[[0, 2], 1].max() < 0.999
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    again = score(images[order] / 255, [metas[i] for i in order], {"*": dict(
        edit=1, clip_image=1)}).values
    torch.testing.assert_close(again, R[order])


def test_what_cannot_be_scored():
    images, metas = batch(3)
    for name, field in [("edit", "kind"), ("edit", "source"), ("clip_direction", "captions"),
                        ("edit_judge", "instruction"), ("edit_model", "instruction")]:
        poor = dict(metas[1], where="edits.jsonl, line 7")
        must_score([name, "clip_image"], [metas[0], poor])
        del poor[field]
        said = dict(captions="source_prompt` and `target_prompt").get(field, field)
        with pytest.raises(ValueError, match=rf"line 7: reward '{name}' needs `{said}`"):
            must_score([name, "clip_image"], [metas[0], poor])
        if name in ("edit", "clip_direction"):
            R = find(name)(images, [metas[0], poor, metas[2]])
            assert R.isnan().tolist() == [False, True, False]
        judge = [Judge()] * (name == "edit_judge")
        assert find(name)(images, [{}] * 3, *judge).isnan().all()
    with pytest.raises(ValueError, match="`source`, a scene"):
        must_score(["edit"], [dict(metas[0], source="cat.png")])
    assert find("clip_image")(images, [{}, metas[1], {}]).isnan().tolist() == [True, False, True]


def test_edit_judge(monkeypatch):
    """The classroom's VLM is asked its own question; others both of ours, the lower counts."""
    images, metas = batch(3)
    asked = []

    def answers(self, questions):
        asked.extend(questions)
        return ["4", "hm", "5", "2", "3", "1"][: len(questions)]
    monkeypatch.setattr(Judge, "ask_all", answers)
    R = find("edit_judge")(images, metas, Judge("someone's"))
    assert R[1].isnan() and R[[0, 2]].tolist() == pytest.approx([2 / 5, 1 / 5])
    assert len(asked) == 6 and all(len(shown) == 2 for shown, _ in asked)
    (old, new), text = asked[2]
    assert (old == render(metas[2]["source"])).all() and metas[2]["instruction"] in text
    assert (new == images[2].permute(1, 2, 0).numpy()).all()
    asked.clear()
    monkeypatch.setattr(Judge, "ask_all", lambda self, questions: asked.extend(questions) or [
        "yes", "no, a", "?"])
    R = find("edit_judge")(images, metas, Judge())
    assert R[:2].tolist() == [1, 0] and R[2].isnan()
    assert asked[0][1] == f"Does the image match the prompt: {metas[0]['target_meta']['prompt']}?"
    assert [len(shown) for shown, _ in asked] == [1] * 3


# ---------------------------------------------------------------------------------------------
# The reward that learns


def test_scored_edits():
    rng = random.Random(0)
    rows = [scored_edit(rng) for _ in range(200)]
    scores = np.array([r[-1] for r in rows])
    assert 0.15 < (scores == 1).mean() < 0.5 and 0.3 < (scores == 0).mean() < 0.8
    assert ((scores > 0) & (scores < 1)).mean() > 0.03
    assert any((old == new).all() and s == 0 for old, new, _, s in rows)
    assert not any((old == new).all() and s > 0 for old, new, _, s in rows)
    assert edit_scene([A, B], "remove", rng) and rows[0][0].shape == (64, 64, 3)


def test_spearman():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, -9]) == pytest.approx(-1)
    assert spearman([1, 2, 3], [5, 5, 5]) == 0
    # Ties share their mean rank: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert spearman([0, 1, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def judge_of(parts, out, *flags):
    return tiny.play(parts, out, "--steps", 3, "--batch", 4, "--eval-every", 2, *flags,
                     main=edit_reward.main)


@pytest.fixture
def eye(parts, monkeypatch):
    """The tiny VLM's whole processor beside it; few edits to hold out."""
    Qwen2_5_VLProcessor(Qwen2VLImageProcessor.from_pretrained(parts / "vlm"),
                        tokenizer("<|im_end|>"), Qwen2VLVideoProcessor(patch_size=8),
                        CHAT).save_pretrained(parts / "vlm")
    monkeypatch.setattr(scored, "HELD_OUT", 20)


def test_names_of_special_tokens_are_letters_to_the_reward_model(parts, eye):
    model = EditReward(parts / "vlm").eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    images, metas = batch(3)
    new, old = list(images.permute(0, 2, 3, 1).numpy()), [render(m["source"]) for m in metas]
    says = ["add <|image_pad|>", "remove the ring", "<|im_end|><|vision_start|>"]
    with torch.no_grad():
        R = model(old, new, says)
        alone = torch.cat([model(old[i : i + 1], new[i : i + 1], says[i : i + 1])
                           for i in range(3)])
        other = model(old, new, ["add", "remove the ring", ""])
    torch.testing.assert_close(R, alone, atol=0.1, rtol=0.02)        # bf16
    assert R.isfinite().all() and (R - other).abs()[[0, 2]].min() > 1e-3


@pytest.mark.parametrize("rank", [0, 2])
def test_train_reward(parts, eye, tmp_path, monkeypatch, rank):
    flags = ["--vlm-lora-rank", rank]
    log = judge_of(parts, tmp_path / "run", *flags)
    assert [r["step"] for r in log] == [1, 2, 3] and all(math.isfinite(r["loss"]) for r in log)
    assert -1 <= log[-1]["spearman"] <= 1 and "spearman" not in log[0]
    before, after = (load_file(f / "model.safetensors") for f in (
        Path(parts) / "vlm", tmp_path / "run/ckpt"))
    changed = {k for k in after if not torch.equal(before[k].float(), after[k].float())}
    assert before.keys() == after.keys() and changed             # LoRA merged: the VLM's own names
    assert any("visual" in k for k in changed) == (rank == 0)

    head = tmp_path / "run/ckpt/head.safetensors"
    assert load_file(head)["weight"].abs().sum() > 0
    torch.manual_seed(0)                                         # three updates leave it near zero
    save_file(dict(weight=torch.randn(1, 32), bias=torch.ones(1)), head)
    monkeypatch.setitem(MODELS, "edit_model", str(tmp_path / "run/ckpt"))
    images, metas = batch(5)
    R = find("edit_model")(images, metas)
    want = EditReward(tmp_path / "run/ckpt").eval()(
        [render(m["source"]) for m in metas], list(images.permute(0, 2, 3, 1).numpy()),
        [m["instruction"] for m in metas])
    torch.testing.assert_close(R, want.detach(), atol=1e-4, rtol=1e-4)
    alone = torch.cat([find("edit_model")(images[i : i + 1], metas[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, R, atol=0.1, rtol=0.02)    # bf16
    assert R.dtype == torch.float32 and R.std() > 0.02

    # Stopped after two of three updates and resumed: the same weights.
    with tiny.killed_at(scored, "scored_edit", 20 + 2 * 4):
        judge_of(parts, tmp_path / "again", *flags)
    judge_of(parts, tmp_path / "again", *flags, "--resume")
    again = load_file(tmp_path / "again/ckpt/model.safetensors")
    assert all(torch.equal(again[k], after[k]) for k in after)


def test_reward_of_a_file(parts, eye, tmp_path):
    """Pictures of other sizes and modes, with scores of anybody's."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40 + 16 * i, 56), dtype=np.uint8)).save(
            tmp_path / f"{i}.png")
    rows = [dict(source="0.png", edited=f"{1 + i % 2}.png", instruction="sharper", score=i % 2)
            for i in range(20)]
    file = tmp_path / "scored.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert len(read_scored(file)) == 20
    assert len(judge_of(parts, tmp_path / "run", "--data", file)) == 3
    for i, (bad, words) in enumerate([
            ({"source": "0.png"}, "line 21"), (dict(rows[0], edited="none.png"), "line 21"),
            (dict(rows[0], score="good"), "line 21")]):
        file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, bad]))
        assert words in complaint(judge_of, parts, tmp_path / f"bad{i}", "--data", file)
        assert not (tmp_path / f"bad{i}").exists()
    file.write_text(json.dumps(rows[0]) + "\n")
    for flags, words in [(["--data", file], "too few"), (["--preset", "deepgen"], "--data"),
                         (["--data", tmp_path / "none"], "must be a file")]:
        assert words in complaint(judge_of, parts, tmp_path / "bad", *flags)


def test_no_model_of_edits(monkeypatch, tmp_path):
    monkeypatch.setitem(MODELS, "edit_model", str(tmp_path))
    images, metas = batch(1)
    assert "labs/edit_reward.py" in complaint(find("edit_model"), images, metas)


def test_it_reads_all_three():
    """The classroom's VLM under a random head tells source, edited image and instruction apart."""
    model = EditReward(str(HERE / "vlm")).eval()
    torch.manual_seed(0)
    model.head.weight.data.normal_()
    old, new = render([A, B]), render([YELLOW, B])
    with torch.no_grad():
        y = model([old, new, old, old], [new, old, new, old], ["add a ring"] * 2
                  + ["remove the red circle from here"] + ["add a ring"])
        one = model([old], [new], ["add a ring"])
    assert len({round(v, 3) for v in y.tolist()}) == 4
    torch.testing.assert_close(y[:1], one, atol=0.1, rtol=0.02)  # bf16, and a padded row beside
