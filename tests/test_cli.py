"""Bad input gets one clear line and a non-zero exit, and nothing is written over."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cycle_edit
import eval as judges
import grpo
import pretrain
import reflect
import sample
import sft
from common.flags import parse
from common.presets import KERNELS, Config
from common.data import all_positions, pairs

FLAGGED = [pretrain, sft, grpo, cycle_edit, reflect, judges, sample]         # scripts with Args


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def complaint(run, *args):
    """What a run that must fail tells the user."""
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert isinstance(e.value.code, str) and e.value.code.startswith("error: "), e.value.code
    assert "\n" not in e.value.code
    return e.value.code


@pytest.mark.parametrize("flags, words", [
    ("--preset shape", "unknown --preset 'shape'; there are: shapes"),
    ("--reward geneva", "unknown reward 'geneva'; valid: geneval, geneval_strict, ocr, clip"),
    ("--reward geneval:x", "not a number"),
    ("--step 3", "unrecognized arguments: --step 3; there are: --preset --recipe --init "),
    ("--steps three", "--steps 'three': must be an integer in [1, 1e7]"),
    ("--task cot", "--task is now a flag of reflect.py, where the language model acts: python "
     "reflect.py --task text, vqa, cot or reflect"),
    ("--train vlm", "there are: dit, bridge, both"),
    ("--train lm", "unknown --train 'lm'; there are: dit, bridge, both"),
    ("--format 1", "unrecognized arguments: --format 1"),
    ("--kind ddpm", "there are: flow, unirl, dance, cps"), ("--kl k3", "mean, flow-grpo, velocity"),
    ("--G 1", "--G 1: must be an integer in [2, 1000]"),
    ("--B 3", "--B 3 prompts cannot be shared by 2 ranks: choose a multiple"),
    ("--window 9", "must end before the last"), ("--window 0", "--window 0: must be"),
    ("--window-start 3 --window-stop 2", "starting at 3 to 2"),
    ("--T 120 --window-stop 97", "up to which steps may be random"),
    ("--kind cps --eta 1.5", "--kind cps replaces all of the noise at 1"),
    ("--eta 0 --beta 0.1", "this KL is infinite"),
    ("--preset deepgen --final-bench", "--final-bench is of the classroom"),
    ("--prompts BAD", "bad.jsonl, line 2: "),
    ("--prompts NONE", "must be a file or folder that exists"),
    ("--prompts EMPTY", "holds no prompts"),
    ("--init NONE", "must be a folder that exists, or"), ("--init CUT", "may be truncated"),
    ("--init OTHER", "is a checkpoint of preset 'deepgen', not 'shapes'"),
    ("--init SHAPE", "does not fit preset 'shapes': 1 keys differ, first dit.proj_out.bias"),
    ("--init FOREIGN", "not a checkpoint of ours"),
    ("--resume", "nothing to resume"),
])
def test_grpo_refuses(parts, tmp_path, monkeypatch, flags, words):
    """Nothing is written: not even a run folder, which would refuse the corrected command."""
    if "--B" in flags:
        monkeypatch.setattr(grpo, "setup", lambda: (0, 2, torch.device("cpu")))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("")
    good = parts / "sft" / "model.safetensors"
    if "--init" in flags:
        for name in ("cut", "other", "shape", "foreign"):
            (tmp_path / name).mkdir()
        (tmp_path / "cut/model.safetensors").write_bytes(good.read_bytes()[:-100])
        weights, about = load_file(good), json.loads((parts / "config.json").read_text())
        for name, meta in [("other", {"config": json.dumps(about | dict(preset="deepgen"))}),
                           ("foreign", {"format": "pt"}), ("shape", {"config": json.dumps(about)})]:
            if name == "shape":
                weights["dit.proj_out.bias"] = torch.zeros(3)
            save_file(weights, tmp_path / name / "model.safetensors", meta)
    places = dict(BAD="bad.jsonl", NONE="none", EMPTY="empty.jsonl", CUT="cut", OTHER="other",
                  SHAPE="shape", FOREIGN="foreign")
    flags = [str(tmp_path / places[f]) if f in places else f for f in flags.split()]
    before = files(tmp_path)
    assert words in complaint(tiny.play, parts, tmp_path / "run", *flags)
    assert files(tmp_path) == before and not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(parts, tmp_path):
    run = tmp_path / "run"
    tiny.play(parts, run, "--steps", 1)
    before = files(run)
    photo(tmp_path / "a.png", 64, 64)
    for main in (grpo.main, sft.main, pretrain.main):
        argv = [] if main is grpo.main else ["--data", folder_of(tmp_path, ["a.png"])]
        assert "holds another run: choose another --out" in complaint(
            lambda: tiny.play(parts, run, *argv, main=main))
        assert files(run) == before
    optim = run / "ckpt/optim.pt"
    optim.write_bytes(optim.read_bytes()[:-5000])
    assert "may be truncated" in complaint(tiny.play, parts, run, "--steps", 2, "--resume")
    optim.write_bytes(before[optim])
    assert "trained other weights" in complaint(
        tiny.play, parts, run, "--steps", 2, "--resume", "--train", "bridge", "--change", "train")
    assert files(run) == before


def test_a_process_prints_one_line(tmp_path):
    """Seen from the shell: exit code, one line, no traceback."""
    done = subprocess.run([sys.executable, "grpo.py", "--B", "0", "--out", tmp_path / "run"],
                          capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "run").exists()
    assert done.stderr == "error: --B 0: must be an integer in [1, 10000]\n"


def test_sample_refuses(tmp_path, monkeypatch):
    for argv, words in [(["x", "--out", "a.jpg"], ".png"), (["x", "--trajectory"], ".gif"),
                        (["x", "--nn", "3"], "unrecognized"), ([], "required: prompts"),
                        (["x", "--init", str(tmp_path)], "no checkpoint at")]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
        assert words in complaint(sample.main)


# --- what --help says ---


def told(script, monkeypatch, capsys):
    """--help of a script, each flag on one line -> {title of a group: {flag: help}}, in order."""
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
    with pytest.raises(SystemExit) as e:
        script.main()
    said = capsys.readouterr().out
    assert e.value.code == 0 and said.startswith(script.__doc__.strip() + "\n\n")
    blocks = said.removeprefix(script.__doc__.strip()).strip().split("\n\n")
    groups = {}
    for title, *lines in (re.sub(r"\n {6,}", "  ", block).splitlines() for block in blocks):
        assert title.endswith(":") and not title.startswith(" ")
        rows = [re.fullmatch(r"  (?:--)?(\S+)(?:,? \S+)*?  +(\S.*)", line).groups()
                for line in lines]
        groups[title[:-1]] = dict(rows)
    groups.pop("Benchmarks", None)                       # of eval.py: no flags
    return groups


@pytest.mark.parametrize("script", FLAGGED, ids=lambda s: s.__name__)
def test_help_says_all_and_first_what_matters(script, monkeypatch, capsys):
    groups = told(script, monkeypatch, capsys)
    first, flags = next(iter(groups)), {k: v for rows in groups.values() for k, v in rows.items()}
    assert first == "What matters most" and 8 <= len(groups[first]) <= 16
    assert {"init", "out", "steps", "seed"} <= {k.strip(",") for k in groups[first]}
    for name, text in flags.items():
        says = re.sub(r" \[[^][]+\]$", "", text)                     # the default
        assert re.search(r"[\w)'.]$", says), (name, text)
        assert says.split()[-1] not in ("and", "or", "the", "a", "of", "to"), (name, text)
        assert says.count("(") == says.count(")"), (name, text)


@pytest.mark.parametrize("script", FLAGGED, ids=lambda s: s.__name__)
def test_help_holds_each_text_and_default(script, monkeypatch, capsys):
    flags = {k.strip(","): v for rows in told(script, monkeypatch, capsys).values()
             for k, v in rows.items()}
    assert len(flags) == len(fields(script.Args)) + 1 and "-h" in flags
    for f in fields(script.Args):
        text, paper = f.metadata["help"], f.metadata["setting"]       # what a .json alone sets
        default = f.default if f.type is not bool else ("off", "on")[f.default]
        assert text and flags[f.name if paper else f.name.replace("_", "-")] == (
            text if default in ("", None, ()) else f"{text} [{default}]")
    for name, choices in dict(
            kind=KERNELS, norm=["group", "joint", "global"], refs=["vlm", "dit", "both"],
            kl=["mean", "flow-grpo", "velocity"], reverse=["auto", "yes", "no"],
            train=["lm", "dit", "both"] if script is reflect else ["dit", "bridge", "both"],
            task=reflect.TASKS if script is reflect else ["flow", "cot", "reflect"],
            bench=judges.NAMES).items():
        if name in flags:
            assert set(choices) <= set(re.findall(r"[\w-]+", flags[name])), (name, flags[name])


@pytest.mark.parametrize("script", FLAGGED, ids=lambda s: s.__name__)
def test_seeds_have_a_range(script, monkeypatch, tmp_path):
    for seed in (-1, 2**63):
        monkeypatch.setattr(sys, "argv", [script.__name__, *["x"] * (script is sample), "--seed",
                                          str(seed), "--out", str(tmp_path / "x.png")])
        assert complaint(script.main) == (
            f"error: --seed {seed}: must be an integer in [0, 2**63)")
    assert not (tmp_path / "x.png").exists()
    monkeypatch.setattr(sys, "argv", [script.__name__, "--seed", str(2**63 - 1)])
    assert parse(script.Args, "").seed == 2**63 - 1


# --- data that people have ---


def photo(path, w, h, seed=0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8)).save(path)


def folder_of(folder, names):
    (folder / "metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=n, prompt=f"a photo, {n}")) + "\n" for n in names))
    return folder


def collect(folder, batches, n=2, **more):
    data = pairs(folder, Config(mmdit=tiny.MMDIT), n, seed=0, **more)
    return [next(data) for _ in range(batches)]


def test_photos_of_any_shape(tmp_path):
    """Sides become multiples of what the DiT needs, at about the preset's area and aspect."""
    sizes = {"a.png": (640, 480), "b.jpg": (30, 90), "c.png": (64, 64), "d.webp": (2000, 40),
             "e.png": (65, 63)}
    for name, (w, h) in sizes.items():
        photo(tmp_path / name, w, h)
    Image.open(tmp_path / "c.png").convert("LA").save(tmp_path / "f.png")
    upright = Image.open(tmp_path / "a.png")
    exif = upright.getexif()
    exif[0x0112] = 6                                      # a phone held upright: to be turned
    upright.save(tmp_path / "g.jpg", exif=exif)
    seen = {}
    for images, prompts in collect(folder_of(tmp_path, [*sizes, "f.png", "g.jpg"]), 40):
        assert images.dtype == torch.uint8 and images.shape[:2] == (2, 3)
        for p in prompts:
            seen[p.removeprefix("a photo, ")] = (images.shape[3], images.shape[2])
    assert seen == {"a.png": (72, 56), "b.jpg": (40, 112), "c.png": (64, 64), "d.webp": (128, 8),
                    "e.png": (64, 64), "f.png": (64, 64), "g.jpg": (56, 72)}


def test_unreadable_images_are_named_and_counted(tmp_path, capsys):
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        photo(tmp_path / name, 64, 64, i)
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[:2000])
    collect(folder_of(tmp_path, names), 20)              # one in twelve: the run goes on
    said = capsys.readouterr().err
    assert said.count("3.png") == 1 and "metadata.jsonl, line 4 (1 of " in said
    (tmp_path / "4.png").write_text("not an image")
    (tmp_path / "5.png").unlink()
    (tmp_path / "6.png").write_bytes(whole[:60] + bytes(100) + whole[160:])
    words = complaint(collect, tmp_path, 20)             # a third: it ends, as soon as that shows
    n = int(words.split()[1])
    assert n >= 3 and words.endswith(f" records in {tmp_path} are unreadable")
    said = capsys.readouterr().err
    named = sum(f"metadata.jsonl, line {i + 1} (" in said for i in (3, 4, 5, 6))
    assert named == n == said.count("\n")


def test_data_that_cannot_be_used(tmp_path):
    assert "neither metadata.jsonl nor *.tar" in complaint(collect, tmp_path, 1)
    folder_of(tmp_path, [])
    assert "holds no records" in complaint(collect, tmp_path, 1)
    photo(tmp_path / "a.png", 64, 64)
    folder_of(tmp_path, ["a.png"])                       # one photo for two ranks, by turns
    assert collect(tmp_path, 1, rank=1, world=2)
    for bad, words in (("{", "Expecting"), ("[1]", "record 1: a number, not a JSON object"),
                       ('{"file_name": "a.png"}', "line 1: no prompt or text or caption")):
        (tmp_path / "metadata.jsonl").write_text(bad + "\n")
        assert words in complaint(collect, tmp_path, 1)


def test_training_on_missing_data_leaves_nothing(parts, tmp_path):
    for main in (pretrain.main, sft.main):
        words = complaint(lambda: tiny.play(parts, tmp_path / "run", "--data", tmp_path, main=main))
        assert "neither" in words and not (tmp_path / "run").exists()


def test_tar_shards(tmp_path, capsys):
    names = [f"{i:02}" for i in range(40)]
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for name in names[shard * 10 : shard * 10 + 10]:
                photo(tmp_path / f"{name}.png", 64, 64, int(name))
                (tmp_path / f"{name}.txt").write_text(f"photo {name}")
                tar.add(tmp_path / f"{name}.png", f"{name}.png")
                if name != "17":                         # an image without its caption
                    tar.add(tmp_path / f"{name}.txt", f"{name}.txt")
    a, b = (collect(tmp_path, 18) for _ in range(2))
    texts = [t for _, prompts in a for t in prompts]
    assert len(set(texts[:36])) == 36 and "photo 17" not in texts    # a pass meets each once
    assert texts != sorted(texts)                        # shuffled, and the same each time
    assert all(torch.equal(x, y) and p == q for (x, p), (y, q) in zip(a, b))
    for images, prompts in a[:3]:                        # image and caption belong together
        for image, text in zip(images, prompts):
            file = Image.open(tmp_path / f"{text.removeprefix('photo ')}.png")
            assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(file))
    # A restart skips what was seen; two ranks share one pass without overlap.
    data = pairs(tmp_path, Config(mmdit=tiny.MMDIT), 2, seed=0)
    [next(data) for _ in range(5)]
    rest = collect(tmp_path, 3, position=all_positions(dict(t2i=data))["t2i"])
    assert [p for _, p in rest] == [p for _, p in a[5:8]]
    shares = [{t for _, ps in collect(tmp_path, 9, rank=r, world=2) for t in ps} for r in (0, 1)]
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 36
    assert "00001.tar, 17 (1 of" in capsys.readouterr().err
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(whole[: len(whole) // 2 + 100])
    collect(tmp_path, 14)                                # a broken shard is named as well
    assert "00002.tar" in capsys.readouterr().err


def test_two_stages_then_rl_then_pictures(parts, tmp_path, monkeypatch):
    """What the README chains: each script starts from the folder that the last one wrote."""
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        photo(tmp_path / name, 80, 60, i)
    folder_of(tmp_path, names)
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    few = ["--data", tmp_path, "--batch", 2, "--steps", 2]
    one = tiny.play(parts, a, *few, "--init", "", main=pretrain.main)
    two = tiny.play(parts, b, *few, "--init", a, main=sft.main)
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in two)
    tiny.play(parts, c, "--init", b, "--steps", 1)
    kept = [load_file(x / "ckpt/model.safetensors") for x in (a, b, c)]
    assert [{k.split(".")[0] for k in k_} for k_ in kept] == [
        {"bridge"}, {"bridge", "dit"}, {"bridge", "dit"}]  # what learned, now or before
    moved = {k for k, v in kept[1].items() if not torch.equal(v, kept[2][k])}
    assert "dit.proj_out.weight" in moved and all(k.startswith("dit") for k in moved)
    for argv in (["a red circle", "b", "--n", "2", "--steps", "2", "--out", tmp_path / "s.png"],
                 ["a", "--n", "1", "--steps", "2", "--trajectory", "--out", tmp_path / "s.gif"]):
        monkeypatch.setattr(sys, "argv", list(map(str, ["sample.py", "--init", c, *argv])))
        sample.main()
    assert Image.open(tmp_path / "s.gif").n_frames == 3
    assert Image.open(tmp_path / "s.png").width > 2 * 128


def test_captions_may_name_special_tokens(parts, tmp_path):
    """They are letters on their way through a stage: an image's placeholder ended the run."""
    for i in range(4):
        photo(tmp_path / f"{i}.png", 64, 64, i)
    named = "a sign <|image_pad|> <|im_end|>"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(dict(
        file_name=f"{i}.png", prompt=f"{named} {i}")) + "\n" for i in range(4)))
    row, = tiny.play(parts, tmp_path / "a", "--data", tmp_path, "--batch", 2, "--steps", 1,
                     "--drop", 0, main=pretrain.main)
    assert np.isfinite(row["loss"]) and row["grad_norm"] > 0
    lines = [json.loads(line) for line in open(parts / "prompts.jsonl")]
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps(r | dict(prompt=f"{named} {r['prompt']}")) + "\n" for r in lines))
    _, row = tiny.play(parts, tmp_path / "b", "--data", tmp_path / "prompts.jsonl", "--steps", 1,
                       "--task", "cot", "--limit", 6, main=reflect.main)
    assert row["kept"] > 0 and row["words"] > 1


def test_shipped_checkpoint_and_a_polite_kill(tmp_path):
    """The README's run as a user starts it; SIGTERM then ends it with all it has learned saved."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run = tmp_path / "run"
    command = [sys.executable, "grpo.py", "--reward", "geneval", "--B", 2, "--G", 4, "--out", run]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen(list(map(str, command)), cwd=tiny.ROOT, env=env, stdout=said,
                               stderr=said)
        while job.poll() is None and '"step": 1' not in (
                (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""):
            time.sleep(0.2)
        job.terminate()
        assert job.wait() == 143, (tmp_path / "said").read_text()[-3000:]
    rows = [json.loads(line) for line in open(run / "log.jsonl")]
    assert rows[0]["score"] > 0.12 and rows[1]["ratio_off"] < grpo.Args().clip / 10
    state = torch.load(run / "ckpt/optim.pt", weights_only=True)
    assert state["step"] == rows[-1]["step"] < 20 and "score" in rows[-1]
    assert not (run / "results.json").exists()            # the long benchmark is for whole runs
