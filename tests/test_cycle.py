"""The real cycle_edit.py, on tiny real parts: both trajectories start at ratio 1 and learn from one
advantage, and nothing that should not matter changes what is learned."""

import json
import random
import tarfile
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import tiny
import torch
from PIL import Image
from test_cli import complaint, files
from test_grpo import G, close, config, gradient, learned, saved
from test_rewards import vlm  # noqa: F401

import common.presets as presets_py
import common.record as record_py
import cycle_edit
import grpo
import rewards.judge as judge_py
from cycle_edit import Args, group_advantage, read_all, read_edits, surrogate
from data.shapes.edits import sample_edit, source_picture
from data.shapes.world import render
from eval import Scores, score
from common.run import key
from model import rollout, sigmas
from rewards.inverses import write_inverses
from rewards.judge import Judge

BOTH = ["--reward", "blue", "--reverse", "yes"]      # blue is a rank: no pixel's rounding moves it


def play(parts, out, *flags, **more):
    return tiny.play(parts, out, *flags, main=cycle_edit.main, **more)


@pytest.fixture
def noisy(parts, tmp_path):
    """A folder of parts whose preset adds noise to references, as UniRL-Zero's."""
    folder = tmp_path / "noisy"
    folder.mkdir()
    for part in ("sft", "edits.jsonl"):
        (folder / part).symlink_to(parts / part)
    about = json.loads((parts / "config.json").read_text()) | dict(ref_noise=0.2)
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def calls(monkeypatch, name, where=cycle_edit):
    """What cycle_edit hands to one of its functions, and gets back: [(inputs, output)]"""
    seen, real = [], getattr(where, name)

    def spy(*inputs):
        out = real(*inputs)                       # score_both adds to the Scores that it is given
        seen.append((inputs, replace(out) if isinstance(out, Scores) else out))
        return out
    monkeypatch.setattr(where, name, spy)
    return seen


# --- the ratio at the first update ---


@pytest.mark.parametrize("bf16", [False, True])
def test_first_update_has_ratio_one(noisy, monkeypatch, bf16):
    """With both guidances, noise on references, and another batch than the rollout's."""
    model = tiny.build(config(noisy), init=noisy / "sft")
    monkeypatch.setattr(model, "bf16", bf16)
    limit = Args().clip / 5 if bf16 else 1e-6
    args, ts, window = Args(T=6, G=1, micro=5), sigmas(6).tolist(), range(1, 4)
    rows = read_edits(noisy / "edits.jsonl")
    asked = [r["inverse"] for r in rows], [[source_picture(r, 64)] for r in rows]
    keys = [(key(0, 0, n * 200 + 100), key(0, 0, n * 200 + 101)) for n in range(4)]
    first = [a for a, _ in keys]
    with torch.no_grad():
        branches = model.edit_branches(*asked, 3.0, 1.5, first)
        again, other = (model.edit_branches(*asked, 3.0, *more) for more in
                        ((1.5, first), (0.0, first)))
        fresh = model.edit_branches(*asked, 3.0, 1.5, [k + 1 for k in first])
    assert len(branches) == 3
    path = rollout(model, branches, ts, window, keys, args.eta, args.kind, args.shared_noise)
    some = torch.tensor([0, 3])
    rest = [some, path.rows(some), torch.tensor([1.0, -1.0]), ts, 6, args]
    same, twin, guidance, noise = (gradient(model, guided, rest)[0][0]
                                   for guided in (branches, again, other, fresh))
    assert max(same, twin) <= limit
    assert bf16 or min(guidance, noise) > 1e-5                 # such mistakes would be seen


@pytest.mark.parametrize("bf16", [False, True])
def test_first_update_of_main_has_ratio_one(noisy, tmp_path, bf16):
    rows = play(noisy, tmp_path / "run", *BOTH, "--steps", 1, "--guidance", 2,
                "--image-guidance", 1.5, bf16=bf16)
    assert [r["step"] for r in rows] == [0, 1]
    assert rows[1]["ratio_off"] <= (Args().clip / 5 if bf16 else 1e-6)
    assert rows[1]["kept"] == 0.75 and rows[1]["grad_norm"] > 0
    assert "clipped" not in rows[1]                      # at this ratio none can be


# --- two trajectories, one advantage ---


def test_the_way_back_starts_from_what_was_drawn(parts, tmp_path, monkeypatch):
    """Each sample's own picture is the reference of its way back; and credit is shared."""
    rolled, climbed = calls(monkeypatch, "rollout"), calls(monkeypatch, "surrogate")
    scored, compared = calls(monkeypatch, "score"), calls(monkeypatch, "group_advantage")
    play(parts, tmp_path / "run", "--steps", 1, "--reward", "clip_image", "--beta", 0.1)
    (there, first), (back, second) = rolled
    model, guided, x0, x1 = there[0], back[1], first.x0, second.x0
    assert len(there[1][0][1].ctx) == 4 and len(guided[0][1].ctx) == 16
    drawn = model.to_images(x0).cpu()
    for b in (0, 7, 15):
        z = model.to_latents(drawn[b : b + 1])[0]
        torch.testing.assert_close(guided[0][1].refs[b][0], z, atol=1e-4, rtol=1e-4)
    # A group starts back from one noise, another than it came from.
    starts = [[a for a, _ in inputs[4]] for inputs in (there, back)]
    assert [len(set(s)) for s in starts] == [4, 4] and not set(starts[0]) & set(starts[1])
    every = [a for inputs in (there, back) for k in inputs[4] for a in (k[1] + s for s in range(6))]
    assert len(set(every)) == len(every)

    # clip_image sees the cycled picture only, yet its advantage is that of both.
    (edited, none), (cycled, scores) = scored
    assert none.names == [] and scores.names == ["clip_image"]
    assert torch.equal(edited[0], drawn) and torch.equal(cycled[0], model.to_images(x1).cpu())
    assert torch.equal(compared[0][0][0], scores.values)
    (a, _), (b, _) = climbed
    assert torch.equal(a[4], b[4]) and a[4].abs().max() > 0.1    # advantages of rows
    assert torch.equal(a[2], torch.arange(16) // G) and torch.equal(b[2], torch.arange(16))
    assert a[6] == b[6] == 2 * 16 * 3                            # total


def test_both_trajectories_are_climbed(parts, tmp_path, monkeypatch):
    """The update's gradient is the mean of that of the edit and that of the way back."""
    seen = []

    def alone(model, *inputs):
        """The gradient of one trajectory, taken out of the sum and put back."""
        before = [None if p.grad is None else p.grad.clone() for p in model.dit.parameters()]
        model.dit.zero_grad()
        out = surrogate(model, *inputs)
        seen.append(torch.cat([p.grad.flatten() for p in model.dit.parameters()
                               if p.grad is not None]))
        for p, old in zip(model.dit.parameters(), before):
            p.grad = p.grad if old is None else p.grad + old
        return out
    monkeypatch.setattr(cycle_edit, "surrogate", alone)
    play(parts, tmp_path / "both", *BOTH, "--steps", 1)
    there, back = seen
    total = learned(tmp_path / "both")[0]
    close(total / total.norm(), (there + back) / (there + back).norm())
    cosine = torch.cosine_similarity(there, back, dim=0).abs()
    assert min(there.norm(), back.norm()) > 1e-4 and cosine < 0.95      # two different things
    # Without the way back: the same edits, the same gradient, by half as many rows.
    play(parts, tmp_path / "edit", "--reward", "blue", "--steps", 1)
    close(seen[2] / 2, there)


@pytest.mark.parametrize("flags, legs, names", [
    (["--reward", "blue"], 1, ["blue"]), ([*BOTH], 2, ["blue"]),
    (["--reward", "blue,clip_image"], 2, ["blue", "clip_image"]),
    (["--reward", "blue,clip_image", "--reverse", "no"], 1, ["blue", "clip_image"]),
    (["--reward", "cycle"], 2, ["clip", "clip_direction", "clip_image"])])
def test_when_to_go_back(parts, tmp_path, monkeypatch, flags, legs, names):
    rolled = calls(monkeypatch, "rollout")
    rows = play(parts, tmp_path / "run", "--steps", 1, *flags)
    assert len(rolled) == legs and ("s_back" in rows[1]) == (legs == 2)
    assert sorted(k[7:] for k in rows[1] if k.startswith("reward_")) == names


def test_identity_earns_no_edit_reward():
    """Nothing done, nothing earned, whatever it preserves; the edit asked for earns; a scene drawn
    anew does not."""
    rng, metas, kinds = random.Random(0), [], ("add", "remove", "recolor", "replace", "move")
    for kind in kinds:
        row = sample_edit(rng, kind)
        metas.append(row["target_meta"] | row | dict(
            source_image=torch.from_numpy(render(row["source"])).permute(2, 0, 1), tag=kind,
            captions=[row[f"{k}_meta"]["prompt"] for k in ("source", "target")]))
    weights = {"*": dict(edit=1.0, clip_direction=1.0)}
    same = torch.stack([m["source_image"] for m in metas])
    scores = score(same, metas, weights)
    assert scores.names == ["edit", "clip_direction"] and not scores.values.any()
    done = torch.stack([torch.from_numpy(render(m["target"])).permute(2, 0, 1) for m in metas])
    R = score(done, metas, weights).values
    assert (R[:, 0] == 1).all() and (R[:, 1] > 0).all()
    assert score(done.roll(1, 0), metas, weights).values[:, 0].max() < 0.5


# --- what must not change the gradient ---


def test_ranks_and_micro_batches_of_main(parts, tmp_path):
    """One process = two processes = many micro-batches, with the bridge learning, too."""
    flags = [*BOTH, "--steps", 1, "--train", "both", "--guidance", 2, "--image-guidance", 1.5]
    play(parts, tmp_path / "one", *flags)
    want, norm = learned(tmp_path / "one")
    play(parts, tmp_path / "micro", *flags, "--micro", 5)
    ranks.rows(tmp_path / "ranks", lambda: play(parts, tmp_path / "ranks", *flags))
    # A picture's rounding moves the reference of its way back: a thousandth, not a millionth.
    for run, tol in (("micro", 1e-5), ("ranks", 1e-3)):
        got, its_norm = learned(tmp_path / run)
        close(got, want, tol)
        assert its_norm == pytest.approx(norm, rel=tol)          # clipping hides a wrong scale
        a, b = ([json.loads(line) for line in open(tmp_path / r / "log.jsonl")][-1]
                for r in ("one", run))
        assert a["reward_blue"] == pytest.approx(b["reward_blue"], abs=1e-6)
        assert a["kept"] == b["kept"] == 0.75


def test_reference_of_a_learning_bridge_is_the_initial_one(parts, tmp_path, monkeypatch):
    """--beta with --train both: the KL's other side must not follow the bridge that learns."""
    seen = []

    def spy(model, *inputs):
        (dit, bridge, _), guided = inputs[-1].policy, inputs[-1].branches
        assert model.bridge is not bridge and model.dit is not dit
        seen.append((guided[0][1].ctx.clone(), inputs[0][0][1].ctx.detach().clone()))
        return surrogate(model, *inputs)
    monkeypatch.setattr(cycle_edit, "surrogate", spy)
    (parts / "one.jsonl").write_text((parts / "edits.jsonl").read_text().splitlines()[0] + "\n")
    play(parts, tmp_path / "run", "--steps", 3, "--train", "both", "--beta", 1.0, "--lr", 0.05,
         "--reward", "blue", "--data", parts / "one.jsonl")
    (ref, own), *_, (last_ref, last_own) = seen
    torch.testing.assert_close(ref, own)                       # both start as one policy
    assert torch.equal(ref, last_ref) and (own - last_own).abs().max() > 1e-2


def test_shuffled_rewards_are_the_same_rewards(parts, tmp_path, monkeypatch):
    """The control row: the same numbers, but credit to other samples, of other groups too."""
    seen = calls(monkeypatch, "group_advantage")
    for name, flag in (("a", []), ("b", ["--shuffle"])):
        play(parts, tmp_path / name, *BOTH, "--steps", 1, *flag)
    (right, *_), (wrong, *_) = seen[0][0], seen[1][0]
    assert not torch.equal(right, wrong)
    assert torch.equal(right.flatten().sort()[0], wrong.flatten().sort()[0])


# --- a run ---


def test_resume_continues_as_if_never_stopped(noisy, tmp_path):
    flags = [*BOTH, "--steps", 4, "--train", "both", "--updates", 2, "--beta", 0.01,
             "--eval-every", 2]
    whole = play(noisy, tmp_path / "a", *flags)
    with tiny.killed_at(cycle_edit, "rollout", 6):               # two to an update
        play(noisy, tmp_path / "b", *flags)
    rows = (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 3                     # of which no checkpoint knows
    again = play(noisy, tmp_path / "b", *flags, "--resume")
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))

    def timeless(rows):
        return [{k: v for k, v in r.items() if k != "at" and not k.startswith("s_")} for r in rows]
    assert timeless(again) == timeless(whole)
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "config.json", "log.jsonl", "curves.png", "index.html", "results.json", "samples", "ckpt"}
    assert {p.stem for p in (tmp_path / "b" / "samples").iterdir()} == {
        "step_00000", "step_00002", "step_00004", "before", "after"}
    before = files(tmp_path)
    assert "holds another run: choose another --out" in complaint(
        play, noisy, tmp_path / "b", *flags)
    assert files(tmp_path) == before
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert {"success", "preservation", "both", "t2i"} <= results["before"].keys()


def test_drawing_goes_on_from_an_edit_run(parts, tmp_path):
    """PDTR: grpo.py --init out/EDITS draws with what edits have taught."""
    play(parts, tmp_path / "edit", "--reward", "blue", "--steps", 1, "--lr", 0.05)
    tiny.play(parts, tmp_path / "draw", "--steps", 1, "--lr", 0, "--init", tmp_path / "edit")
    runs = [config(parts, preset="shapes") for _ in range(2)]
    edit, draw = (tiny.build(c, init=tmp_path / run)
                  for c, run in zip(runs, ("edit", "draw")))
    base = tiny.build(runs[0], init=parts / "sft")
    for k, p in edit.state_dict().items():
        assert torch.equal(p, draw.state_dict()[k]), k
    assert any(not torch.equal(p, base.state_dict()[k]) for k, p in edit.state_dict().items())
    play(parts, tmp_path / "again", "--reward", "blue", "--steps", 1, "--init", tmp_path / "draw")


# --- data ---


def test_pictures_that_people_have(tmp_path):
    """A folder with metadata.jsonl; pictures of any mode and size become square RGB."""
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image, turned = Image.fromarray(rgb), Image.fromarray(rgb).getexif()
    turned[0x0112] = 3                                   # orientation: upside down
    image.save(tmp_path / "rgb.png")
    image.save(tmp_path / "turned.png", exif=turned)
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    names = ["rgb", "turned", "grey", "rgba"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(dict(
        source=f"{n}.png", instruction="invert it", inverse="invert it", source_prompt="a b",
        target_prompt="b a")) + "\n" for n in names))
    rows = read_edits(tmp_path)
    rgb, turned, grey, rgba = (source_picture(row, 64) for row in rows)
    assert all(x.shape == (3, 64, 64) and x.dtype == torch.uint8 for x in (rgb, turned, grey, rgba))
    assert torch.equal(rgb, rgba) and (grey[0] == grey[1]).all()
    assert (turned.flip(1, 2).int() - rgb.int()).abs().max() <= 1
    assert rows[0]["prompt"] == "b a" and rows[0]["captions"] == ["a b", "b a"]
    scene = sample_edit(random.Random(0))
    (tmp_path / "one.jsonl").write_text(json.dumps(scene) + "\n")
    (row,) = read_edits(tmp_path / "one.jsonl")
    assert torch.equal(source_picture(row, 64), torch.from_numpy(
        render(scene["source"])).permute(2, 0, 1))
    assert row["captions"] == [scene[f"{k}_meta"]["prompt"] for k in ("source", "target")]
    assert row["category"] == scene["kind"] and row["tag"] == scene["target_meta"]["tag"]
    assert row["include"] == scene["target_meta"]["include"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:           # as `prepare data` writes them
        for name in ("0.source.png", "0.target.png"):
            tar.add(tmp_path / "rgb.png", name)
        (tmp_path / "about").write_text('{"instruction": "invert it", "inverse": "invert it"}')
        tar.add(tmp_path / "about", "0.json")
    (row,) = read_edits(tmp_path / "0.tar")
    assert torch.equal(source_picture(row, 64), rgb)


def test_what_the_checker_of_edits_cannot_read(tmp_path):
    """It is said before anything is loaded, by line; a row's own category is not its kind."""
    def read(row):
        (tmp_path / "edits.jsonl").write_text(json.dumps(row) + "\n")
        args = SimpleNamespace(data=tmp_path / "edits.jsonl", eval_data="", reward="edit",
                               preset="shapes")
        return read_all(args, [{"recolor": {"edit": 1.0}}, {"recolor": {}}])
    good = sample_edit(random.Random(1), "recolor") | dict(category="simple")
    assert read(good)[0][0]["category"] == "recolor"
    meta = good["target_meta"]
    bare = [{k: v for k, v in part.items() if k != "color"} for part in meta["include"]]
    for row in (good | dict(target_meta=meta | dict(include=bare)),
                good | dict(target_meta=dict(prompt="a star"))):
        assert "edits.jsonl, line 1: reward 'edit' cannot check it" in complaint(read, row)


@pytest.mark.parametrize("kinds", [1, 3, 6, 7, 10])
def test_ten_edits_are_evenly_of_each_kind(kinds):
    rows = [dict(category=f"kind {i % kinds}", i=i) for i in range(100)]
    each = Counter(row["category"] for row in cycle_edit.ten_of(rows))
    assert len(each) == kinds and len({*each.values()}) == 1 and 5 < sum(each.values()) <= 10


def test_a_vlm_writes_what_inverses_are_missing(parts, vlm, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(judge_py, "has_bf16", lambda: False)
    rows = [json.loads(line) for line in open(parts / "edits.jsonl")]
    del rows[2]["inverse"]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rolled = calls(monkeypatch, "write_inverses")
    play(parts, tmp_path / "run", *BOTH, "--steps", 1, "--judge", vlm,
         "--data", tmp_path / "edits.jsonl")
    got, args = rolled[0][0][:2]
    assert isinstance(got[2]["inverse"], str) and got[2]["inverse"]
    assert [got[i]["inverse"] for i in (0, 1, 3)] == [rows[i]["inverse"] for i in (0, 1, 3)]
    # A run that goes on has the inverse that it began with, and asks nobody.
    assert [*json.loads((tmp_path / "run/inverses.json").read_text()).values()] == [
        got[2]["inverse"]]
    args.resume, row = "yes", {k: v for k, v in got[2].items() if k != "inverse"}
    with monkeypatch.context() as m:
        m.setattr(Judge, "ask_all", lambda *inputs: 1 / 0)
        write_inverses([row], args, 0, 1)
    assert row["inverse"] == got[2]["inverse"]
    # Not that of what stood there before; of a judge that thinks, what it says in the end.
    with monkeypatch.context() as m:
        m.setattr(Judge, "ask_all", lambda *inputs: ["<think>a hat?</think> add it"])
        other = {k: v for k, v in row.items() if k != "inverse"} | dict(instruction="take it off")
        write_inverses([other], args, 0, 1)
        assert other["inverse"] == "add it"
        m.setattr(Judge, "ask_all", lambda *inputs: ["<think>Okay, the user wants"])
        other = {k: v for k, v in other.items() if k != "inverse"} | dict(instruction="turn it")
        assert "the VLM wrote none" in complaint(write_inverses, [other], args, 0, 1)
    (tmp_path / "run/inverses.json").write_text("[1, {")
    assert "inverses.json cannot be read" in complaint(write_inverses, [row], args, 0, 1)
    # None is asked for where nobody goes back.
    play(parts, tmp_path / "edit", "--reward", "blue", "--steps", 1,
         "--data", tmp_path / "edits.jsonl")
    assert len(rolled) == 1


@pytest.mark.parametrize("flags, words", [
    ("--preset shape", "unknown --preset 'shape'; there are: shapes"),
    ("--preset unirl-zero --T 20 --data " + Args.data, "edits photos and needs --data of its own"),
    ("--reward geneva", "unknown reward 'geneva'"), ("--reward cycle:2", "not a number"),
    ('--reward {"add":"edit"} --data EDITS', "no mix for edits of kind 'move', and no '*'"),
    ("--preset deepgen", "which this script lacks"),
    ("--reverse maybe", "unknown --reverse 'maybe'; there are: auto, yes, no"),
    ("--step 3", "unrecognized arguments: --step 3"), ("--G 1", "--G 1: must be an integer"),
    ("--B 3", "--B 3 sources cannot be shared by 2 ranks"), ("--window 9", "must end before"),
    ("--updates 3", "cannot be shared by --updates 3"),
    ("--lora-rank 4 --train bridge", "--lora-rank adapts the DiT"),
    ("--data BAD", "bad.jsonl, line 2: its source cannot be read (ValueError"),
    ("--data NONE", "must be a file or folder that exists"), ("--data EMPTY", "holds no edits"),
    ("--data BACK", "back.jsonl, line 1: no `inverse` (nor have 0 other rows)"),
    ("--data GONE", "gone.jsonl, line 1: its source cannot be read (FileNotFoundError"),
    ("--data CUT", "cut.jsonl, line 1: its source cannot be read (ValueError"),
    ("--reward clip_direction --data BARE",
     "line 1: reward 'clip_direction' needs `source_prompt` and `target_prompt`"),
    ("--data TWO", "two.jsonl, line 1: its source cannot be read (ValueError: it is 2 pictures"),
    ("--data SCENE", "scene.jsonl, line 1: its source cannot be read (KeyError"),
    ("--refs all", "unknown --refs 'all'; there are: vlm, dit, both"),
    ("--init NONE", "must be a folder that exists"), ("--resume", "nothing to resume")])
def test_cycle_edit_refuses(parts, tmp_path, monkeypatch, flags, words):
    """In one line, and nothing is written."""
    if "--B" in flags:
        monkeypatch.setattr(cycle_edit, "setup", lambda: (0, 2, torch.device("cpu")))
    row = json.loads(open(parts / "edits.jsonl").readline())
    Image.fromarray(render(row["source"])).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    scene = row["source"][:1] + [dict(shape="circle")]
    (tmp_path / "bare.jsonl").write_text(json.dumps(
        {k: row[k] for k in ("source", "instruction", "inverse")}) + "\n")
    for name, change in dict(back=dict(inverse=""), gone=dict(source="gone.png"),
                             cut=dict(source="cut.png"), scene=dict(source=scene),
                             two=dict(source=["whole.png"] * 2)).items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | change) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + '\n{"source": 3, "instruction": "x"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    places = {n.upper(): f"{n}.jsonl" for n in ("bad", "bare", "empty", "back", "gone", "cut",
                                                "scene", "two")}
    places = {k: tmp_path / v for k, v in places.items()} | dict(
        NONE=tmp_path / "none", EDITS=parts / "edits.jsonl")
    flags = [str(places.get(f, f)) for f in flags.split()]
    before = files(tmp_path)
    assert words in complaint(play, parts, tmp_path / "run", *BOTH, *flags)
    assert files(tmp_path) == before and not (tmp_path / "run").exists()


def test_defaults_are_those_of_grpo():
    """What both scripts have means, and is, the same; but a sample costs twice as much."""
    other = dict(init="data/shapes/sft-edit", reward="cycle", out="out/cycle", B=8, steps=150,
                 lr=1.6e-4)                              # those of LOG.md's runs
    for name in vars(Args()).keys() & vars(grpo.Args()).keys():
        assert getattr(Args(), name) == other.get(name, getattr(grpo.Args(), name)), name


def test_a_flat_batch_learns_nothing(parts, tmp_path):
    rows = [json.loads(line) | dict(flat=True) for line in open(parts / "edits.jsonl")]
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    log = play(parts, tmp_path / "run", *BOTH, "--steps", 1, "--data", tmp_path / "flat.jsonl")
    assert log[1]["kept"] == 0 and log[1]["grad_norm"] == 0 and log[1]["ratio_off"] == 0
    assert not group_advantage(torch.ones(8, 1) / 3, torch.ones(8, 1), G).any()


def photos(parts, monkeypatch):
    """-> flags of another world: the training's own rewards are all there is."""
    monkeypatch.setitem(presets_py.PRESETS, "photos", config(parts, preset="photos"))
    return ["--preset", "photos", "--init", parts / "dit", "--reward", "blue,clip_image",
            "--steps", 1]


def test_photos_have_no_checker(parts, tmp_path, monkeypatch, capsys):
    """Nor a score, unless edits are held out: those trained are looked at and no more."""
    panels = calls(monkeypatch, "redraw", record_py)
    rows = play(parts, tmp_path / "run", *photos(parts, monkeypatch))
    assert not any({"score", "success"} & r.keys() for r in rows)
    assert "no held-out edits" in capsys.readouterr().out
    assert [p[0] for p in panels[0][0][1:]] == ["reward_blue", "grad_norm"]
    assert not (tmp_path / "run" / "results.json").exists()
    assert {p.stem for p in (tmp_path / "run/samples").iterdir()} == {"step_00000", "step_00001"}


def test_held_out_edits_of_photos(parts, tmp_path, monkeypatch, capsys):
    """--eval-data has a folder of its own; its rows alone are shown and scored."""
    rng = random.Random(1)
    rows = [sample_edit(rng) | dict(flat=False) for _ in range(3)]
    for i, row in enumerate(rows):
        Image.fromarray(render(row["source"])).save(tmp_path / f"{i}.png")
        row["source"] = f"{i}.png"
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    scored = calls(monkeypatch, "score")
    flags = [*photos(parts, monkeypatch), "--eval-data", tmp_path]
    log = play(parts, tmp_path / "run", *flags)
    looks = [inputs[1] for inputs, _ in scored if "group" not in inputs[1][0]]
    assert len(looks) == 4                               # two looks, edited and cycled
    for metas in looks:
        assert [m["instruction"] for m in metas] == [r["instruction"] for r in rows]
        for m in metas:
            image = torch.from_numpy(np.array(Image.open(tmp_path / m["source"]))).permute(2, 0, 1)
            assert torch.equal(m["source_image"], image)
    first = torch.cat([scores.values for _, scores in scored[:2]], 1)    # (3,2)
    assert first[:, 0].isnan().all()                     # a rank in a group of one: not scored
    assert log[0]["score"] == pytest.approx(first[:, 1].mean().item(), abs=1e-5)
    assert "no held-out" not in capsys.readouterr().out

    # What is trained is not held out: the same picture, of whatever file, and instruction.
    trained = json.loads(open(parts / "edits.jsonl").readline())
    Image.fromarray(render(trained["source"])).save(tmp_path / "1.png")
    rows[1] |= dict(instruction=trained["instruction"])
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    before = files(tmp_path)
    said = complaint(play, parts, tmp_path / "both", *flags)
    assert "line 2: its picture and instruction are in" in said and "of 1 in 3" in said
    for more, words in ((["--eval-data", tmp_path / "none"], "must be a file"),
                        (["--preset", "shapes"], "--eval-data is for photos")):
        assert words in complaint(play, parts, tmp_path / "both", *flags, *more)
    assert files(tmp_path) == before
