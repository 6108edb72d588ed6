"""The real scripts on a GPU that is not there (pretend.py): no tensor is on the wrong device, and
grpo.py's host waits for the GPU where it must and nowhere else."""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial, partialmethod
from math import isfinite
from pathlib import Path

import pytest
import ranks
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from pretend import GPU, OnGpu, pretended
from test_grpo import config
from test_recipes import SANA
from test_reflect import talker  # noqa: F401
from test_talk import folder_of

import common.presets as presets_py
import common.run as run_py
import cycle_edit
import data.shapes.looks as looks_py
import grpo
import pretrain
import reflect
import sample
import sft
from common.checkpoint import save_checkpoint
from common.sana import SanaDiT
from labs import edit_reward
from model import Unified
from rewards import scored

# name: script, its flags. Words in capitals are files and folders; a name's first word may be that
# of the folder of another model.
RUNS = {
    "dit": (grpo, ""),
    "bridge": (grpo, "--train bridge --norm joint"),
    "both, twice": (grpo, "--train both --updates 2 --micro 5 --beta 0.1"),
    "LoRA": (grpo, "--lora-rank 2 --beta 0.1 --checkpoint --trained 2"),
    "guidance": (grpo, "--guidance 2 --norm global --kind dance"),
    "KL of Flow-GRPO": (grpo, "--beta 0.1 --kl flow-grpo --kind cps-simple"),
    "KL of velocities": (grpo, "--beta 0.1 --kl velocity --kind cps --no-shared-noise --shuffle"),
    "fine-tuning": (grpo, "--sft 0.3 --sft-batch 4 --sft-data PHOTOS --micro 2"),
    "sana": (grpo, "--train both --ldam blue:1-2 --ldam-leap 0 --ldam-falls 0"),
    "rewards": (grpo, "--reward geneval:1,clip:1,ocr:1,preference:1,judge:1,jpeg_compressibility:1 "
                      "--prompts PROMPTS --max-failed 1"),
    "cot": (reflect, "--task cot --limit 6"),
    "cot, dit": (reflect, "--task cot --limit 6 --train dit --beta 0.1"),
    "cot, lm": (reflect, "--task cot --limit 6 --train lm --answer-only --images-per-thought 2 "
                         "--top-p 0.9"),
    "cot, LoRAs": (reflect, "--task cot --limit 6 --lora-rank 2 --vlm-lora-rank 2 --beta 0.1 "
                            "--lm-beta 0.1 --checkpoint"),
    "text": (reflect, "--task text --limit 6 --data QUESTIONS --G 8"),
    "vqa": (reflect, "--task vqa --limit 6 --data QUESTIONS --G 8"),
    "cycle": (cycle_edit, "--train both --guidance 2 --image-guidance 1.5 --beta 0.1"),
    "cycle, DiT looks": (cycle_edit, "--refs dit --reward edit:1,clip_image:1,clip_direction:1,"
                                     "edit_judge:1"),
    "cycle, LoRA": (cycle_edit, "--lora-rank 2 --micro 3"),
    "reflect": (reflect, "--limit 6"),
    "reflect, lm": (reflect, "--limit 6 --train lm --vlm-lora-rank 2"),
    "reflect, dit": (reflect, "--limit 6 --train dit --lora-rank 2 --beta 0.1"),
    "pretrain": (pretrain, "--init= --data PHOTOS --edits EDITS --edit-share 1"),
    "sft": (sft, "--data PHOTOS --edits EDITS --edit-share 0.5 --lora-rank 2 --vlm-lora-rank 2 "
                 "--micro 3"),
    "sft, thoughts": (sft, "--task cot --data PHOTOS --tuples COT --share 1 --lm-loss 0.3"),
    "sft, critiques": (sft, "--task reflect --data PHOTOS --tuples REFLECT --share 1 --lm-loss 0.3 "
                            "--checkpoint"),
    "edit_reward": (edit_reward, "--vlm data/shapes/vlm"),
}

# Where the host waits for the GPU in steps 2 and 4 of grpo.py's loop, how often in an iteration of
# one update, and why. An H2D copies a few numbers before an update begins, when the GPU has nothing
# else to do: the pictures have been scored here.
WAITS = {
    (2, "D2H", "grpo.py main"): (1, "rewards look at the pictures here"),
    (4, "H2D", "grpo.py main"): (2, "advantages; which images an update has"),
    (4, "H2D", "grpo.py surrogate"): (2, "times; which steps are trained"),
    (4, "item", "common/run.py clip_grads"): (1, "a gradient that is not finite is no update"),
}


@pytest.fixture(scope="module")
def homes(parts, talker, tmp_path_factory):  # noqa: F811
    """Folders by the words of RUNS; that of sana holds ParaUni's DiT and bridge."""
    home = tmp_path_factory.mktemp("homes")
    cfg = config(parts, mmdit={}, sana=SANA, bridge="lim", keep="query", layers=(1, 2))
    dit = SanaDiT(**SANA)
    tiny.randomise(dit)
    save_checkpoint(home / "sft", {f"dit.{k}": p for k, p in dit.state_dict().items()}, cfg, 0)
    (home / "config.json").write_text(json.dumps(asdict(cfg)))
    lines = [next(open(folder / name)) for folder, name in (
        (parts, "prompts.jsonl"), (tiny.ROOT / "data/shapes/prompts", "text.jsonl"))]
    (home / "some.jsonl").write_text("".join(lines))
    (home / "prompts.jsonl").symlink_to(parts / "prompts.jsonl")
    scene = json.loads(next(open(parts / "pool.jsonl")))["right"]
    (home / "questions.jsonl").write_text(2 * (json.dumps(dict(
        tag="color", question="Is it red?", answer="yes", scene=scene)) + "\n"))
    return dict(parts=ranks.photos_of(parts), PHOTOS=parts / "photos", sana=home, reflect=talker,
                text=talker, vqa=talker, QUESTIONS=home / "questions.jsonl",
                EDITS=folder_of(home / "edits", "edit"), COT=folder_of(home / "cot", "cot"),
                REFLECT=folder_of(home / "reflect", "reflect"), PROMPTS=home / "some.jsonl")


def play(homes, out, name, *more, bf16=True):
    """-> rows of the log"""
    script, flags = RUNS[name]
    flags = [homes[word] if word in homes and word.isupper() else word for word in flags.split()]
    own = "--B 2 --G 2 --T 4 --window 2 --window-stop 1".split()
    if script in (pretrain, sft, edit_reward):
        own = ["--batch", 4]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(scored, "HELD_OUT", 8)
        m.setattr(Unified, "draw", partialmethod(Unified.draw, steps=2))       # looks are short
        for look in ("draw_edits", "draw_thinking", "draw_reflecting"):
            m.setattr(looks_py, look, partial(getattr(looks_py, look), steps=2))
        return tiny.play(homes.get(name.split(",")[0], homes["parts"]), out, "--steps", 2,
                         "--eval-every", 3, *own, *flags, *more, bf16=bf16, main=script.main)


def waits(syncs):
    """-> {(step of grpo.py's loop, kind, where): how often}, of the steps 2 and 4"""
    lines = Path(grpo.__file__).read_text().splitlines()
    step, steps = 0, {}
    for n, line in enumerate(lines, 1):
        mark = re.match(r" {8,12}# (\d)  ", line)
        step = steps[n] = int(mark[1]) if mark else step
    return Counter((steps[s.at], s.kind, re.sub(r":\d+", "", s.place)) for s in syncs
                   if steps.get(s.at) in (2, 4))


@pytest.mark.parametrize("name", RUNS)
def test_no_tensor_is_on_the_wrong_device(homes, tmp_path, name):
    with pretended() as syncs:
        rows = play(homes, tmp_path / "run", name)
    last = rows[-1]
    assert last["step"] == 2 and all(isfinite(x) for x in last.values())
    assert any(last[k] > 0 for k in last if k.endswith("grad_norm"))
    assert sum(s.kind == "H2D" for s in syncs) > 20                      # of weights at least
    if RUNS[name][0] is grpo:
        assert waits(syncs).keys() == WAITS.keys()


def test_a_rollout_waits_once_and_an_update_five_times(homes, tmp_path):
    """However many steps, micro-batches and weights there are; and a run that resumes waits as
    often, having put its weights and AdamW's state back on the GPU."""
    with pretended() as syncs:
        play(homes, tmp_path / "run", "dit", "--micro", 3)
        first = waits(syncs)
        syncs.clear()
        play(homes, tmp_path / "run", "dit", "--micro", 3, "--steps", 3, "--resume", "--change",
             "steps")
    once = {at: n for at, (n, _) in WAITS.items()}
    assert waits(syncs) == once and first == {at: 2 * n for at, n in once.items()}


def test_the_numbers_are_the_cpus(homes, tmp_path):
    """In fp32, but for the rounding of another kernel of attention."""
    with pretended():
        gpu = play(homes, tmp_path / "gpu", "both, twice", bf16=False)
    cpu = play(homes, tmp_path / "cpu", "both, twice", bf16=False)
    for a, b in zip(gpu[1:], cpu[1:], strict=True):
        for k in ("reward_blue", "grad_norm", "kl", "ratio_low", "ratio_high"):
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-8), k


def test_every_way_to_draw(homes, tmp_path, monkeypatch, capsys):
    """sample.py, on the tiny model and on a tiny SANA."""
    picture, mask = homes["PHOTOS"] / "0.png", tmp_path / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    edit = f"--image {picture} --edit x --guidance 2 --image-guidance 1.5"
    for i, (home, flags) in enumerate((
            ("parts", "x yy"), ("parts", "x --trajectory"), ("parts", edit),
            ("parts", f"{edit} --mask {mask}"), ("parts", "x --think --limit 5"),
            ("reflect", "x --reflect --limit 5"), ("sana", "x --solver dpm"),
            ("parts", f"--answer x --image {picture} --limit 5"))):
        monkeypatch.setitem(presets_py.PRESETS, "shapes", config(homes[home]))
        file = tmp_path / f"{i}{'.gif' if 'traj' in flags else '.png'}"
        monkeypatch.setattr(sys, "argv", ["sample.py", *flags.split(), "--init",
                                          str(homes[home] / "sft"), "--n", "2", "--steps", "2",
                                          "--out", str(file)])
        with pretended() as syncs:
            sample.main()
        assert len(syncs) > 20 and (file.exists() or "--answer" in flags)


# --- what is pretended ---


def test_what_a_gpu_refuses():
    with pretended():
        x, y, at = torch.ones(2, 3, device=GPU), torch.ones(2, 3), torch.tensor([0], device=GPU)
        for wrong in (lambda: x + y, lambda: y + x[0, 0], lambda: x.add_(y), lambda: x @ y.T,
                      lambda: torch.cat([x, y]), lambda: F.linear(x, y), lambda: y[at],
                      lambda: torch.stack([x[0, 0], torch.tensor(1.0)]),
                      lambda: torch.where(x > 0, x, y),
                      lambda: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
                      lambda: torch.randn(3, device=GPU, generator=torch.Generator())):
            with pytest.raises(RuntimeError, match="Expected"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        right = [x + torch.tensor(1.0), x[torch.tensor([0])], x * 2, torch.where(x > 0, x, 0.0),
                 x.masked_fill(x > 1, torch.tensor(0.0)), y.to(GPU), x.new_zeros(2),
                 torch.zeros_like(x), torch.nn.utils.rnn.pad_sequence([x, x[:1]])]
        assert all(type(a) is OnGpu and a.device == GPU and a.is_cuda for a in right)
        assert type(x.cpu()) is type(x.to("cpu")) is type(x.to(y)) is torch.Tensor


@pytest.mark.parametrize("kind, wait", [
    ("item", lambda x: x[0, 0].item()), ("item", lambda x: float(x.sum())),
    ("item", lambda x: bool(x.any())), ("item", lambda x: torch.tensor([x.sum()])),
    ("item", lambda x: f"{x.sum()}"), ("D2H", lambda x: x.tolist()), ("D2H", lambda x: x.cpu()),
    ("D2H", lambda x: x.to("cpu")), ("D2H", lambda x: torch.ones(2, 3).copy_(x)),
    ("mask", lambda x: x[x > 0]), ("nonzero", lambda x: x.nonzero()),
    ("equal", lambda x: torch.equal(x, x)), ("unique", lambda x: x.unique()),
    ("H2D", lambda x: torch.ones(3).to(GPU)), ("H2D", lambda x: torch.tensor([1], device=GPU)),
    ("H2D", lambda x: x[[0, 1]]), ("H2D", lambda x: x.copy_(torch.ones(2, 3))),
    ("repeat", lambda x: x.repeat_interleave(x[0].long(), 1)),
    (None, lambda x: torch.ones(3).to(GPU, non_blocking=True)), (None, lambda x: x.float().to(GPU)),
    (None, lambda x: x.masked_fill_(x > 1, 0)), (None, lambda x: torch.zeros(2, device=GPU)),
    (None, lambda x: x.repeat_interleave(2, 0) @ x.T), (None, lambda x: x[0])])
def test_where_the_host_waits(kind, wait):
    with pretended() as syncs:
        x = torch.ones(2, 3, device=GPU)
        wait(x)
    assert [s.kind for s in syncs] == ([kind] if kind else [])
    assert all("test_pretend.py" in s.place for s in syncs)


def test_a_module_moves_learns_and_is_saved(tmp_path):
    """Weights that are one stay one; gradients, AdamW, its fused kernel and autocast do work."""
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    b.weight = a.weight
    net = torch.nn.Sequential(a, b)
    with pretended():
        net.to(GPU)
        assert net[0].weight is net[1].weight and type(net[0].bias) is OnGpu
        with torch.autocast("cuda", torch.bfloat16):
            y = net(torch.ones(2, 3, device=GPU))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        old = net[0].weight.clone()
        torch.optim.AdamW(net.parameters(), fused=True).step()
        assert type(net[0].weight.grad) is OnGpu and not torch.equal(old, net[0].weight)
        torch.save(net.state_dict(), tmp_path / "x.pt")
        want = net[0].weight.cpu()
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True)["0.weight"], want)


def test_nothing_is_left_behind():
    had = torch.autocast, torch.tensor, torch.empty, torch.cuda.is_available
    with pytest.raises(KeyError), pretended():
        assert torch.cuda.is_available() and torch.tensor is not had[1]
        run_py.setup()
        raise KeyError
    assert had == (torch.autocast, torch.tensor, torch.empty, torch.cuda.is_available)
    assert not torch.cuda.is_available() and type(torch.zeros(1)) is torch.Tensor
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert torch.get_float32_matmul_precision() == "highest"
    assert "PYTORCH_ALLOC_CONF" not in os.environ
