"""Every paper's preset, scaled down, from its first stage to ten updates of RL, as users run it."""

import json
import sys
from dataclasses import fields, replace

import pytest
import tiny
import torch
from diffusers import (FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel,
                       SD3Transformer2DModel)
from test_bridges import intern, qwen, sd3  # noqa: F401
from test_cli import folder_of, photo
from test_lora import SANA

import common.presets as presets_py
import grpo
import model
import pretrain
import reflect
import sample
import sft
from common.presets import PRESETS, RECIPES
from model import Unified, dpm_step, sigmas

PAPERS = [name for name in PRESETS if not name.startswith("shapes")]
# Smaller numbers of the same things; what is left is the preset's own.
STAGES = {
    1: (pretrain, "--steps 1 --batch 2 --warmup 1"),
    2: (sft, "--steps 1 --batch 2 --warmup 1"),
    3: (grpo, "--steps 10 --B 2 --G 2 --T 6 --window 2 --window-start 0 --window-stop 2 --eval-T 2 "
              "--micro 3 --eval-every 10 --lora-rank {lora} --reward jpeg_incompressibility "
              "--trained 0 --sft-batch 2"),
}
THINK = STAGES[3][1].replace("--steps 10", "--steps 2").replace("--window-start 0 ", "").replace(
    "--trained 0 --sft-batch 2", "")


def shrunk(name, parts, vlm, text, tmp_path, monkeypatch):
    """A paper's preset on tiny parts, under its own name, in bf16. -> the preset as it was"""
    torch.manual_seed(0)
    SanaTransformer2DModel(**SANA).save_pretrained(tmp_path / "sana")
    [part.save_pretrained(tmp_path / "intern") for part in vlm]
    full = PRESETS[name]
    dit = tiny.MMDIT | (dict(pooled_projection_dim=8 + 16) if full.bridge == "text" else {})
    SD3Transformer2DModel(**dit).save_pretrained(tmp_path / "dit")
    sizes = dict(vlm_dim=32, n_query=3, c_dim=32, c_ff=64, c_layers=1, c_heads=4, t5_tokens=9,
                 size=32, vae_factor=4, layers=(2, 1) if full.layers else (),
                 vlm=str(tmp_path / "intern" if full.image_tokens[0] == "<img>" else parts / "vlm"),
                 dit=str(tmp_path / ("sana" if full.sana else "dit")), vae=str(parts / "vae"),
                 text_encoder=str(text[1] / "True"))
    sizes |= (dict(sana=SANA | dict(ref=full.sana.get("ref", "none"))) if full.sana
              else dict(mmdit=dit))
    monkeypatch.setitem(PRESETS, name, replace(full, **sizes))
    monkeypatch.setattr(model, "has_bf16", lambda: True)
    return full


def check_memory(model):
    """Every weight has memory of its own: of two in one place, what either learns changes both."""
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    places = [p.data_ptr() for p in model.parameters()]
    assert len({*places}) == len(places)


@pytest.mark.parametrize("name", PAPERS)
def test_all_stages_of_a_paper(parts, intern, sd3, tmp_path, monkeypatch, name):  # noqa: F811
    full = shrunk(name, parts, intern, sd3, tmp_path, monkeypatch)
    photos = [f"{i}.png" for i in range(4)]
    [photo(tmp_path / file, 40, 30, i) for i, file in enumerate(photos)]
    data, init, moved = folder_of(tmp_path, photos), "", {}
    for stage, (script, flags) in STAGES.items():
        if getattr(full, f"stage{stage}") is None:
            continue
        paper = getattr(full, f"stage{stage}")
        paper = RECIPES.get(paper.get("recipe"), {}) | paper
        lora = paper.get("lora_rank", 0) and 2
        argv = ["--preset", name, "--out", tmp_path / f"stage{stage}", "--init", init,
                *flags.format(lora=lora).split()]
        argv += (["--prompts", parts / "prompts.jsonl", "--sft-data", data] if stage == 3
                 else ["--data", data])
        if "ldam" in paper:
            argv += ["--ldam", "jpeg_incompressibility:1-2"]
        argv = tiny.as_recipe(script.Args, argv, tmp_path / "recipe.json")
        monkeypatch.setattr(sys, "argv", ["x.py", *argv])
        before = Unified.from_preset(name, init)
        check_memory(before)
        script.main()
        init = tmp_path / f"stage{stage}"
        saved = Unified.from_preset(name, init)
        check_memory(saved)
        after = dict(saved.named_parameters())
        assert all(p.isfinite().all() for p in after.values())
        moved[stage] = {k.split(".")[0] for k, p in before.named_parameters()
                        if not torch.equal(p, after[k])}
        rows = [json.loads(line) for line in open(init / "log.jsonl")]
        assert len(rows) == (11 if stage == 3 else 1)
        assert list((init / "samples").glob("*.png"))
    bridge = {"bridge"} - ({"bridge"} if full.bridge == "text" else set())
    assert moved.get(1, bridge) == bridge
    assert moved.get(2, {"dit"}) - {"vlm"} == {"dit"} | (bridge if 2 in moved else set())
    assert ("vlm" in moved.get(2, ())) == (name == "deepgen")
    if 3 in moved:
        assert rows[1]["ratio_off"] <= 2e-4 and {r["step"] for r in rows} == set(range(11))
        assert moved[3] == {"dit"} | (bridge if paper.get("train") == "both" else set())


@pytest.mark.parametrize("name", ["unirl-zero", "deepgen", "parauni"])   # two Qwens, one InternVL
def test_a_paper_thinks_before_it_draws(parts, intern, sd3, tmp_path, monkeypatch,  # noqa: F811
                                        name):
    """--task cot by the same path, whatever the VLM, bridge and DiT; LoRA or not."""
    shrunk(name, parts, intern, sd3, tmp_path, monkeypatch)
    lora, known = 0 if name == "unirl-zero" else 2, {f.name for f in fields(reflect.Args)}
    recipe = RECIPES[PRESETS[name].stage3["recipe"]]             # but for what drawing alone has
    recipe = {k: v for k, v in recipe.items() if k in known} | dict(window_start=0)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    argv = ["--task", "cot", "--preset", name, "--out", tmp_path / "cot", "--init", "",
            *THINK.format(lora=lora).split(), "--recipe", tmp_path / "recipe.json",
            "--train", "both", "--vlm-lora-rank", lora, "--limit", 6,
            "--data", parts / "prompts.jsonl"]
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, argv)])
    reflect.main()
    rows = [json.loads(line) for line in open(tmp_path / "cot" / "log.jsonl")]
    assert rows[1]["ratio_off"] <= 2e-4 and rows[1]["lm_ratio_off"] <= 0.05
    assert rows[1]["lm_grad_norm"] > 0 and rows[1]["words"] > 1
    before, after = (dict(Unified.from_preset(name, init).named_parameters())
                     for init in ("", tmp_path / "cot"))
    moved = {k.split(".")[0] for k, p in before.items() if not torch.equal(p, after[k])}
    assert moved == {"vlm", "bridge", "dit"}
    assert list((tmp_path / "cot" / "samples").glob("*.png"))


# --- how a preset samples: as its paper does ---


def test_grids_and_solvers():
    own = dict.fromkeys(("deepgen", "flow-grpo", "unipic2", "unipic2-kontext", "unirl-zero"),
                        ("diffusers", "euler"))
    own |= dict.fromkeys(("openuni", "parauni"), ("uniform", "dpm"))
    assert {name: (c.grid, c.solver) for name, c in PRESETS.items()} == own | dict.fromkeys(
        ("shapes", "shapes-sana"), ("uniform", "euler"))


@pytest.mark.parametrize("grid", ["uniform", "diffusers"])
@pytest.mark.parametrize("solver", ["euler", "dpm"])
def test_a_preset_samples_by_its_own(parts, grid, solver):
    """Euler is a pipeline's loop over its scheduler; DPM-Solver++ is on uniform times whatever the
    grid. Both have trajectories, and put back what is kept."""
    cfg = replace(presets_py.Config(**json.loads((parts / "config.json").read_text())), grid=grid,
                  solver=solver, sample_shift=3.0)
    m = tiny.build(cfg, init=parts / "sft")
    noise, steps = m.noise(range(2)), 6
    branches = m.guided(m.encode(["a red star", "two rings"]), 3.0)
    ts = sigmas(steps, 3.0, grid if solver == "euler" else "uniform").tolist()
    x, before = noise, None
    with torch.no_grad():
        if solver == "euler":
            scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
            scheduler.set_timesteps(**dict(num_inference_steps=steps) if grid == "diffusers" else
                                    dict(sigmas=[1 - k / steps for k in range(steps)]))
            for t in scheduler.timesteps:
                x = scheduler.step(m.velocity(x, t / 1000, branches), t, x).prev_sample
        else:
            for t, s in zip(ts, ts[1:]):
                x, before = dpm_step(m.velocity(x, t, branches), x, t, s, before)
    path = m.sample(branches, steps, noise=noise, trajectory=True)
    tiny.same(path[-1], x)
    assert torch.equal(m.sample(branches, steps, noise=noise), path[-1])
    other = "dpm" if solver == "euler" else "euler"
    assert tiny.apart(m.sample(branches, steps, noise=noise, solver=other), path[-1])
    kept = torch.zeros(2, 1, *noise.shape[2:], dtype=torch.bool)
    kept[:, :, 2:9] = True
    z = torch.linspace(-1, 1, noise.numel()).view(noise.shape)
    held = m.sample(branches, steps, noise=noise, trajectory=True, keep=(z, kept))
    for x, t in zip(held, ts):
        tiny.same(x[:, :, 2:9], ((1 - t) * z + t * noise)[:, :, 2:9])
    assert held.isfinite().all() and tiny.apart(held[-1][:, :, 9:], path[-1][:, :, 9:])


def test_solver_by_flag(parts, tmp_path, monkeypatch):
    """sample.py's, in place of the preset's; a typo dies before anything is loaded or written."""
    seen = []
    monkeypatch.setitem(PRESETS, "shapes", presets_py.Config(
        **json.loads((parts / "config.json").read_text())))
    monkeypatch.setattr(model, "dpm_step", lambda *inputs: [seen.append(1), dpm_step(*inputs)][1])
    for flags in ([], ["--solver", "dpm"], ["--solver", "heun"]):
        out = tmp_path / f"{len(flags)}{flags[-1:]}.png"
        monkeypatch.setattr(sys, "argv", ["x.py", "a star", "--init", str(parts / "sft"), "--steps",
                                          "3", "--n", "1", "--out", str(out), *flags])
        if "heun" in flags:
            with pytest.raises(SystemExit, match="unknown --solver 'heun'; there are: euler, dpm"):
                sample.main()
        else:
            sample.main()
        assert out.exists() == ("heun" not in flags) and len(seen) == (3 if flags else 0)
