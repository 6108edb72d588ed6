"""Micro-batches and what is computed again change the memory of a backward, and nothing else."""

import json

import pytest
import ranks
import tiny
import torch
from test_talk import folder_of
from torch.utils.checkpoint import checkpoint

import common.layers as layers_py
import common.rl as rl_py
import common.run as run_py
import common.weights as weights_py
from common.presets import Config

ONE = ["--steps", 1, "--eval-every", 1, "--ema", 0]
TASKS = {name: (name, []) for name in ranks.MAINS} | {
    "grpo, KL, guidance": ("grpo", ["--beta", 0.1, "--guidance", 2, "--updates", 2]),
    "sft, thoughts": ("sft", ["--task", "cot", "--share", 1, "--lm-loss", 0.3]),
    "sft, critiques": ("sft", ["--task", "reflect", "--share", 1, "--lm-loss", 0.3]),
    "cot": ("reflect", ["--task", "cot", "--limit", 8])}


@pytest.fixture(scope="module")
def photos(parts):
    return ranks.photos_of(parts)


@pytest.fixture(autouse=True)
def again(monkeypatch):
    """-> how often blocks of the DiT and of the VLM were to be computed again"""
    counts = dict(dit=0, vlm=0)
    for part, module in (("dit", layers_py), ("vlm", weights_py)):
        def counted(*inputs, part=part, **named):
            counts[part] += 1
            return checkpoint(*inputs, **named)
        monkeypatch.setattr(module, "checkpoint", counted)
    return counts


def gradients(photos, out, script, flags):
    """Of a script's first update, as they are before they are clipped."""
    found = []

    def keep(real):
        def summed(params, watched=()):
            real(params, watched)
            found.append([p.grad.clone() for p in params])
        return summed
    with pytest.MonkeyPatch.context() as m:
        for module in (rl_py, run_py):
            m.setattr(module, "sum_grads", keep(module.sum_grads))
        ranks.play(photos, out, script, *ONE, *flags)
    return [g for update in found for g in update]


@pytest.mark.parametrize("task", TASKS)
def test_gradients_are_equal(photos, tmp_path, again, task):
    script, flags = TASKS[task]
    if script == "sft" and flags:
        flags = [*flags, "--tuples", folder_of(tmp_path / flags[1], flags[1])]
    whole = gradients(photos, tmp_path / "all", script, [*flags, "--micro", 0])
    most = max(g.abs().max() for g in whole)
    assert most > 0
    for i, more in enumerate((["--micro", 1], ["--micro", 3], ["--micro", 0, "--checkpoint"])):
        parts = gradients(photos, tmp_path / str(i), script, [*flags, *more])
        assert len(parts) == len(whole)
        for a, b in zip(parts, whole):
            assert (a - b).abs().max() <= 1e-6 * max(1, most), more
    assert again["vlm" if task in ("edit_reward", "reflect") else "dit"]
    assert again["vlm"] or script in ("grpo", "cycle_edit")


def test_many_rows_go_in_parts(parts, photos, monkeypatch):
    """Without a gradient a DiT has so many rows at once and no more; the velocity is the same."""
    model = tiny.build(Config(**json.loads((parts / "config.json").read_text())))
    cond = model.guided(model.encode(["a red star", "two blue circles", "a cup"] * 2), 2.0)
    x, t = torch.randn(6, 4, 16, 16), torch.rand(6)
    sizes, forward = [], model.dit.forward
    monkeypatch.setattr(model.dit, "forward", lambda x, *rest: (
        sizes.append(len(x)), forward(x, *rest))[1])
    whole = model.velocity(x, t, cond)
    assert sizes == [6, 6]
    monkeypatch.setattr(model.dit, "width", 2**20)           # as if it were so wide
    with torch.no_grad():
        parts = model.velocity(x, t, cond)
    assert max(sizes[2:]) < 6 and sum(sizes[2:]) == 12
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
