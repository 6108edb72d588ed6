"""The real reflect.py, on tiny real parts: words and steps both start at ratio 1 and learn from one
advantage, and a critique that says nothing of use costs its reward and nothing else."""

import json
import random

import pytest
import ranks
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import complaint, files
from test_grpo import G, close, config, learned, saved

import common.presets as presets_py
import cycle_edit
import reflect
from data.shapes.captions import sample_meta
from data.shapes.talk import picture
from data.shapes.world import render
from common.checkpoint import save_checkpoint
from common.draw import NEXT_ROUND, draw_reflecting
from common.weights import learn
from common.words import spell, verdict
from model import Unified
from reflect import Args, read_pool, token_surrogate


def play(parts, out, *flags, **more):
    return tiny.play(parts, out, *flags, main=reflect.main, **more)


def teach(parts, folder):
    """A folder of parts whose language model says yes, no and why, or nonsense, about as often,
    whatever it sees; and whose preset adds noise to references, as UniRL-Zero's."""
    folder.mkdir()
    for part in ("vae", "dit", "pool.jsonl"):
        (folder / part).symlink_to(parts / part)
    model, rng = tiny.build(config(parts)), random.Random(0)
    scene = picture(sample_meta("colors", rng), rng, True)
    image = torch.from_numpy(render(scene)).permute(2, 0, 1)
    opt = torch.optim.Adam(learn(model, {"vlm": None}).vlm.model.language_model.parameters(), 1e-2)
    for _ in range(60):
        prompts = [sample_meta("colors", rng)["prompt"] for _ in range(16)]
        words = spell(model, [rng.choice(["yes", "no, red", "no, the image shows a star", "star"])
                             for _ in prompts])
        logp = model.text_logp(prompts, [[image]] * 16, words, "critique")
        (-logp.sum() / words.mask.sum()).backward()
        opt.step()
        opt.zero_grad()
    model.vlm.save_pretrained(folder / "vlm")
    for file in (parts / "vlm").iterdir():
        if not (folder / "vlm" / file.name).exists():
            (folder / "vlm" / file.name).symlink_to(file)
    cfg = config(parts, vlm=str(folder / "vlm"), ref_noise=0.2)
    save_checkpoint(folder / "sft", load_file(parts / "sft/model.safetensors"), cfg, 0)
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    return folder


@pytest.fixture(scope="module")
def talker(parts, tmp_path_factory):
    return teach(parts, tmp_path_factory.mktemp("reflect") / "talker")


def calls(monkeypatch, name, where=reflect):
    """What main hands to one of its functions, and gets back: [(inputs, output)]"""
    seen, real = [], getattr(where, name)

    def spy(*inputs):
        seen.append((inputs, real(*inputs)))
        return seen[-1][1]
    monkeypatch.setattr(where, name, spy)
    return seen


def part(out, name):
    """A part of a run's checkpoint as one vector; the config's own where the run has none."""
    tensors = load_file(out / "ckpt" / "model.safetensors")
    return torch.cat([v.flatten() for k, v in tensors.items() if k.startswith(name + ".")])


# --- the ratio at the first update ---


@pytest.mark.parametrize("bf16", [False, True])
def test_first_update_has_ratio_one(talker, tmp_path, monkeypatch, bf16):
    """With guidance, noise on references, and another batch than the rollout's. What is kept of the
    words is also what they were drawn with."""
    said, climbed = calls(monkeypatch, "generate", Unified), calls(monkeypatch, "token_surrogate")
    rows = play(talker, tmp_path / "run", "--steps", 1, "--guidance", 2, "--micro", 5, bf16=bf16)
    assert [r["step"] for r in rows] == [0, 1]
    # bf16 sums in another order in another batch, and conditions are encoded once more.
    assert rows[1]["ratio_off"] <= (Args().clip / 2 if bf16 else 1e-6)
    assert rows[1]["lm_ratio_off"] <= (Args().lm_clip / 2 if bf16 else 1e-5)
    assert rows[1]["grad_norm"] > 0 and rows[1]["lm_grad_norm"] > 0
    assert 0 < rows[1]["redrawn"] < 1
    assert not {"clipped", "lm_clipped"} & rows[1].keys()               # at such ratios none can be
    (words,) = [w for inputs, w in said if inputs[-1] == G]              # others are greedy
    old = torch.cat([inputs[1] for inputs, _ in climbed])                # those redrawn come first
    again = torch.tensor([verdict(t)[0] is not False for t in words.texts]).argsort(stable=True)
    torch.testing.assert_close(old, words.logp[again], atol=0.1 if bf16 else 1e-4, rtol=0)
    assert (words.logp.exp()[words.mask] < 0.9).any()                # it was in doubt at times


def test_another_temperature_would_be_seen(talker, tmp_path, monkeypatch):
    """The words' policy is the tempered one: scored at temperature 1 its ratio would be off."""
    real = Unified.encode_words
    monkeypatch.setattr(Unified, "encode_words", lambda self, *inputs: real(
        self, *inputs[:4], inputs[4] and (1.0 if torch.is_grad_enabled() else 2.0), *inputs[5:]))
    rows = play(talker, tmp_path / "run", "--steps", 1, "--temperature", 2)
    assert rows[1]["lm_ratio_off"] > 0.1


# --- what a group is, and what becomes of a sample ---


def test_groups_and_shared_advantage(talker, tmp_path, monkeypatch):
    said, rolled = calls(monkeypatch, "generate", Unified), calls(monkeypatch, "rollout")
    scored, compared = calls(monkeypatch, "score"), calls(monkeypatch, "group_advantage")
    steps, tokens = calls(monkeypatch, "surrogate"), calls(monkeypatch, "token_surrogate")
    play(talker, tmp_path / "run", "--steps", 1)
    (_, prompts, images, *_), words = next(c for c in said if c[0][-1] == G)
    (last, looks, *_), _ = scored[0]
    assert len(prompts) == len(images) == 4 and len(words.texts) == len(looks) == 16
    # A group is of one prompt and one first image, by turns a wrong and a right one.
    assert [m["prompt"] for m in looks] == [p for p in prompts for _ in range(G)]
    firsts = torch.stack([row[0].image for row in images]).repeat_interleave(G, 0)
    assert [m["right"] for m in looks] == [i // G % 2 == 1 for i in range(16)]
    for m, x in zip(looks, firsts):
        assert torch.equal(x, torch.from_numpy(render(m["source"])).permute(2, 0, 1))
    # Yes, or neither: the first image stays. No: it is redrawn, from one noise to a group.
    says = [verdict(t)[0] for t in words.texts]
    assert {True, False, None} == set(says)
    (inputs, path), = rolled
    model, ((_, cond),), _, _, keys, *_ = inputs
    x0 = path.x0
    again = [i for i, s in enumerate(says) if s is False]
    assert len(keys) == len(again) == len(x0) and torch.equal(
        last[again], model.to_images(x0).cpu())
    kept = [i for i in range(16) if i not in again]
    assert torch.equal(last[kept], firsts[kept]) and not torch.equal(last[again], firsts[again])
    for a, i in enumerate(again):
        for b, j in enumerate(again):
            alike = i // G == j // G
            assert (keys[a][0] == keys[b][0]) == alike and (keys[a][1] == keys[b][1]) == (i == j)
            assert torch.equal(cond.refs[a][0], cond.refs[b][0]) == alike    # noise and all
    # Its rewards.
    R, W = compared[0][0][:2]
    assert R[:, 0].tolist() == [float(s is m["right"]) for s, m in zip(says, looks)]
    formed = [float(verdict(t)[1] and c) for t, c in zip(words.texts, words.closed.tolist())]
    assert R[:, 1].tolist() == formed and 0 < sum(formed) < 16
    assert torch.equal(R[:, 2:], scored[0][1].values) and (W == 1).all()
    # One advantage for its words and its steps; sums over the batch, whatever came of it.
    (drawn, _), (spoken, _), (others, _) = *steps, *tokens
    A = compared[0][1]
    A = A / (A.square().mean() ** 0.5 + 1e-4)
    torch.testing.assert_close(spoken[3], A[again])
    torch.testing.assert_close(others[3], A[kept])
    assert torch.equal(spoken[3], drawn[4]) and drawn[2].tolist() == [*range(len(again))]
    assert drawn[6] == 16 * 3
    # All groups weigh the same, in each all tokens.
    weight = torch.zeros(16)
    weight[again + kept] = torch.cat([spoken[4], others[4]])
    total = (weight * words.mask.sum(1)).view(4, G).sum(1)
    torch.testing.assert_close(total, torch.full((4,), 1 / 4))
    assert (weight.view(4, G) == weight[::G, None]).all() and weight.std() > 0


def test_only_some_are_redrawn(talker, tmp_path, monkeypatch):
    """--redraw 2 of 4: a pair of a wrong and a right one; of the others the words alone count."""
    said, rolled = calls(monkeypatch, "generate", Unified), calls(monkeypatch, "rollout")
    compared = calls(monkeypatch, "group_advantage")
    rows = play(talker, tmp_path / "run", "--steps", 1, "--redraw", 2)
    (_, words), = [c for c in said if c[0][-1] == G]
    no = [verdict(t)[0] is False for t in words.texts]
    W = compared[0][0][1].view(4, G, -1)
    assert (W[..., :2] == 1).all() and (W[:2, :, 2:] == 1).all() and (W[2:, :, 2:] == 0).all()
    assert any(no[2 * G :]) and len(rolled[0][0][4]) == sum(no[: 2 * G])
    assert rows[1]["redrawn"] == sum(no[: 2 * G]) / 16 and rows[1]["lm_ratio_off"] <= 1e-5


def test_who_says_nothing_of_use(parts, tmp_path):
    """A language model that was taught nothing: no verdict, no form, no redrawing, no crash."""
    rows = play(parts, tmp_path / "run", "--steps", 1, "--train", "dit")
    assert rows[1]["reward_verdict"] == rows[1]["reward_format"] == rows[1]["redrawn"] == 0
    assert rows[1]["grad_norm"] == 0 and rows[0]["accuracy"] == 0 and rows[0]["damaged"] == 0


def test_cut_off_critiques_lack_form(talker, tmp_path):
    rows = play(talker, tmp_path / "run", "--steps", 1, "--limit", 1)
    assert rows[1]["reward_format"] == 0 and rows[1]["reward_verdict"] > 0 and rows[1]["words"] == 1


@pytest.mark.parametrize("text, says, form", [
    ("yes", True, True), ("Yes.", True, True), (" yes, it does", True, True),
    ("no, the image shows a star", False, True), ("No. The star is red", False, True),
    ("no", False, False), ("no,", False, False), ("north", None, False), ("yesterday", None, False),
    ("", None, False), ("the image shows no star", None, False), ("\x00<think>", None, False)])
def test_verdict(text, says, form):
    assert verdict(text) == (says, form)


# --- what learns ---


def test_what_learns(talker, tmp_path, monkeypatch):
    """--train: in `both` what is drawn teaches the language model, too, through the queries."""
    check_what_learns(talker, tmp_path, monkeypatch, play)


def check_what_learns(talker, tmp_path, monkeypatch, play, *task):
    """--train moves its parts and no other; in `both` what is drawn reaches the language model."""
    base = tiny.build(config(talker), init=talker / "sft").state_dict()
    flags = [*task, "--steps", 1, "--lr", 0.01, "--lm-lr", 0.01, "--ema", 0]
    for what, parts in dict(lm={"vlm"}, dit={"dit"}, both={"vlm", "dit", "bridge"}).items():
        play(talker, tmp_path / what, *flags, "--train", what)
        new = tiny.build(config(talker), init=tmp_path / what).state_dict()
        moved = {k for k, v in base.items() if not torch.equal(v, new[k])}
        assert {k.split(".")[0] for k in moved} == parts
        assert not any("visual" in k for k in moved)
    # Steps alone, no words: the only way to the language model is through the condition.
    monkeypatch.setattr(reflect, "token_surrogate", lambda *inputs: tuple(
        x * weight for x, weight in zip(token_surrogate(*inputs), (0, 1))))
    for what, reached in dict(lm=False, both=True).items():
        row = play(talker, tmp_path / f"no-words-{what}", *flags, "--train", what)[-1]
        assert (row["lm_grad_norm"] > 1e-5) == reached, what


def test_rewards_move_the_words(talker, tmp_path):
    """Twelve updates on form alone: nonsense dies out. A sign slip would breed it."""
    rows = play(talker, tmp_path / "run", "--steps", 12, "--train", "lm", "--verdict", 0,
                "--reward", "blue:0.001", "--norm", "joint", "--lm-lr", 0.01, "--eval-every", 12)
    assert rows[1]["reward_format"] < 0.7 < sum(r["reward_format"] for r in rows[-5:]) / 5 - 0.15


@pytest.mark.parametrize("flags", [[], ["--lora-rank", 2, "--vlm-lora-rank", 2]])
def test_reference_is_the_initial_policy(talker, tmp_path, flags):
    """KL of words and steps is 0 at first, and no longer once both have moved."""
    rows = play(talker, tmp_path / "run", "--steps", 3, "--beta", 0.1, "--lm-beta", 0.1, "--lr",
                0.02, "--lm-lr", 0.002, *flags)
    assert rows[1]["kl"] == rows[1]["lm_kl"] == 0
    assert min(rows[3]["kl"], rows[3]["lm_kl"]) > 1e-6


# --- what must not change the gradient ---


@pytest.mark.parametrize("train", ["lm", "dit", "both"])
def test_ranks_and_micro_batches_of_main(talker, tmp_path, train):
    """One process = two processes = many micro-batches."""
    flags = ["--steps", 1, "--train", train, "--guidance", 2]
    play(talker, tmp_path / "one", *flags)
    want, norm = learned(tmp_path / "one")
    play(talker, tmp_path / "micro", *flags, "--micro", 3)
    if train == "both":
        ranks.rows(tmp_path / "ranks", lambda: play(talker, tmp_path / "ranks", *flags))
    for run in ("micro", "ranks") if train == "both" else ["micro"]:
        got, its_norm = learned(tmp_path / run)
        close(got, want, 1e-4)
        a, b = ([json.loads(line) for line in open(tmp_path / r / "log.jsonl")][-1]
                for r in ("one", run))
        norms = dict(lm={"lm_grad_norm"}, dit={"grad_norm"}, both={"grad_norm", "lm_grad_norm"})
        assert {k for k in a if k.endswith("grad_norm")} == norms[train]    # what learns has one
        for k in (*norms[train], "reward_verdict", "reward_format", "reward_blue", "redrawn",
                  "kept"):
            assert b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-6), k


def test_shuffled_rewards_are_the_same_rewards(talker, tmp_path, monkeypatch):
    """The control row: the same numbers, but credit to other samples, of other groups too."""
    seen = calls(monkeypatch, "group_advantage")
    for name, flag in (("a", []), ("b", ["--shuffle"])):
        play(talker, tmp_path / name, "--steps", 1, *flag)
    (right, *_), (wrong, *_) = seen[0][0], seen[1][0]
    assert not torch.equal(right, wrong)
    assert sorted(right.tolist()) == sorted(wrong.tolist())


# --- a run ---


def test_resume_continues_as_if_never_stopped(talker, tmp_path):
    flags = ["--steps", 4, "--updates", 2, "--beta", 0.01, "--lm-beta", 0.01, "--eval-every", 2,
             "--rounds", 2]
    whole = play(talker, tmp_path / "a", *flags)
    with tiny.killed_at(reflect, "group_advantage", 3):
        play(talker, tmp_path / "b", *flags)
    rows = (tmp_path / "b" / "log.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 3                     # of which no checkpoint knows
    again = play(talker, tmp_path / "b", *flags, "--resume")
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))

    def timeless(rows):
        return [{k: v for k, v in r.items() if k != "at" and not k.startswith("s_")} for r in rows]
    assert timeless(again) == timeless(whole)
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "config.json", "log.jsonl", "curves.png", "index.html", "results.json", "samples", "ckpt"}
    assert {p.stem for p in (tmp_path / "b" / "samples").iterdir()} >= {
        "step_00000", "step_00002", "step_00004"}
    before = files(tmp_path)
    assert "holds another run: choose another --out" in complaint(
        play, talker, tmp_path / "b", *flags)
    assert files(tmp_path) == before
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert {"accuracy", "corrected", "damaged", "t2i"} <= results["before"].keys()


def test_rounds(talker, monkeypatch):
    """draw_reflecting asks until it hears yes, or nothing of use, and redraws the last picture."""
    model = tiny.build(config(talker), init=talker / "sft")
    answers = iter([["yes", "no, red", "star", "no, red"], ["no, blue", "yes"], ["no, green"]])
    shown = []

    def generate(prompts, images, task, limit, temperature):
        shown.append([look.image.clone() for look, in images])
        return spell(model, next(answers))
    monkeypatch.setattr(model, "generate", generate)
    first = torch.stack(tiny.pictures(*[(64, 64)] * 4))
    last, said = draw_reflecting(model, list("abcd"), first, range(4), rounds=3, steps=2)
    assert said == [["yes"], ["no, red", "no, blue", "no, green"], ["star"], ["no, red", "yes"]]
    assert [len(x) for x in shown] == [4, 2, 1]
    assert torch.equal(last[[0, 2]], first[[0, 2]])
    assert torch.equal(last[3], shown[1][1]) and not torch.equal(last[3], first[3])
    assert tiny.apart(last[1].float(), shown[2][0].float())              # of another noise, too
    assert torch.equal(first, torch.stack(tiny.pictures(*[(64, 64)] * 4)))
    assert tiny.apart(model.noise([1]), model.noise([1 + NEXT_ROUND]))   # each round has its own
    # The words matter, and each row's alone.
    answers = iter([["no, red"], ["no, blue"]])
    alone, other = (draw_reflecting(model, ["b"], first[1:2], [1], 1, 2)[0] for _ in range(2))
    assert (alone[0].int() - shown[1][0].int()).abs().max() <= 1 and tiny.apart(
        alone.float(), other.float())


def test_pictures_that_people_have(talker, tmp_path, monkeypatch, capsys):
    """A folder of files, of which a row may have one; another world has no benchmark."""
    rows, rng = [], random.Random(0)
    for i in range(3):
        meta = sample_meta("colors", rng)
        for side in ("right", "wrong"):
            Image.fromarray(render(picture(meta, rng, side == "right"))).resize((80, 70)).save(
                tmp_path / f"{side}{i}.png")
        rows.append(dict(prompt=meta["prompt"], flat=False, right=f"right{i}.png",
                         wrong=f"wrong{i}.png"))
    del rows[0]["wrong"], rows[1]["right"]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pools = read_pool(tmp_path)
    assert [[r["source"] for r in pool] for pool in pools] == [
        ["wrong1.png", "wrong2.png"], ["right0.png", "right2.png"]]
    assert [[r["right"] for r in pool] for pool in pools] == [[False] * 2, [True] * 2]
    monkeypatch.setitem(presets_py.PRESETS, "photos", config(talker, preset="photos"))
    log = play(talker, tmp_path / "run", "--preset", "photos", "--init", talker / "dit", "--reward",
               "blue,clip_image", "--steps", 1, "--data", tmp_path)
    assert -1 <= log[1]["reward_clip_image"] <= 1
    assert not (tmp_path / "run" / "results.json").exists()
    # What is trained is no measure: pictures to look at, and no score.
    assert not any({"accuracy", "score", "corrected"} & r.keys() for r in log)
    assert "no held-out rows" in capsys.readouterr().out
    assert (tmp_path / "run/samples/step_00001.png").exists()

    # Of a folder of its own, whose pictures and prompts are looked at and scored.
    other = tmp_path / "other"
    other.mkdir()
    for file in ("right2.png", "wrong2.png"):
        (other / file).write_bytes((tmp_path / file).read_bytes())
    row = dict(rows[2], prompt="a photo of a pink star", flat=True)
    (other / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--preset", "photos", "--init", talker / "dit", "--reward", "blue", "--data", tmp_path,
             "--steps", 1, "--eval-data", other]
    scored = calls(monkeypatch, "score")
    log = play(talker, tmp_path / "held", *flags)
    looks = [inputs[1] for inputs, _ in scored if "group" not in inputs[1][0]]
    assert len(looks) == 2 and {m["prompt"] for m in looks[0]} == {row["prompt"]}
    assert {m["folder"] for m in looks[0]} == {other} and len(looks[0]) == 10
    assert all(r["score"] == pytest.approx(1 / 3) and 0 <= r["accuracy"] <= 1 for r in log)
    assert "no held-out" not in capsys.readouterr().out

    (other / "metadata.jsonl").write_text(json.dumps(rows[2]) + "\n")
    before = files(tmp_path)
    assert "line 1: its prompt is in" in complaint(play, talker, tmp_path / "both", *flags)
    assert "--eval-data is for photos" in complaint(
        play, talker, tmp_path / "both", "--eval-data", other)
    assert files(tmp_path) == before


@pytest.mark.parametrize("flags, words", [
    ("--preset shape", "unknown --preset 'shape'; there are: shapes"),
    ("--preset flow-grpo --data POOL", "has no language model that could answer"),
    ("--preset unirl-zero --data " + Args.data, "draws photos and needs --data of its own"),
    ("--preset deepgen", "which this script lacks"),
    ("--reward geneva", "unknown reward 'geneva'"),
    ('--reward {"colors":"blue"}', "no mix for prompts of category 'position', and no '*'"),
    ("--reward edit", "line 1: reward 'edit' needs `kind`"),
    ("--train bridge", "unknown --train 'bridge'; there are: lm, dit, both"),
    ("--step 3", "unrecognized arguments: --step 3"), ("--G 1", "--G 1: must be an integer"),
    ("--B 3", "--B 3 rows cannot be shared by 2 ranks"), ("--window 9", "must end before"),
    ("--updates 3", "cannot be shared by --updates 3"), ("--temperature 0", "[0.01, 100]"),
    ("--top-p 0", "--top-p 0.0: must be a number in (0, 1]"), ("--rounds 0", "[1, 100]"),
    ("--lora-rank 4 --train lm", "--lora-rank adapts the DiT, --vlm-lora-rank the language model; "
     "of --task reflect, --train lm learns: vlm"),
    ("--vlm-lora-rank 4 --train dit", "of --task reflect, --train dit learns: dit"),
    ("--data BAD", "bad.jsonl, line 2: no prompt"),
    ("--data NONE", "must be a file or folder that exists"),
    ("--data EMPTY", "no row has a first image that is wrong"),
    ("--data ONE", "no row has a first image that is right, `right`"),
    ("--data GONE", "gone.jsonl, line 1: its source cannot be read (FileNotFoundError"),
    ("--data SCENE", "scene.jsonl, line 1: its source cannot be read (KeyError"),
    ("--refs all", "unknown --refs 'all'; there are: vlm, dit, both"),
    ("--init NONE", "must be a folder that exists"), ("--resume", "nothing to resume")])
def test_reflect_refuses(talker, tmp_path, monkeypatch, flags, words):
    """In one line, and nothing is written."""
    if "--B" in flags:
        monkeypatch.setattr(reflect, "setup", lambda: (0, 2, torch.device("cpu")))
    row = json.loads(open(talker / "pool.jsonl").readline())
    for name, change in dict(gone=dict(right="gone.png"), one=dict(right=None),
                             scene=dict(right=[dict(shape="circle")])).items():
        new = {k: v for k, v in (row | change).items() if v is not None}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(new) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + '\n{"right": "x.png"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    places = {n.upper(): tmp_path / f"{n}.jsonl" for n in ("bad", "empty", "one", "gone", "scene")}
    places |= dict(NONE=tmp_path / "none", POOL=talker / "pool.jsonl")
    flags = [str(places.get(f, f)) for f in flags.split()]
    before = files(tmp_path)
    assert words in complaint(play, talker, tmp_path / "run", *flags)
    assert files(tmp_path) == before and not (tmp_path / "run").exists()


def test_defaults_are_those_of_cycle_edit():
    """What both scripts have means, and is, the same."""
    other = dict(B=128, init="out/sft-reflect", reward="geneval", out="out/reflect", train="both",
                 data="data/shapes/prompts/reflect_train.jsonl", lr=8e-5, steps=200)
    for name in vars(Args()).keys() & vars(cycle_edit.Args()).keys():
        assert getattr(Args(), name) == other.get(name, getattr(cycle_edit.Args(), name)), name
