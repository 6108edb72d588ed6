"""Every paper's RL is a recipe of flags, and the faults of public implementations cannot occur in
any of them: the ratio starts at 1, gradients do not depend on micro-batches or ranks, memory savers
change nothing, and what is switched off is not there."""

import json
import math
import random
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest
import ranks
import tiny
import torch
from PIL import Image
from test_cli import complaint, files
from test_grpo import PROMPTS, G, case, close, config, learned, saved

from common.flow import flow_loss
import common.checkpoint as checkpoint_py
import common.layers as layers_py
import common.data as data_py
import common.run as run_py
import cycle_edit
import grpo
import model as ours
import reflect
from data.shapes.prepare import make_questions
from data.shapes.talk import PICTURE_KINDS
from common.rl import Anchor, Ldam
from grpo import Args, group_advantage, surrogate
from common.flags import parse
from common.presets import PRESETS, RECIPES
from common.run import odds, table
from common.sana import SanaDiT
from common.weights import learn
from model import MMDiT, sde_step, sigmas
from rewards import REWARDS

PAPERS = [name for name in RECIPES if name != "fast"]


@pytest.fixture(scope="module")
def model(parts):
    return tiny.build(config(parts), init=parts / "sft")


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """Names that recipes give; here every one is blueness."""
    for name in ("aesthetic", "pickscore", "clip", "preference"):
        monkeypatch.setitem(REWARDS, name, tiny.blue)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five pictures to fine-tune on, all of one size."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=f"{i}.png", prompt=f"a photo of {i} stars")) + "\n"
        for i in range(5)))
    return folder


@pytest.fixture(scope="module")
def lim(parts, tmp_path_factory):
    """The tiny world with ParaUni's bridge."""
    folder = tmp_path_factory.mktemp("lim")
    cfg = config(parts, bridge="lim", keep="query", layers=(1, 2))
    full = tiny.build(cfg)
    tiny.randomise(full.bridge)
    checkpoint_py.save_checkpoint(folder / "sft", {k: p for k, p in full.state_dict().items()
                                          if k.startswith(("bridge", "dit"))}, cfg, 0)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    (folder / "prompts.jsonl").write_text((parts / "prompts.jsonl").read_text())
    return folder


def small(name, photos):
    """A recipe as it is, but on few images of few steps, a quick reward and our pictures."""
    r = RECIPES[name]
    flags = ["--recipe", name, "--steps", 1, "--B", 4, "--G", 4, "--window-stop", 0, "--T", 10,
             "--reward", "blue", "--mix", "", "--ldam", "", "--sft-data", photos, "--sft-batch", 4]
    if r.get("window"):
        flags += ["--window", 9, "--trained", 5 if r.get("trained") else 0]
    return flags


# --- by name: dataclass < preset < recipe < flag ---


def flags(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, argv)])
    return parse(Args, "", "stage3")


def test_a_recipe_is_reproduced_by_its_name(monkeypatch):
    assert flags(monkeypatch) == Args() and Args().recipe == "fast" and RECIPES["fast"] == {}
    assert set(PAPERS) >= {"flow-grpo", "mr-grpo", "unirl-zero", "unipic2"}
    for name in PAPERS:
        assert flags(monkeypatch, "--recipe", name) == Args(recipe=name, **RECIPES[name])
    mine = flags(monkeypatch, "--recipe", "flow-grpo", "--G", 8, "--preset", "unipic2")
    assert mine == Args(recipe="flow-grpo", preset="unipic2", init="out/sft",
                        **RECIPES["flow-grpo"] | dict(G=8))       # over the preset's own recipe
    for name, recipe in [("flow-grpo", "flow-grpo"), ("deepgen", "mr-grpo"), ("parauni", "parauni"),
                         ("unirl-zero", "unirl-zero"), ("unipic2", "unipic2"),
                         ("unipic2-kontext", "unipic2"), ("shapes", "fast")]:
        paper = flags(monkeypatch, "--preset", name)
        assert paper.recipe == recipe
        assert paper == Args(preset=name, recipe=recipe, **RECIPES[recipe] | {
            k: v for k, v in PRESETS[name].stage3.items() if k != "recipe"})
    with pytest.raises(SystemExit, match="unknown --recipe 'fas'; there are: fast, flow-grpo, "):
        flags(monkeypatch, "--recipe", "fas")
    monkeypatch.setitem(RECIPES, "odd", dict(warp=3))
    with pytest.raises(SystemExit, match="recipe 'odd' needs --warp, which this script lacks"):
        flags(monkeypatch, "--recipe", "odd")


def test_settings_of_recipes_are_no_flags(monkeypatch, tmp_path):
    """A .json sets them, alone or on top of a recipe; a flag wins over both."""
    file, base = tmp_path / "mine.json", RECIPES["flow-grpo"]
    for own, more, want in [
            (dict(trained=2), [], dict(trained=2)),
            (dict(recipe="flow-grpo", trained=2, wd=0, G=6), [], base | dict(
                trained=2, wd=0, G=6)),
            (dict(recipe="flow-grpo", G=6), ["--G", 8], base | dict(G=8)),
            (dict(mix="text:3", shared_noise=False, final_bench=True), [], dict(
                mix="text:3", shared_noise=False, final_bench=True))]:
        file.write_text(json.dumps(own))
        assert flags(monkeypatch, "--recipe", file, *more) == Args(recipe=str(file), **want)
    file.write_text(json.dumps(dict(trained=2)))
    (tmp_path / "next.json").write_text(json.dumps(dict(recipe=str(file), kl="velocity")))
    got = flags(monkeypatch, "--recipe", tmp_path / "next.json")
    assert (got.trained, got.kl) == (2, "velocity")
    paper = [f.name for f in fields(Args) if f.metadata["setting"]]
    assert {"window_start", "grid", "shared_noise", "mix", "lora_alpha", "wd", "kl", "trained",
            "sft_batch", "ldam_gamma", "ldam_leap", "ldam_falls"} == set(paper)
    for name in paper:
        flag = "--" + name.replace("_", "-")
        for typed in ([flag, "2"], [f"{flag}=2"], [flag.replace("--", "--no-")]):
            assert complaint(flags, monkeypatch, *typed) == (
                f'error: {flag} is a setting of recipes: write {{"{name}": ...}} into a .json file '
                "and give that as --recipe")


@pytest.mark.parametrize("text, words", [
    (None, "is no JSON object of settings: [Errno 2] No such file"),
    ("{", "is no JSON object of settings: Expecting"), ("[1]", "is no JSON object of settings"),
    ('{"recipe": 3}', "is no JSON object of settings"),
    ('{"recipe": "fas"}', "unknown --recipe 'fas'; there are: fast, flow-grpo, "),
    ('{"warp": 3}', "needs --warp, which this script lacks"), ('{"G": "8"}', "G is a int, not '8'"),
    ('{"G": 8.5}', "G is a int, not 8.5"), ('{"shared_noise": 1}', "shared_noise is a bool, not 1"),
    ('{"final_bench": 1}', "final_bench is a bool, not 1"),
    ('{"trained": 4}', "--trained 4 of a window of 3 steps"),
    ('{"kl": "k3"}', "unknown --kl 'k3'")])
def test_a_bad_recipe_file(parts, tmp_path, text, words):
    file = tmp_path / "bad.json"
    if text is not None:
        file.write_text(text)
    before = files(tmp_path)
    assert words in complaint(tiny.play, parts, tmp_path / "run", "--recipe", file)
    assert files(tmp_path) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_flags_that_exist(name):
    kinds = {f.name: f.type for f in fields(Args)}
    assert all(type(v) is kinds[k] for k, v in RECIPES[name].items())
    preset = next((c.preset for c in PRESETS.values() if (c.stage3 or {}).get("recipe") == name),
                  "shapes")
    grpo.check(Args(preset=preset, prompts="its.jsonl", sft_data=".", **RECIPES[name]), 1)


def test_what_the_papers_say():
    """The values that facts and tables give, and that the window may be all steps but the last."""
    f, m, u, p = (Args(sft_data=".", **RECIPES[k])
                  for k in ("flow-grpo", "mr-grpo", "unirl-zero", "unipic2"))
    assert (f.T, f.window, f.guidance, f.eta, f.kind) == (10, 9, 4.5, 0.7, "flow")
    assert (f.beta, f.kl, f.updates, f.norm, f.shared_noise) == (0.04, "flow-grpo", 2, "global", 0)
    assert (f.lora_rank, f.lora_alpha, f.B, f.G, f.eval_T) == (32, 64, 48, 24, 40)
    assert (m.T, m.window, m.trained, m.kind, m.eta, m.shared_noise) == (50, 49, 30, "cps-simple",
                                                                         1.0, True)
    assert (m.beta, m.kl, m.sft, m.norm, m.lr, m.B * m.G) == (5e-7, "velocity", 1e-4, "group", 2e-6,
                                                              256)
    weights, mix, _ = grpo.check(m, 1)
    assert weights == {"text": dict(preference=0.2, clip=0.1, ocr=0.7),           # table 11
                       "*": dict(preference=0.7, clip=0.3)}
    assert mix == {"text": 3, "*": 1}
    assert (u.B, u.G, u.guidance, u.beta, u.kl) == (8, 8, 3.5, 4e-3, "mean")
    assert (u.T, u.kind, u.eta, u.norm, u.lr) == (10, "flow", 0.7, "joint", 1e-5)   # its trainer's
    assert (p.T, p.G, p.eta, p.beta, p.lora_rank, p.B * p.G) == (10, 16, 0.7, 0.04, 32, 256)
    for a in (f, m, u, p):
        assert a.grid == "diffusers"
        assert list(range(a.window_stop, a.window_stop + a.window)) == list(range(a.T - 1))


@pytest.mark.parametrize("script, recipe, grid", [
    (grpo, "fast", "uniform"), (grpo, "flow-grpo", "diffusers"),
    (cycle_edit, "unirl-zero", "diffusers"), (reflect, "unipic2", "diffusers")])
def test_a_recipe_rolls_out_on_its_grid(parts, tmp_path, monkeypatch, script, recipe, grid):
    """Also with a preset on another one, which goes on to serve evaluation."""
    rolls, looks = [], []
    for module, seen in ((script, rolls), (ours, looks)):
        monkeypatch.setattr(module, "sigmas", lambda *inputs, seen=seen: [
            seen.append(inputs), sigmas(*inputs)][1])
    with tiny.killed_at(script, "group_advantage", 0):
        tiny.play(parts, tmp_path / "run", "--recipe", recipe, "--G", 2, "--T", 11,
                  "--window-stop", 0, main=script.main)
    assert rolls == [(11, 1.0, grid)] and set(looks) <= {(2, 1.0, "uniform")}
    assert looks or script is reflect                    # which draws nothing if nobody says no


# --- in every recipe: ratio 1 at first, gradients that depend on nothing else ---


@pytest.mark.parametrize("name", RECIPES)
def test_ratio_one_and_micro_batches(parts, photos, tmp_path, name):
    rows = tiny.play(parts, tmp_path / "a", *small(name, photos))
    row, args = rows[1], json.loads((tmp_path / "a/config.json").read_text())
    assert row["ratio_off"] <= 1e-6 and row["grad_norm"] > 0 and row["kept"] == 0.75
    assert (row.get("sft", 0) > 0) == ("sft" in row) == (args["sft"] > 0) and "ldam" not in row
    assert not [k for k in row if k.startswith("failed")]
    assert ("kl" in row) == (args["beta"] > 0)
    if args["updates"] == 1:                                    # the second is no longer on-policy
        assert not row.keys() & {"ratio_low", "ratio_high", "clipped", "kl_old"}
        assert row.get("kl", 0) <= 1e-9                         # KL to itself
    else:
        assert row["ratio_low"] < 1 < row["ratio_high"]
    want, norm = learned(tmp_path / "a")
    tiny.play(parts, tmp_path / "b", *small(name, photos), "--micro", 7)
    got, its_norm = learned(tmp_path / "b")
    close(got, want, 1e-4) if want.norm() > 1e-4 else close(got / want.norm(), want / want.norm(),
                                                            1e-4)
    assert its_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", ["flow-grpo", "mr-grpo"])
def test_ranks(parts, photos, tmp_path, name):
    """Two updates, the std of the whole batch, LoRA; SFT pairs, chosen steps: one rank or two."""
    flags = [*small(name, photos), "--lr", 1e-3]
    rows = [tiny.play(parts, tmp_path / "one", *flags),
            ranks.rows(tmp_path / "two", lambda: tiny.play(parts, tmp_path / "two", *flags))]
    (want, norm), (got, its_norm) = (learned(tmp_path / r) for r in ("one", "two"))
    close(got / want.norm(), want / want.norm(), 1e-4)
    assert its_norm == pytest.approx(norm, rel=1e-4)
    for name in ["reward_blue", "kept", "ratio_off"] + ["sft"] * (name == "mr-grpo"):
        assert rows[0][1][name] == pytest.approx(rows[1][1][name], rel=1e-4, abs=1e-6)


def test_each_update_takes_its_share(parts, tmp_path, monkeypatch):
    """Every image once, in one of the updates; and the log says what the ratios really were."""
    seen, on = [], []

    def spy(model, branches, owner, path, A, times, total, *more):
        rows = surrogate(model, branches, owner, path, A, times, total, *more)
        seen.append((path.xs[0, :, 0, 0, 0].tolist(), A, rows))
        on.append(total)
        return rows
    monkeypatch.setattr(grpo, "surrogate", spy)
    row = tiny.play(parts, tmp_path / "a", "--steps", 1, "--updates", 4, "--lr", 0.05, "--clip",
                    1e-2, "--no-shared-noise")[1]
    images = [x for xs, _, _ in seen for x in xs]
    assert len(images) == len(set(images)) == 12 and len(seen) == 4      # one of 4 groups is flat
    assert all(d == 4 * 4 * 3 / 4 for d in on)                           # fixed, global
    ratio = torch.cat([rows[:, 0] for _, _, rows in seen])
    assert row["ratio_off"] <= 1e-6 and (seen[0][2][:, 0] - 1).abs().max() <= 1e-6
    assert all((rows[:, 0] - 1).abs().max() > 1e-3 for _, _, rows in seen[1:])
    assert row["clipped"] == pytest.approx(((ratio - 1).abs() > 1e-2).float().mean().item())
    assert 0 < row["clipped"] < 1
    assert row["ratio_low"] == pytest.approx(np.quantile(ratio, 0.05), rel=1e-5)
    assert row["ratio_high"] == pytest.approx(np.quantile(ratio, 0.95), rel=1e-5)
    nats = 4 * 16 * 16 * ratio.log()
    assert row["kl_old"] == pytest.approx(nats.square().mean().item() / 2, rel=1e-4)


def test_chosen_steps_add_up(model):
    """--trained: rows of other steps give no gradient and cost no forward."""
    args, guided, rest = case(model)

    def gradient(trained):
        model.dit.requires_grad_(True)
        model.dit.zero_grad()
        rows = surrogate(model, guided, *rest, None, trained)
        assert len(rows) == 12 * len(trained)
        return torch.cat([p.grad.flatten() for p in model.dit.parameters() if p.grad is not None])
    one, two, all_ = (gradient(k).clone() for k in ([1], [0, 2], [0, 1, 2]))
    close(one + two, all_)
    assert (one - two).norm() > 0.1 * all_.norm()


def test_trained_steps_move(parts, tmp_path, monkeypatch):
    seen = []

    def spy(*inputs):
        seen.append(inputs[-1])
        assert inputs[6] == 4 * 4 * 2                          # images x trained steps, no more
        return surrogate(*inputs)
    monkeypatch.setattr(grpo, "surrogate", spy)
    tiny.play(parts, tmp_path / "a", *"--steps 4 --window 5 --window-stop 0 --trained 2".split())
    assert all(len(set(k)) == 2 and set(k) <= set(range(5)) for k in seen)
    assert len({tuple(k) for k in seen}) > 1


# --- advantages, categories ---


def test_norms():
    g = torch.Generator().manual_seed(0)
    R = torch.randn(12, 2, generator=g) * torch.tensor([1.0, 100.0])
    W = torch.tensor([0.75, 0.25]).expand(12, 2).clone()
    total = (R * W).sum(1).view(3, G)
    centred = total - total.mean(1, keepdim=True)
    joint = centred / total.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(group_advantage(R, W, G, "joint"), joint.flatten(), atol=1e-3,
                               rtol=1e-3)
    torch.testing.assert_close(group_advantage(R, W, G, "global"), (
        centred / total.std(correction=0)).flatten(), atol=1e-3, rtol=1e-3)
    a, b = R.view(3, G, 2)[:, :, 1], group_advantage(R, W, G, "joint").view(3, G)
    assert all(torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.99 for x, y in zip(a, b))  # outweighed
    wild = torch.zeros(400, 1)
    wild[0] = 1.0
    for norm in ("joint", "global"):                          # UniRL-Zero's code, and Flow-GRPO's
        assert group_advantage(wild, torch.ones_like(wild), 40, norm).max() == 5

    # What failed is left out, what was not asked for is not missed, and flat is exactly 0.
    R[1, 0], W[4:8, 0], R[4:8, 0] = math.nan, 0, math.nan
    for norm in ("joint", "global"):
        A = group_advantage(R, W, G, norm).view(3, G)
        assert A[0, 1] == 0 and A[0, [0, 2, 3]].mean().abs() < 1e-5
        assert A[1].abs().min() > 0 and A.isfinite().all()
        assert not group_advantage(R * math.nan, W, G, norm).any()
        flat = torch.rand(500, 2, generator=g).repeat_interleave(7, 0)
        flat[:70] = torch.rand(70, 2, generator=g)                      # or there is no spread
        A = group_advantage(flat, torch.full_like(flat, 1 / 3), 7, norm)
        assert not A[70:].any() and A[:70].abs().min() > 0


def test_odds():
    rows = [dict(category="text")] * 2 + [dict(tag="position")] * 5 + [{}] * 3
    assert odds(rows, {"text": 3.0, "*": 1.0}).tolist() == [3] * 2 + [1] * 8
    assert odds(rows, {"position": 1.0}).tolist() == [0] * 2 + [1] * 5 + [0] * 3


def test_odds_of_questions():
    """--task vqa: of 1.55 a caption has .05, a colour .5, the other three kinds one together."""
    rows = make_questions(130)["vqa_train"]
    kinds = [row["tag"] for row in rows]
    p = odds(rows, table(reflect.TASKS["vqa"]["mix"], float))
    share = {k: p[[x == k for x in kinds]].sum().item() / p.sum().item() for k in PICTURE_KINDS}
    third = pytest.approx(1 / 3 / 1.55)
    assert share == dict(caption=pytest.approx(0.05 / 1.55), color=pytest.approx(0.5 / 1.55),
                         exists=third, count=third, relation=third)
    each = dict(caption=0.05, color=0.5).get
    before = torch.tensor([each(k, 1 / 3) / kinds.count(k) for k in kinds])     # of the figures
    for seed in range(20):
        a, b = (w.multinomial(128, generator=torch.Generator().manual_seed(seed))
                for w in (p, before))
        assert torch.equal(a, b)


def test_categories_of_main(parts, tmp_path, monkeypatch):
    """Prompts come as --mix says, each with its category's rewards; a .json file says the same."""
    metas = [json.loads(line) | dict(flat=False) for line in open(parts / "prompts.jsonl")]
    metas = [m | dict(category="text" if i == 0 else "scene", prompt=f"{m['prompt']} {i}")
             for i, m in enumerate(metas * 3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metas))
    table = {"text": "blue:0.25,clip:0.75", "*": "blue:2"}
    (tmp_path / "r.json").write_text(json.dumps(table))
    seen = []

    def spy(R, W, *more):
        seen.append(W)
        return group_advantage(R, W, *more)
    monkeypatch.setattr(grpo, "group_advantage", spy)
    for name, reward in (("a", json.dumps(table)), ("b", tmp_path / "r.json")):
        rows = tiny.play(parts, tmp_path / name, "--steps", 3, "--reward", reward, "--B", 2,
                         "--prompts", tmp_path / "p.jsonl", "--mix", "text:1000,*:1")
        assert all("failed_clip" not in r and "reward_clip" in r for r in rows[1:])
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen, seen[3:]))
    for W in seen:                                # 2 prompts x 4: the only text prompt is always in
        assert sorted(map(tuple, W[::4].tolist())) == [(0.25, 0.75), (2.0, 0.0)]


def test_refusals(parts, photos, tmp_path, monkeypatch):
    for line, words in [
            ("--reward {", "Expecting"), ("--reward none.json", "No such file"),
            ("--mix text:x", "must be a number in [0, 1e6]"),
            ("--norm z", "there are: group, joint, global"),
            ("--grid z", "unknown --grid 'z'; there are: uniform, diffusers"),
            ("--updates 3", "--updates 3"), ("--trained 4", "--trained 4 of a window of 3"),
            ("--sft 1", "--sft 1.0: must be a number in [0, 1)"), ("--ldam blue:1-2", "bridge lim"),
            ("--sft .1 --sft-data none", "must be a file"),
            ("--ldam blue:a", "invalid literal"),
            ("--preset deepgen --prompts data/shapes/prompts/train.jsonl", "of its own")]:
        with pytest.raises(SystemExit) as e:
            tiny.play(parts, tmp_path / "run", *line.split())
        assert words in e.value.code and "\n" not in e.value.code, e.value.code
        assert not (tmp_path / "run").exists()
    monkeypatch.setitem(REWARDS, "clip", lambda x, rows: torch.full((len(x),), math.nan))
    with pytest.raises(SystemExit, match="'clip' failed for 100%.*--max-failed"):
        tiny.play(parts, tmp_path / "run", "--reward", "blue:1,clip:1", "--max-failed", 0.4)


# --- KL, the loss of fine-tuning ---


def test_kl_is_its_monte_carlo():
    """E_p[log p - log q] over drawn steps is the closed form, and Flow-GRPO's is d times it."""
    g = torch.Generator().manual_seed(0)
    x, v, v_ref, noise = (torch.randn(n, 2, 3, 3, generator=g) for n in (1, 1, 1, 40_000))
    t, s = 0.7, 0.55
    mean, std = sde_step(v, x, t, s, 0.7)[2:]
    mean_ref = sde_step(v_ref, x, t, s, 0.7)[2]
    landed = mean + std * noise
    p, q = (sde_step(a.expand_as(noise), x.expand_as(noise), t, s, 0.7, x_next=landed)[1]
            for a in (v, v_ref))
    closed = ((mean - mean_ref).square() / (2 * std**2)).mean()
    assert (p - q).mean() == pytest.approx(closed.item(), rel=0.02)
    theirs = (mean - mean_ref).square().mean() / (2 * 0.7**2 * t / (1 - t))      # s without sqrt(d)
    assert closed * (t - s) == pytest.approx(theirs.item(), rel=1e-5)


def test_forms_of_kl(model):
    """flow-grpo is mean times each step's size; both 0 against itself."""
    args, guided, rest = case(model, beta=0.5)
    ref, out = tiny.build(model.cfg).dit, {}
    tiny.randomise(ref)
    model.dit.requires_grad_(True)
    for form in ("mean", "flow-grpo", "velocity"):
        for name, other in (("itself", model.dit), ("other", ref)):
            anchor = Anchor([other, model.bridge], guided, args.beta, form)
            out[form, name] = surrogate(model, guided, *rest, anchor)[:, 1]
        assert out[form, "itself"].abs().max() <= 1e-12
    ts, window = rest[3], rest[1].window
    d = torch.tensor([ts[k] - ts[k + 1] for k in window]).repeat_interleave(12)
    torch.testing.assert_close(out["flow-grpo", "other"], out["mean", "other"] * d)
    assert out["mean", "other"].min() > 0


def unclipped(out):
    """The gradient of a run's only update, before it was clipped to norm 1."""
    g, norm = learned(out)
    return g * max(1, norm)


def test_sft_has_exactly_its_share(parts, photos, tmp_path):
    """(1 - l) RL + l SFT (DeepGen eq. 5), the KL within RL; whatever the micro-batch."""
    grads = {}
    for name, share in (("a", 0.0), ("b", 0.25), ("c", 0.5)):
        rows = tiny.play(parts, tmp_path / name, "--steps", 1, "--sft", share, "--sft-data", photos,
                         "--sft-batch", 5, "--train", "both", "--micro", 3 if name == "c" else 64)
        grads[name] = unclipped(tmp_path / name)
    close(grads["a"] + 2 * (grads["b"] - grads["a"]), grads["c"], 1e-4)
    # What is left of it is the gradient of flow matching on these very pairs.
    model = learn(tiny.build(config(parts), init=parts / "sft"), dict(dit=None, bridge=None))
    images, prompts = next(data_py.pairs(photos, model.cfg, 5, 0))
    keys = [run_py.key(0, 0, 500_000 + 2 * i) for i in range(5)]
    loss = flow_loss(model, images, prompts, keys).mean()
    assert rows[1]["sft"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    want = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                      for p in model.parameters() if p.requires_grad])
    close(10 * (grads["b"] - 0.75 * grads["a"]) / 0.25, want, 1e-3)      # Adam's first moment: 1/10


def test_flow_loss_is_flow_matching(model, monkeypatch):
    """The exact velocity loses nothing; a pair's time and noise follow from its key alone."""
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    x0, seen = model.to_latents(images), []

    def exact(x, t, branches):
        seen.append((x, t))
        return (x - x0[: len(x)]) / t.view(-1, 1, 1, 1)              # eps - x_0, as x = x_0 + t v
    with monkeypatch.context() as m:
        m.setattr(model, "velocity", exact)
        assert flow_loss(model, images, PROMPTS, [1, 3, 5]).max() < 1e-8
        flow_loss(model, images[:1], PROMPTS[:1], [1])
        m.setattr(model, "velocity", lambda x, t, b: exact(x, t, b) + 2)
        assert flow_loss(model, images, PROMPTS, [7, 7, 9]).mean() == pytest.approx(4, rel=1e-4)
    (x, t), (x1, t1), (_, t7) = seen
    torch.testing.assert_close(x[:1], x1, atol=1e-4, rtol=1e-4)
    assert t[0] == t1[0] and t7[0] == t7[1] != t7[2]
    eps = (x - x0) / t.view(-1, 1, 1, 1) + x0
    assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1 and len(t.unique()) == 3


# --- LDAM (ParaUni, algorithm 1) ---


def algorithm_1(gs, rs, leap, falls):
    """The paper's box, line by line. -> epochs in which its line 16 ran"""
    g_prev, r_prev, cool, r_s, g_s, fired = math.inf, 0, 0, 0, False, []
    for n, (g, r) in enumerate(zip(gs, rs), 1):
        if g >= g_prev * leap:
            g_s = True
        if r <= r_prev:
            r_s += 1
        if cool == 0:
            if g_s and r_s >= falls:
                fired.append(n)
                r_s, g_s, cool = 0, False, n
        else:
            cool -= 1
        g_prev, r_prev = g, r
    return fired


@pytest.mark.parametrize("leap, falls", [(100, 5), (2, 3), (0, 5), (100, 0), (0, 0)])
def test_ldam_is_algorithm_1(leap, falls):
    rng, some = random.Random(0), 0
    for trial in range(50):
        gs = [10 ** rng.randint(-2, 2) for _ in range(120)]              # ties, too
        rs = [rng.choice((-1, 0, 1, 2)) for _ in gs]
        args = Args(ldam_leap=leap, ldam_falls=falls, ldam_gamma=0.3, seed=trial)
        ldam = Ldam(args, {"clip": range(3, 5)}, (1, 2, 3, 4))
        noise = [ldam.after(dict(step=n, grad_norm=g, reward_clip=r))
                 for n, (g, r) in enumerate(zip(gs, rs), 1)]
        fired = [n for n, c in enumerate(noise, 1) if c is not None]
        assert fired == algorithm_1(gs, rs, leap, falls)
        some += len(fired)
        for c in (c for c in noise if c is not None):
            assert c.shape == (4,) and (c[:2] == 1).all() and (c[2:] != 1).all()
            assert (c[2:] - 1).abs().max() < 0.3 * 5
    assert some > 20


def test_each_reward_has_its_layers():
    ldam = Ldam(Args(ldam_leap=1, ldam_falls=2), {"clip": range(3, 5), "ocr": range(1, 2)},
                (1, 2, 3, 4))
    rows = [dict(step=n, grad_norm=n, reward_clip=1 / n, reward_ocr=n) for n in range(1, 4)]
    noise = [ldam.after(r) for r in rows]
    assert noise[0] is noise[1] is None                       # clip has fallen twice, ocr never
    assert ((noise[2] != 1) == torch.tensor([False, False, True, True])).all()


def test_ldam_in_main(lim, photos, tmp_path, monkeypatch):
    """The same noise in rollout and update, also of the reference; a restart knows what was."""
    seen, real = [], ours.Unified.encode

    def spy(self, prompts, *more, layer_noise=None, **other):
        if None not in prompts and len(prompts) == 4 and not more:
            seen.append(layer_noise)
        return real(self, prompts, *more, layer_noise=layer_noise, **other)
    monkeypatch.setattr(ours.Unified, "encode", spy)
    flags = ["--steps", 5, "--train", "both", "--beta", 0.1, "--guidance", 2, "--eval-every", 2,
             "--ldam", "clip:7,blue:2-2", "--ldam-leap", 0, "--ldam-falls", 0, "--ldam-gamma", 0.5,
             "--updates", 2, "--sft", 0.3, "--sft-data", photos, "--sft-batch", 3]
    rows = tiny.play(lim, tmp_path / "a", *flags)
    assert [r["ldam"] for r in rows[1:]] == [0, 0, 1, 0, 0]       # after update 2, then a rest
    assert all(r["ratio_off"] <= 1e-6 for r in rows[1:])
    policy = [c for c in seen if c is not None]
    assert len(policy) == 3                         # the policy, its reference, the second update
    assert torch.equal(policy[0], policy[1]) and torch.equal(policy[0], policy[2])
    assert policy[0][0] == 1 != policy[0][1]
    with tiny.killed_at(grpo, "rollout", 2):
        tiny.play(lim, tmp_path / "b", *flags)
    again = tiny.play(lim, tmp_path / "b", *flags, "--resume")
    assert [r["ldam"] for r in again[1:]] == [0, 0, 1, 0, 0]
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))


def test_ldam_at_rest_is_ldam_off(lim, tmp_path):
    """Bit for bit, until both gates open."""
    for name, flags in (("off", []), ("rest", ["--ldam", "blue:1-2", "--ldam-leap", 0]),
                        ("on", ["--ldam", "blue:1-2", "--ldam-leap", 0, "--ldam-falls", 0])):
        tiny.play(lim, tmp_path / name, "--steps", 3, *flags)
    off, rest, on = (saved(tmp_path / name) for name in ("off", "rest", "on"))
    assert torch.equal(off, rest) and not torch.equal(off, on)


# --- what only saves memory or time ---


SANA = dict(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, sample_size=16,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, mlp_ratio=2.0, patch_size=2)


def gradients(dit, ctx, mask):
    """-> velocity, gradients, bytes kept for the backward"""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(len(ctx), 4, 16, 16, generator=g), torch.rand(len(ctx), generator=g)
    own, seen = {p.untyped_storage().data_ptr() for p in dit.parameters()}, {}

    def keep(a):
        seen[a.untyped_storage().data_ptr()] = a
        return a
    dit.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
        v = dit(x, t, ctx, mask)
    v.square().mean().backward()
    kept = sum(a.untyped_storage().nbytes() for k, a in seen.items() if k not in own)
    return v, torch.cat([p.grad.flatten() for p in dit.parameters() if p.grad is not None]), kept


@pytest.mark.parametrize("kind", [MMDiT, SanaDiT])
def test_checkpointing_is_exact(kind):
    torch.manual_seed(0)
    dit = MMDiT(**tiny.MMDIT | dict(num_layers=6)) if kind is MMDiT else SanaDiT(
        **SANA | dict(num_layers=6))
    tiny.randomise(dit)
    ctx = torch.randn(3, 7, 32)
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    v, want, kept = gradients(dit, ctx, mask)
    dit.checkpoint = True
    again, got, less = gradients(dit, ctx, mask)
    assert torch.equal(v, again) and torch.equal(got, want) and want.norm() > 1e-3
    assert less < 0.4 * kept


def test_checkpointing_in_main(parts, photos, tmp_path, monkeypatch):
    calls = []
    real = layers_py.checkpoint
    monkeypatch.setattr(layers_py, "checkpoint",
                        lambda *a, **k: [calls.append(1), real(*a, **k)][1])
    flags = ["--steps", 2, "--lora-rank", 2, "--beta", 0.1, "--sft", 0.5, "--sft-data", photos,
             "--sft-batch", 5]
    tiny.play(parts, tmp_path / "a", *flags)
    assert not calls
    tiny.play(parts, tmp_path / "b", *flags, "--checkpoint")
    assert calls and torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
