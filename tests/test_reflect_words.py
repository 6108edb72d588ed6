"""The real reflect.py where it thinks or answers, on tiny real parts: thoughts and pictures learn
from one advantage, answers alone from theirs, and nothing that should not matter changes what is
learned."""

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
from test_reflect import check_what_learns

import common.presets as presets_py
import reflect
from data.shapes.captions import sample_meta, scene_for
from common.checkpoint import save_checkpoint
from common.weights import learn
from common.words import answers, spans, spell
from model import Unified
from reflect import Args, token_surrogate

THOUGHTS = ["<think>red</think><answer>a star</answer>",
            "<think>blue</think><answer>a ring</answer>", "<think>red for ever", "a star"]
COT = ["--task", "cot", "--limit", 16]


def play(parts, out, *flags, **more):
    return tiny.play(parts, out, *flags, main=reflect.main, **more)


@pytest.fixture(scope="module")
def talker(parts, tmp_path_factory):
    """Parts whose language model thinks in four ways, of which two keep the form, and says yes as
    often as no, whatever it is asked."""
    folder, rng = tmp_path_factory.mktemp("words") / "talker", random.Random(0)
    folder.mkdir()
    for part in ("vae", "dit", "prompts.jsonl"):
        (folder / part).symlink_to(parts / part)
    model = learn(tiny.build(config(parts)), {"vlm": None})
    opt = torch.optim.Adam(model.vlm.model.language_model.parameters(), 1e-2)
    image = tiny.pictures((64, 64))
    for _ in range(70):
        prompts = [sample_meta("colors", rng)["prompt"] for _ in range(16)]
        thoughts = spell(model, rng.choices(THOUGHTS, k=16))
        said = spell(model, rng.choices(["yes", "no"], k=16))
        loss = -(model.text_logp(prompts, None, thoughts).sum() / thoughts.mask.sum()
                 + model.text_logp(prompts, None, said, "answer").sum() / 64
                 + model.text_logp(prompts, [image] * 16, said, "answer").sum() / 64)
        loss.backward()
        opt.step()
        opt.zero_grad()
    model.vlm.save_pretrained(folder / "vlm")
    for file in (parts / "vlm").iterdir():
        if not (folder / "vlm" / file.name).exists():
            (folder / "vlm" / file.name).symlink_to(file)
    cfg = config(parts, vlm=str(folder / "vlm"))
    save_checkpoint(folder / "sft", load_file(parts / "sft/model.safetensors"), cfg, 0)
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    for name in ("text", "vqa"):
        rows = []
        for i in range(8):
            meta = sample_meta("colors", rng)
            row = dict(tag="color", question=f"Is there {meta['prompt']}?",
                       answer="yes" if i % 2 else "No.")
            rows.append(row | (dict(scene=scene_for(meta, rng)) if name == "vqa" else {}))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def calls(monkeypatch, name, where=reflect):
    """What main hands to one of its functions, and gets back: [(inputs, output)]"""
    seen, real = [], getattr(where, name)

    def spy(*inputs, **more):
        seen.append((inputs, real(*inputs, **more)))
        return seen[-1][1]
    monkeypatch.setattr(where, name, spy)
    return seen


# --- the ratio at the first update ---


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("more", [[], ["--answer-only"]])
def test_first_update_has_ratio_one(talker, tmp_path, monkeypatch, bf16, more):
    """Of tokens and of steps, with guidance, and in other batches than the rollout's. What is kept
    of the words is also what they were drawn with."""
    said, climbed = calls(monkeypatch, "generate", Unified), calls(monkeypatch, "token_surrogate")
    compared = calls(monkeypatch, "group_advantage")
    rows = play(talker, tmp_path / "run", *COT, "--steps", 1, "--guidance", 2, "--micro", 5,
                     "--temperature", 1.3, *more, bf16=bf16)
    # Rounding alone: random weights, as these are, do it worse than learned ones.
    assert rows[1]["ratio_off"] <= (Args().clip / 5 if bf16 else 1e-6)
    assert rows[1]["lm_ratio_off"] <= (Args().lm_clip / 4 if bf16 else 1e-5)
    assert rows[1]["grad_norm"] > 0 and rows[1]["lm_grad_norm"] > 0
    assert not {"clipped", "lm_clipped"} & rows[1].keys()        # at these ratios none can be
    (words,) = [w for inputs, w in said if inputs[-1] == G]       # others are the evaluation's
    old = torch.cat([inputs[1] for inputs, _ in climbed])
    kept = (compared[0][1].view(4, G).abs().amax(1) > 0).repeat_interleave(G)
    torch.testing.assert_close(old, words.logp[kept], atol=0.1 if bf16 else 1e-4, rtol=0)
    assert (words.logp.exp()[words.mask] < 0.9).any()                   # it was in doubt at times


def test_another_temperature_would_be_seen(talker, tmp_path, monkeypatch):
    real = Unified.encode_words
    monkeypatch.setattr(Unified, "encode_words", lambda self, *inputs: real(
        self, *inputs[:4], inputs[4] and (1.0 if torch.is_grad_enabled() else 2.0), *inputs[5:]))
    rows = play(talker, tmp_path / "run", *COT, "--steps", 1, "--temperature", 2)
    assert rows[1]["lm_ratio_off"] > 0.1


# --- one advantage for both ---


def test_groups_and_shared_advantage(talker, tmp_path, monkeypatch):
    """A group is G thoughts x M pictures of one prompt; a thought's tokens have the mean advantage
    of its pictures, whose steps have their own; all pictures of a group start from one noise."""
    M = 2
    said, drawn = calls(monkeypatch, "generate", Unified), calls(monkeypatch, "rollout")
    compared, scored = calls(monkeypatch, "group_advantage"), calls(monkeypatch, "score")
    steps, tokens = calls(monkeypatch, "surrogate"), calls(monkeypatch, "token_surrogate")
    rows = play(talker, tmp_path / "run", *COT, "--steps", 1, "--images-per-thought", M,
                     "--micro", 0, "--norm", "joint")
    ((R, W, group, _), A), = compared
    (_, metas, *_), _ = scored[0]
    assert group == G * M and len(R) == len(metas) == 4 * group
    (inputs, words), = [c for c in said if c[0][-1] == G]
    assert [m["prompt"] for m in metas[::group]] == inputs[1]
    ok = [spans(t)["ok"] and bool(end) for t, end in zip(words.texts, words.closed)]
    assert R[:, 1].tolist() == [float(x) for x in ok for _ in range(M)]   # of a thought, for all
    assert 0 < sum(ok) < len(ok) and W[0].tolist() == [1, pytest.approx(0.2)]
    (mine, _), (theirs, _) = tokens[0], steps[0]
    whose, credit = theirs[2], theirs[4]
    kept = A.view(4, group).abs().amax(1) > 0
    torch.testing.assert_close(credit, A[kept.repeat_interleave(group)])
    torch.testing.assert_close(mine[3], credit.view(-1, M).mean(1))
    assert whose.tolist() == [i for i in range(len(mine[3])) for _ in range(M)]
    assert rows[1]["kept"] == kept.float().mean()
    # All groups weigh the same, in each all tokens.
    total = (mine[4] * mine[2].sum(1)).view(-1, G).sum(1)
    torch.testing.assert_close(total, torch.full_like(total, 1 / 4))
    keys = drawn[0][0][4]
    assert [len({a for a, _ in keys[i : i + group]}) for i in range(0, len(keys), group)] == [1] * 4
    assert len({b for _, b in keys}) == len(keys) == 4 * group
    assert len({*inputs[-2]} | {b + i for _, b in keys for i in range(6)}) == 4 * G + 6 * len(keys)


def test_the_dit_is_told_the_words(talker, tmp_path, monkeypatch):
    """Prompt, thought and answer; or the answer alone, and the prompt where there is none."""
    read, said = (calls(monkeypatch, name, Unified) for name in ("encode_words", "generate"))
    for name, more in (("all", []), ("answer", ["--answer-only"])):
        read.clear()
        said.clear()
        play(talker, tmp_path / name, *COT, "--steps", 1, *more)
        (inputs, _), *_ = [c for c in read if len(c[0][1]) == 16]
        if more:
            (asked, words), = [c for c in said if c[0][-1] == G]
            assert inputs[3:5] == (None, "t2i") and "a star" in inputs[1]
            assert inputs[1] == answers([p for p in asked[1] for _ in range(G)], words)
        else:
            assert inputs[4] == "think" and any(spans(t)["ok"] for t in inputs[3].texts)
    words = spell(tiny.build(config(talker)), THOUGHTS)
    assert answers(list("abcd"), words) == ["a star", "a ring", "c", "d"]


# --- what learns, and what must not change it ---


def test_token_surrogate():
    """Against eq. 2 written out; a clipped token and a pad get no gradient."""
    old = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
    logp = (old + torch.tensor([[0.1, 0.5, -0.5], [0.5, 9.0, 9.0]])).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    ref, A, weight = old - 0.2, torch.tensor([2.0, -1.0]), torch.tensor([1 / 7, 1 / 3])
    loss, seen = token_surrogate(logp, old, mask, A, weight, Args(lm_beta=0.3), ref)
    r = torch.tensor([0.1, 0.5, -0.5, 0.5]).exp()
    off = torch.tensor([-0.3, -0.7, 0.3, -0.7])
    kl = off.exp() - off - 1
    gain = 2 * (r[0] + 1.2 + r[2]) / 7 - r[3] / 3
    torch.testing.assert_close(loss, 0.3 * (kl[:3].sum() / 7 + kl[3] / 3) - gain)
    torch.testing.assert_close(seen, torch.stack([r, kl], 1))
    token_surrogate(logp, old, mask, A, weight, Args(lm_beta=0.0), None)[0].backward()
    torch.testing.assert_close(logp.grad, torch.tensor(
        [[-2 * r[0] / 7, 0, -2 * r[2] / 7], [r[3] / 3, 0, 0]]))


def test_what_learns(talker, tmp_path, monkeypatch):
    """--train: in `both` what is drawn teaches the language model, too, through the queries."""
    check_what_learns(talker, tmp_path, monkeypatch, play, *COT)


def test_ranks_and_micro_batches_of_main(talker, tmp_path):
    """One process = two processes = many micro-batches."""
    flags = [*COT, "--steps", 1, "--guidance", 2, "--images-per-thought", 2]
    play(talker, tmp_path / "one", *flags)
    want, _ = learned(tmp_path / "one")
    play(talker, tmp_path / "micro", *flags, "--micro", 3)
    ranks.rows(tmp_path / "ranks", lambda: play(talker, tmp_path / "ranks", *flags))
    for run in ("micro", "ranks"):
        close(learned(tmp_path / run)[0], want, 1e-4)
        a, b = ([json.loads(line) for line in open(tmp_path / r / "log.jsonl")][-1]
                for r in ("one", run))
        for k in ("grad_norm", "lm_grad_norm", "reward_blue", "reward_format", "words", "kept"):
            assert b[k] == pytest.approx(a[k], rel=1e-4, abs=1e-6), k


@pytest.mark.parametrize("flags", [[], ["--lora-rank", 2, "--vlm-lora-rank", 2]])
def test_reference_is_the_initial_policy(talker, tmp_path, flags):
    """KL of words and steps is 0 at first, and no longer once both have moved."""
    rows = play(talker, tmp_path / "run", *COT, "--steps", 3, "--beta", 0.1, "--lm-beta", 0.1,
                     "--lr", 0.02, "--lm-lr", 0.02, *flags)
    assert rows[1]["kl"] == rows[1]["lm_kl"] == 0
    assert min(rows[3]["kl"], rows[3]["lm_kl"]) > 1e-6


# --- answers alone ---


@pytest.mark.parametrize("task", ["text", "vqa"])
def test_right_answers_become_likelier(talker, tmp_path, task):
    """Yes is always right: from a half to nearly always. A sign slip would breed no."""
    rows = [json.loads(line) | dict(answer="Yes.") for line in open(talker / f"{task}.jsonl")]
    (tmp_path / "yes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    log = play(talker, tmp_path / "run", "--task", task, "--steps", 10, "--limit", 4,
                    "--lm-lr", 0.01, "--data", tmp_path / "yes.jsonl", "--eval-every", 5)
    assert 0.2 < log[1]["reward_answer"] < 0.8 < 0.9 < log[-1]["reward_answer"]
    assert log[1]["lm_ratio_off"] < 1e-5 and "grad_norm" not in log[1] and "ratio_off" not in log[1]
    samples = {p.name for p in (tmp_path / "run" / "samples").iterdir()}
    assert {f"step_00010.{'md' if task == 'text' else 'png'}"} <= samples
    if task == "text":
        assert "| yes | " in (tmp_path / "run/samples/step_00010.md").read_text()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"accuracy", "accuracy_se", "words"} <= results["after"].keys()


def test_pictures_that_people_ask_about(talker, tmp_path):
    picture = tiny.pictures((40, 56))[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "q.jsonl").write_text('{"question": "Is it?", "answer": "yes", "image": "a.png"}\n')
    row, = reflect.read_questions(tmp_path / "q.jsonl")
    assert reflect.asked_about(row).shape == (3, 40, 56) and row["prompt"] == "Is it?"
    log = play(talker, tmp_path / "run", "--task", "vqa", "--steps", 1, "--limit", 4,
                    "--data", tmp_path / "q.jsonl")
    assert 0 <= log[1]["reward_answer"] <= 1


def test_held_out_questions_about_photos(talker, tmp_path, monkeypatch):
    """--eval-data holds questions; one is shared only where its picture is, too."""
    monkeypatch.setitem(presets_py.PRESETS, "photos", config(talker, preset="photos"))
    for i in range(3):
        Image.fromarray(tiny.pictures((40, 56), seed=i)[0].permute(1, 2, 0).numpy()).save(
            tmp_path / f"{i}.png")
    for name, images in dict(train=[0, 1], held=[2], both=[2, 1]).items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(dict(
            question="Is it?", answer="yes", image=f"{i}.png")) + "\n" for i in images))
    flags = ["--task", "vqa", "--steps", 1, "--limit", 4, "--preset", "photos", "--init",
             talker / "dit", "--data", tmp_path / "train.jsonl"]
    asked = calls(monkeypatch, "show_answers")
    log = play(talker, tmp_path / "a", *flags)
    assert not any("score" in r for r in log) and len(asked[0][0][0]) == 2
    log = play(talker, tmp_path / "b", *flags, "--eval-data", tmp_path / "held.jsonl")
    assert all(r["score"] in (0, 1) for r in log) and len(asked[-1][0][0]) == 1
    assert "as 1 of its 2 prompts are" in complaint(
        play, talker, tmp_path / "c", *flags, "--eval-data", tmp_path / "both.jsonl")


# --- a run ---


def test_resume_continues_as_if_never_stopped(talker, tmp_path):
    flags = [*COT, "--steps", 4, "--updates", 2, "--lm-beta", 0.01, "--eval-every", 2]
    whole = play(talker, tmp_path / "a", *flags)
    with tiny.killed_at(reflect, "rollout", 3):
        play(talker, tmp_path / "b", *flags)
    again = play(talker, tmp_path / "b", *flags, "--resume")
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))

    def timeless(rows):
        return [{k: v for k, v in r.items() if k != "at" and not k.startswith("s_")} for r in rows]
    assert timeless(again) == timeless(whole)
    assert {"score", "raw", "answer", "format", "length"} <= whole[-1].keys()


@pytest.mark.parametrize("flags, words", [
    ("--task riddle", "unknown --task 'riddle'; there are: reflect, cot, text, vqa"),
    ("--task cot --train bridge", "unknown --train 'bridge'; there are: lm, dit, both"),
    ("--task text --train dit", "unknown --train 'dit'; there are: lm"),
    ("--task cot --train dit --vlm-lora-rank 2", "--task cot, --train dit learns: dit"),
    ("--task cot --temperature 0", "--temperature 0.0: must be"),
    ("--task text --images-per-thought 2", "--images-per-thought is for --task cot"),
    ("--task vqa --data TEXT", "--task vqa is about pictures"),
    ("--task text --data BAD", "bad.jsonl, line 1: no `question`, `answer`"),
    ("--task text --data NONE", "must be a file or folder that exists"),
    ("--task cot --preset flow-grpo", "has no language model that could answer")])
def test_reflect_refuses(talker, tmp_path, flags, words):
    """In one line, and nothing is written."""
    (tmp_path / "bad.jsonl").write_text('{"question": "why?"}\n')
    places = dict(TEXT=talker / "text.jsonl", BAD=tmp_path / "bad.jsonl", NONE=tmp_path / "none")
    before = files(tmp_path)
    assert words in complaint(play, talker, tmp_path / "run",
                              *[str(places.get(f, f)) for f in flags.split()])
    assert files(tmp_path) == before and not (tmp_path / "run").exists()
