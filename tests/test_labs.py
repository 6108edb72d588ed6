"""labs/: the laws of their losses, and that each runs as grpo.py does. As a script, under torchrun,
this file plays a lab: FOLDER OUT LAB FLAGS."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file
from test_cli import complaint
from test_forks import copy  # noqa: F401
from test_grpo import config as tiny_config

from common.flow import flow_loss, noised
from labs import awm, begin, dgpo, nft

LABS = dict(nft=nft, awm=awm, dgpo=dgpo)
PATCHES = sorted(file.name for file in (tiny.ROOT / "labs").glob("*.diff"))
MU, SIGMA, P = (torch.tensor(x, dtype=torch.float64) for x in (
    (-2.0, 0.5, 2.0), (0.3, 0.2, 0.5), (0.2, 0.5, 0.3)))         # a 1-D Gaussian mixture
GOOD = torch.tensor([0.1, 0.9, 0.4], dtype=torch.float64)        # how good its components are


def play(parts, out, lab, *flags):
    flags = ["--prompts", parts / "prompts.jsonl", "--B", 4, "--G", 4, "--T", 3, "--eval-T", 2,
             "--times", 2, "--steps", 2, "--reward", "blue", *flags]
    return tiny.play(parts, out, *flags, main=LABS[lab].main)


def weights(folder):
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------
# Laws


def posterior(x, t):
    """Of each component of the mixture at x_t = x: its probability, and E[eps - x_0 | component]"""
    var = (1 - t) ** 2 * SIGMA**2 + t**2                         # of x_t, given the component
    p = P * torch.exp(-(x - (1 - t) * MU) ** 2 / (2 * var)) / var.sqrt()
    x0 = MU + (1 - t) * SIGMA**2 / var * (x - (1 - t) * MU)
    return p / p.sum(), (x - (1 - t) * x0) / t - x0


@pytest.mark.parametrize("b", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("x, t", [(-1.0, 0.3), (0.2, 0.6), (1.5, 0.9)])
def test_nft_improves_the_policy(x, t, b):
    """Theorem 3.1: with a(x_t) = E[r], v+ = E[r v*] / a, D = a (v+ - v_old), the gradient at v_old
    points along -D, and the loss is least at v_old + (2/b) D."""
    p, v_star = posterior(x, t)
    v_old, a = (p * v_star).sum(), (p * GOOD).sum()
    better = a * ((p * GOOD * v_star).sum() / a - v_old)
    assert abs(better) > 1e-3

    def gradient(at):
        v = torch.full((), at, dtype=torch.float64, requires_grad=True)
        each = nft.nft_loss(v.expand(3).view(3, 1, 1, 1), v_old.expand(3).view(3, 1, 1, 1),
                            v_star.view(3, 1, 1, 1), GOOD, b)    # quadratic: means are enough
        (p * each).sum().backward()
        return v.grad.item()
    assert gradient(v_old.item()) == pytest.approx(-4 * better.item(), rel=1e-9)
    assert gradient((v_old + 2 / b * better).item()) == pytest.approx(0, abs=1e-9)


def test_nft_and_awm_begin_alike():
    """At v = v_old, whatever the strength: advantage x the flow matching loss."""
    v_old, target = torch.randn(2, 4, 3, 5, 5).double()
    advantage = torch.tensor([-1.0, -0.2, 0.4, 0.8]).double()
    grads = []
    for loss in (lambda v: nft.nft_loss(v, v_old, target, (1 + advantage) / 2, 0.7),
                 lambda v: awm.awm_loss(v, target, advantage)):
        v = v_old.clone().requires_grad_(True)
        loss(v).sum().backward()
        grads.append(v.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_awm_at_advantage_one_is_flow_matching(parts):
    model, prompts, keys = tiny.build(tiny_config(parts)), ["x", "a photo of a red ring"], [3, 99]
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.manual_seed(0)).byte()
    x_t, t, target = noised(model, model.to_latents(images), keys)
    v = model.velocity(x_t, t, [(1.0, model.encode(prompts))])
    torch.testing.assert_close(awm.awm_loss(v, target, torch.ones(2)),
                               flow_loss(model, images, prompts, keys))


def test_dgpo_is_antisymmetric_in_the_halves():
    """Which half is the better one decides the sign of the log-odds, and of the first gradient; a
    group that is preferred already weighs less."""
    v_0, target, step = torch.randn(3, 8, 2, 3, 3).double()
    advantage = torch.tensor([1.0, -1, 0.5, -0.5, 2, 1, -3, 0]).double()

    def loss(v, advantage):
        return dgpo.dgpo_loss(v, v_0, target, advantage, 4, 3.0)

    def gradient(at, advantage):
        v = at.clone().requires_grad_(True)
        loss(v, advantage).sum().backward()
        return v.grad
    v = v_0 + 0.1 * step
    gained = (v - target).square().mean((1, 2, 3)) - (v_0 - target).square().mean((1, 2, 3))
    odds = 3.0 * (advantage * gained).view(2, 4).mean(1)
    assert odds.abs().min() > 1e-3
    torch.testing.assert_close(loss(v, advantage) - loss(v, -advantage), odds / 1.5)
    first = gradient(v_0, advantage)
    torch.testing.assert_close(first, -gradient(v_0, -advantage))
    each = v_0.clone().requires_grad_(True)
    (awm.awm_loss(each, target, advantage).sum() / 4).backward()
    torch.testing.assert_close(first, each.grad)
    further = v_0 - 2 * first                                    # downhill: preferred by now
    steep, flat = (gradient(at, advantage).abs().sum() for at in (v_0, further))
    assert flat < steep and (loss(further, advantage) < math.log(2) / 1.5).all()


@pytest.mark.parametrize("lab", LABS)
def test_groups_that_agree_move_nothing(parts, tmp_path, lab):
    file = tmp_path / "alike.py"
    file.write_text("def alike(images, rows):\n    return [0.5] * len(rows)\n")
    rows = play(parts, tmp_path / "run", lab, "--reward", f"{file}:alike", "--steps", 3)
    assert all(row["grad_norm"] == row["kept"] == 0 for row in rows[1:])
    before, after = weights(parts / "sft"), weights(tmp_path / "run/ckpt")
    assert before and all(torch.equal(after[k].float(), x.float()) for k, x in before.items())


# ---------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("lab", LABS)
def test_neither_micro_batches_nor_ranks_change_an_update(parts, tmp_path, lab):
    flags = ["--train", "both", "--guidance", 2.0]
    one = play(parts, tmp_path / "one", lab, *flags, "--micro", 0)[1]
    few = play(parts, tmp_path / "few", lab, *flags, "--micro", 5)[1]
    two = ranks.rows(tmp_path / "two", lambda: play(parts, tmp_path / "two", lab, *flags))[1]
    assert one["grad_norm"] > 1e-4
    for other in (few, two):
        for column in one.keys() & {"grad_norm", "reward_blue", "kept", "loss", "kl", "apart"}:
            assert other[column] == pytest.approx(one[column], rel=1e-4), column


@pytest.mark.parametrize("lab", LABS)
def test_resume_continues_as_if_never_stopped(parts, tmp_path, lab):
    flags = ["--steps", 4, "--eval-every", 2, "--lr", 1e-2]
    whole = play(parts, tmp_path / "whole", lab, *flags)
    with tiny.killed_at(begin, "noised", 3):
        play(parts, tmp_path / "cut", lab, *flags)
    rest = play(parts, tmp_path / "cut", lab, *flags, "--resume")
    for a, b in zip(whole[-2:], rest[-2:]):
        assert a["step"] == b["step"] and a["grad_norm"] == b["grad_norm"] > 0
    a, b = weights(tmp_path / "whole/ckpt"), weights(tmp_path / "cut/ckpt")
    assert a and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("lab", LABS)
def test_a_lora_learns_alone(parts, tmp_path, lab):
    rows = play(parts, tmp_path / "run", lab, "--lora-rank", 2)
    assert all(row["grad_norm"] > 0 for row in rows[1:])
    before, after = weights(parts / "sft"), weights(tmp_path / "run/ckpt")
    assert any("lora_" in k for k in after)
    assert all(torch.equal(after[k].float(), x.float()) for k, x in before.items())


@pytest.mark.parametrize("most, growth", [(0.0, 0.1), (0.5, 0.0), (0.9, 1.0), (0.5, 0.1)])
def test_an_old_policy_goes_on_as_if_never_stopped(most, growth):
    """It keeps min(most, growth x updates) of itself, before and after a restart, which leaves the
    learned weights alone."""
    weight, want = torch.nn.Parameter(torch.zeros(())), 0.0
    run = SimpleNamespace(params=dict(w=weight), ema=SimpleNamespace(extra={}), start=0)
    follower = begin.Follower(run, most, growth)
    for step in range(6):
        torch.nn.init.constant_(weight, step + 1)
        follower.update(step)
        keeps = min(most, growth * (step + 1))
        want = keeps * want + (1 - keeps) * (step + 1)
        saved = {name: mean.clone() for name, mean in run.ema.extra["old"].items()}
        run = SimpleNamespace(params=dict(w=weight), ema=SimpleNamespace(extra=dict(old=saved)),
                              start=step + 1)
        follower = begin.Follower(run, most, growth)
        assert weight.item() == step + 1
        with follower.applied():
            assert weight.item() == pytest.approx(want)


def test_what_was_removed_is_no_flag(parts, tmp_path, capsys):
    for lab in LABS:
        assert "unrecognized arguments: --window" in complaint(
            play, parts, tmp_path / "a", lab, "--window", 3)
    play(parts, tmp_path / "b", "nft", "--recipe", "flow-grpo", "--B", 4, "--G", 4)
    assert "beta" in capsys.readouterr().out.partition("are nothing for this and left out")[0]


def test_labs_are_short():
    for file in LABS.values():
        assert len(Path(file.__file__).read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_applies_and_learns(copy, name):  # noqa: F811
    diff = (tiny.ROOT / "labs" / name).read_text()
    added = [line for line in diff.splitlines() if line.startswith("+") and line[:3] != "+++"]
    assert 0 < len(added) <= 40
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True)
    flags = ("--steps 3 --B 2 --G 6 --T 6 --window 2 --window-stop 2 --eval-T 1 --updates 2 "
             "--lr 1e-3 --clip 1 --out run")
    done = subprocess.run([sys.executable, "grpo.py", *flags.split()], cwd=copy, text=True,
                          capture_output=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in open(copy / "run/log.jsonl")][1:]
    assert len(rows) == 3 and any(row["grad_norm"] > 0 for row in rows)
    assert all(row["ratio_off"] == 0 for row in rows)            # the first update's: exactly 1
    assert any(row["ratio_high"] > row["ratio_low"] for row in rows)
