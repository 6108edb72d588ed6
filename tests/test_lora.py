"""Adapters, weights that people have, what they take from here, and what it will cost."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import SanaTransformer2DModel, SD3Transformer2DModel
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from test_cli import complaint, folder_of, photo
from test_grpo import saved
from transformers import AutoModelForImageTextToText, AutoTokenizer

import common.presets as presets_py
import common.rl as rl_py
import common.weights as weights_py
import grpo
import sample
import sft
from common.checkpoint import Ema, save_weights
from common.presets import Config
from common.weights import adapter, learn, slim, swapped
from model import MMDiT, Unified

PROMPTS = ["a photo of a red circle", "two blue stars"]


@pytest.fixture
def cfg(parts):
    return Config(**json.loads((parts / "config.json").read_text()))


def tuned(cfg, parts, **ranks):
    """The tiny model with adapters that do something."""
    model = tiny.build(cfg, init=parts / "sft")
    learn(model, {k: adapter(k, r, 3 * r) for k, r in ranks.items()})
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.2)
    return model


def outcome(model):
    """What a change of any part's weights shows in: velocity, and the VLM's logits."""
    with torch.no_grad():
        v = model.velocity(model.noise([1, 2]), 0.6, [(1.0, model.encode(PROMPTS))])
        ids = torch.arange(20, 40)[None]
        return v, model.vlm(input_ids=ids).logits


def same(a, b, tol=1e-5):
    """Relative to the largest: fp32 sums of a strong LoRA's logits round at their own size."""
    for x, y in zip(a, b):
        assert (x - y).abs().max() <= tol * y.abs().max().clamp(min=1)


def checkpoint(model, out):
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    save_weights(model, Ema(params, 0.9), out / "ckpt", 1)()
    return load_file(out / "ckpt/model.safetensors")


# --- adapters ---


def test_what_is_adapted(cfg, parts):
    model = tuned(cfg, parts, dit=2, vlm=2)
    mine = {k.split(".lora_")[0] for k, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in k for k, p in model.named_parameters() if p.requires_grad)
    lm = {f"vlm.{n}" for n, m in tiny.build(cfg).vlm.named_modules() if "language_model" in n
          and isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
    assert {k for k in mine if k.startswith("vlm")} == lm and len(lm) == 2 * 7 + 1
    block = [k.split("blocks.0.")[1] for k in mine if "blocks.0." in k and k.startswith("dit")]
    want = {f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                                  "add_v_proj", "to_add_out")}
    assert set(block) == want
    dual = MMDiT(**tiny.MMDIT | dict(dual_attention_layers=(0,)))
    inject_adapter_in_model(adapter("dit", 2, 4), dual)
    names = {k.split(".lora_")[0] for k in dual.state_dict() if "lora_" in k}
    assert "transformer_blocks.0.attn2.to_q" in names and "proj_out" not in names


def test_merged_is_unmerged(cfg, parts, tmp_path):
    """What a run computed with is what its checkpoint loads as, adapters of both kinds."""
    model = tuned(cfg, parts, dit=2, vlm=3)
    before, base = outcome(model), outcome(tiny.build(cfg, init=parts / "sft"))
    assert all((a - b).abs().max() > 0.05 for a, b in zip(before, base))
    tensors = checkpoint(model, tmp_path / "run")
    again = tiny.build(cfg, init=tmp_path / "run")
    same(outcome(again), before)
    key = "transformer_blocks.0.attn.to_q"
    layer = model.dit.get_submodule(key)
    same([again.dit.get_submodule(key).weight], [
        layer.base_layer.weight + 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight])
    embedding = model.vlm.get_input_embeddings()
    same([again.vlm.get_input_embeddings().weight], [embedding.base_layer.weight + 3 * (
        embedding.lora_embedding_B.default @ embedding.lora_embedding_A.default).T])
    assert torch.equal(again.vlm.lm_head.weight, embedding.base_layer.weight)    # was tied to it
    assert not any("lora_" in k or "base_layer" in k for k in again.state_dict())
    assert {k.split(".")[0] for k in tensors if "lora_" not in k} == {"dit", "bridge"}   # of --init
    assert any(k.startswith("vlm.model.language_model.layers.0.mlp") for k in tensors)

    # From here on: the VLM's adapter is carried along, the DiT's is a share of its weights.
    learn(again, dict(dit=adapter("dit", 2, 2)))
    third = checkpoint(again, tmp_path / "next")
    assert {k for k in tensors if k.startswith("vlm")} == {k for k in third if k.startswith("vlm")}
    same(outcome(tiny.build(cfg, init=tmp_path / "next")), before)


@pytest.mark.parametrize("base", ["", "sft"])
@pytest.mark.parametrize("then", [dict(bridge=None), dict(dit=None), dict(dit=(2, 4))])
def test_whatever_learns_next_nothing_is_lost_or_merged_twice(cfg, parts, tmp_path, base, then):
    model = tiny.build(cfg, init=base and parts / base)
    learn(model, dict(dit=adapter("dit", 2, 4)))
    for p in model.parameters():
        p.data += 0.1 * p.requires_grad
    checkpoint(model, tmp_path / "a")
    again = tiny.build(cfg, init=tmp_path / "a")
    learn(again, {k: r and adapter(k, *r) for k, r in then.items()})
    checkpoint(again, tmp_path / "b")
    x, t, ctx = torch.randn(2, 4, 16, 16), 0.5, torch.randn(2, 3, 32)
    with torch.no_grad():
        same([tiny.build(cfg, init=tmp_path / "b").dit(x, t, ctx)], [model.dit(x, t, ctx)])


def test_of_a_pure_lora_run_only_the_lora_is_kept(cfg, parts, tmp_path):
    model = tiny.build(cfg)
    learn(model, dict(dit=adapter("dit", 2, 4)))
    assert all("lora_" in k for k in checkpoint(model, tmp_path))
    other = tiny.build(cfg)
    learn(other, dict(dit=adapter("dit", 2, 4)), seed=0)              # every rank draws the same
    same(model.dit.parameters(), other.dit.parameters(), 0)


def test_the_reference_is_the_adapter_switched_off(cfg, parts):
    model, base = tuned(cfg, parts, dit=2), tiny.build(cfg, init=parts / "sft")
    with torch.no_grad(), swapped(model, (model.dit, model.bridge)):
        off = outcome(model)
    assert all(map(torch.equal, off, outcome(base)))
    assert (outcome(model)[0] - off[0]).abs().max() > 0.05
    model.velocity(model.noise([1]), 0.5, [(1.0, model.encode(["x"]))]).sum().backward()
    assert all(p.grad is not None for p in model.dit.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.dit.parameters()) == 2 * (8 + 7)     # and again on


def test_grpo_with_a_lora(parts, cfg, tmp_path, monkeypatch):
    """Ratio 1 and KL 0 at first, no second DiT, an exact restart, a run from its checkpoint."""
    flags = ["--steps", 3, "--lora-rank", 4, "--beta", 0.1, "--lr", 0.01, "--eval-every", 1,
             "--train", "both"]
    copied = []
    with monkeypatch.context() as m:
        m.setattr(rl_py, "copy", SimpleNamespace(deepcopy=copied.append))
        m.setattr(rl_py, "load_model",
                  lambda *a: [copied.append(a[-1]), weights_py.load_model(*a)][1])
        first = tiny.play(parts, tmp_path / "x", *flags[:-2], "--steps", 1)
    assert copied == [[]]                              # neither planned nor made
    assert first[1]["ratio_off"] <= 1e-6 and first[1]["kl"] == 0 and first[1]["grad_norm"] > 0
    whole = tiny.play(parts, tmp_path / "a", *flags)
    assert whole[1]["kl"] == 0 and whole[3]["kl"] > 1e-6
    with tiny.killed_at(grpo, "rollout", 2):
        tiny.play(parts, tmp_path / "b", *flags)
    tiny.play(parts, tmp_path / "b", *flags, "--resume")
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
    next_ = tiny.play(parts, tmp_path / "c", *flags, "--init", tmp_path / "a")
    assert next_[1]["kl"] == 0 and next_[1]["ratio_off"] <= 1e-6   # merged: its new reference
    a, c = (outcome(tiny.build(cfg, init=tmp_path / r))[0] for r in "ac")
    assert (a - c).abs().max() > 1e-4
    assert next_[0]["kB"] == pytest.approx(whole[3]["kB"], abs=0.01)       # starts where a ended
    assert "trained other weights" in complaint(
        tiny.play, parts, tmp_path / "b", "--resume", "--lora-rank", 8, "--change", "lora-rank")
    assert "--lora-rank adapts the DiT: --train dit or both" in complaint(
        tiny.play, parts, tmp_path / "d", "--lora-rank", 2, "--train", "bridge")


@pytest.mark.parametrize("train", ["dit", "bridge", "both"])
def test_sft_trains_what_it_is_told(parts, cfg, tmp_path, train):
    """UniPic 2.0 table 3: connector or DiT frozen; the checkpoint holds both all the same."""
    data = ["--data", folder_of(tmp_path, ["0.png"]), "--batch", 1, "--steps", 1, "--lr", 1.0]
    photo(tmp_path / "0.png", 64, 64, 0)
    tiny.play(parts, tmp_path / "a", *data, "--train", train, main=sft.main)
    old, new = (tiny.build(cfg, init=folder) for folder in (parts / "sft", tmp_path / "a"))
    for part in ("bridge", "dit"):
        moved = any(not torch.equal(p, q) for p, q in zip(
            getattr(old, part).parameters(), getattr(new, part).parameters()))
        assert moved == (train in (part, "both"))


def test_sft_refuses_what_nothing_would_learn_from(parts, tmp_path):
    for flags, words in ((["--train", "vae"], "there are: dit, bridge, both"),
                         (["--train", "bridge", "--lora-rank", 2], "--train dit or both")):
        assert words in complaint(
            lambda: tiny.play(parts, tmp_path / "x", *flags, main=sft.main))
        assert not (tmp_path / "x").exists()


def test_sft_with_both_loras(parts, cfg, tmp_path, monkeypatch):
    """Dropout in training only, the same after a restart; RL from its checkpoint, without it."""
    names = [f"{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        photo(tmp_path / name, 64, 64, i)
    data = ["--data", folder_of(tmp_path, names), "--batch", 2, "--eval-every", 1]
    flags = [*data, "--lora-rank", 2, "--vlm-lora-rank", 2, "--vlm-lora-dropout", 0.5, "--steps", 3]
    whole = tiny.play(parts, tmp_path / "a", *flags, main=sft.main)
    other = tiny.play(parts, tmp_path / "o", *flags, "--vlm-lora-dropout", 0.0, main=sft.main)
    assert other[0]["loss"] == whole[0]["loss"]                          # B = 0: nothing to drop
    assert other[2]["loss"] != whole[2]["loss"]
    with tiny.killed_at(sft, "train_times", 2):
        tiny.play(parts, tmp_path / "b", *flags, main=sft.main)
    tiny.play(parts, tmp_path / "b", *flags, "--resume", main=sft.main)
    assert torch.equal(saved(tmp_path / "a"), saved(tmp_path / "b"))
    rows = tiny.play(parts, tmp_path / "c", "--init", tmp_path / "a", "--steps", 1)
    assert rows[1]["ratio_off"] <= 1e-6
    a, c = (load_file(tmp_path / r / "ckpt/model.safetensors") for r in "ac")
    lora = [k for k in a if k.startswith("vlm")]
    assert len(lora) == 30 and lora == [k for k in c if k.startswith("vlm")]
    model = learn(tiny.build(cfg, init=tmp_path / "a"), dict(vlm=adapter("vlm", 2, 6, 0.5)))
    for p in model.vlm.parameters():
        p.data += 0.1 * p.requires_grad
    assert torch.equal(outcome(model)[0], outcome(model)[0])
    model.train()
    assert not torch.equal(outcome(model)[0], outcome(model)[0]) and not model.vae.training


# --- weights that people have, and what they take from here ---


def velocities(dit, seed=0):
    """Of ours, and of diffusers' class, on the same input."""
    g = torch.Generator().manual_seed(seed)
    x, ctx, pooled = (torch.randn(s, generator=g) for s in ((2, 4, 16, 16), (2, 5, 32), (2, 16)))
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        if isinstance(dit, MMDiT):
            return dit(x, t, ctx, pooled=pooled)
        return dit(x, encoder_hidden_states=ctx, pooled_projections=pooled, timestep=1000 * t)[0]


def test_export(cfg, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    model = tiny.build(cfg)
    learn(model, dict(dit=adapter("dit", 2, 6), vlm=adapter("vlm", 2, 6)))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.2)
    checkpoint(model, tmp_path / "run")
    out = tmp_path / "parts"
    argv = ["sample.py", "--init", tmp_path / "run", "--export", out]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    sample.main()
    theirs, info = SD3Transformer2DModel.from_pretrained(out / "transformer",
                                                         output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    same([velocities(theirs)], [velocities(model.dit)])

    base = SD3Transformer2DModel.from_pretrained(parts / "dit")
    assert (velocities(base) - velocities(model.dit)).abs().max() > 0.05
    same([velocities(PeftModel.from_pretrained(base, out / "lora"))], [velocities(model.dit)])
    same([velocities(tiny.build(cfg, init=out / "lora").dit)], [velocities(model.dit)])
    same([velocities(tiny.build(cfg, init=out / "transformer").dit)], [velocities(model.dit)])

    vlm, info = AutoModelForImageTextToText.from_pretrained(out / "vlm", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, logits = torch.arange(20, 40)[None], outcome(model)[1]
    with torch.no_grad():
        same([vlm(input_ids=ids).logits], [logits])
        fresh = AutoModelForImageTextToText.from_pretrained(parts / "vlm").eval()
        assert (fresh(input_ids=ids).logits - logits).abs().max() > 0.05
        weights_py.untie(fresh)
        same([PeftModel.from_pretrained(fresh, out / "vlm_lora")(input_ids=ids).logits], [logits])
    assert AutoTokenizer.from_pretrained(out / "vlm")("a red circle") == model.tokenizer(
        "a red circle")
    assert (out / "vlm/preprocessor_config.json").exists()
    again = tiny.build(replace(cfg, vlm=str(out / "vlm"), dit=str(out / "transformer")))
    same(outcome(again)[1:], [logits])                       # --vlm and --dit take it back
    assert "exists: choose another folder" in complaint(sample.main)


SANA = dict(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, sample_size=16,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, mlp_ratio=2.0, patch_size=2)


@pytest.mark.parametrize("ref", ["none", "add"])
def test_sana(cfg, parts, tmp_path, monkeypatch, ref):
    """From diffusers' folder, a LoRA on both attentions, and back into diffusers' class."""
    torch.manual_seed(0)
    SanaTransformer2DModel(**SANA).save_pretrained(tmp_path / "dit")
    cfg = replace(cfg, mmdit={}, sana=SANA | dict(ref=ref), dit=str(tmp_path / "dit"), bridge="lim",
                  keep="query", layers=(1, 2))
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    model = learn(tiny.build(cfg), dict(dit=adapter("dit", 2, 6)))
    assert {k.split(".lora_")[0][19:] for k in model.dit.state_dict() if "lora_A" in k} == {
        f"{i}.attn{j}.{n}" for i in (0, 1) for j in (1, 2)
        for n in ("to_q", "to_k", "to_v", "to_out.0")}
    for p in model.parameters():
        p.data += 0.1 * p.requires_grad
    checkpoint(model, tmp_path / "run")
    argv = ["sample.py", "--init", tmp_path / "run", "--export", tmp_path / "parts"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    sample.main()
    theirs, info = SanaTransformer2DModel.from_pretrained(tmp_path / "parts/transformer",
                                                          output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x, ctx, t = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        want = model.dit(x, t, ctx)
        same([theirs(x, encoder_hidden_states=ctx, timestep=1000 * t)[0]], [want])
        same([tiny.build(cfg, init=tmp_path / "parts/transformer").dit(x, t, ctx)], [want])
        assert (tiny.build(cfg).dit(x, t, ctx) - want).abs().max() > 0.01


def test_flow_grpo_lora(cfg, parts, tmp_path):
    """As Flow-GRPO publishes it: made by peft on diffusers' class."""
    theirs = get_peft_model(SD3Transformer2DModel.from_pretrained(parts / "dit"), LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=[
            "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
            "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"]))
    tiny.randomise(SimpleNamespace(parameters=lambda: (
        p for p in theirs.parameters() if p.requires_grad)))
    theirs.save_pretrained(tmp_path)
    model = tiny.build(cfg, init=tmp_path)
    same([velocities(model.dit)], [velocities(theirs)])
    kept = checkpoint(learn(model, dict(bridge=None)), tmp_path / "c")
    assert {k.split(".")[0] for k in kept} == {"bridge", "dit"}
    same([velocities(tiny.build(cfg, init=tmp_path / "c").dit)], [velocities(theirs)])


def test_a_part_is_flag_then_checkpoint_then_preset(cfg, parts, tmp_path, monkeypatch):
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    shutil.copytree(parts / "dit", tmp_path / "a")
    shutil.copytree(parts / "dit", tmp_path / "b")
    for name, value in (("a", 1.0), ("b", 2.0)):
        weights = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        weights["proj_out.bias"] = torch.full_like(weights["proj_out.bias"], value)
        save_file(weights, tmp_path / name / "diffusion_pytorch_model.safetensors")
    made = learn(Unified.from_preset("shapes", dit=str(tmp_path / "a")), dict(bridge=None))
    checkpoint(made, tmp_path / "run")
    for build, want in [(lambda: Unified.from_preset("shapes", tmp_path / "run"), 1.0),
                        (lambda: Unified.load(tmp_path / "run"), 1.0),
                        (lambda: Unified.load(tmp_path / "run", dit=str(tmp_path / "b")), 2.0)]:
        assert (build().dit.proj_out.bias == want).all()


def shard(folder):
    """A folder's one file as two shards and their index."""
    file = folder / "diffusion_pytorch_model.safetensors"
    weights, names = load_file(file), {}
    for i, keys in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        shard = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
        save_file({k: weights[k] for k in keys}, folder / shard)
        names |= dict.fromkeys(keys, shard)
    file.unlink()
    (folder / f"{file.name}.index.json").write_text(json.dumps(dict(weight_map=names)))


def test_an_init_with_a_whole_dit_needs_no_other(cfg, parts, tmp_path):
    """Billions of weights are not read to be thrown away."""
    shutil.copytree(parts / "dit", tmp_path / "dit", ignore=lambda *_: ["model.safetensors",
                    "diffusion_pytorch_model.safetensors"])
    bare = replace(cfg, dit=str(tmp_path / "dit"))
    same(*(outcome(tiny.build(c, init=parts / "sft")) for c in (bare, cfg)))
    assert "has no weights" in complaint(tiny.build, bare)


@pytest.mark.parametrize("part", ["dit", "vlm"])
def test_a_part_that_init_brings_has_no_flag(cfg, parts, tmp_path, monkeypatch, part):
    """Its weights would never be read."""
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    made = learn(Unified.from_preset("shapes"), {part: None})
    checkpoint(made, tmp_path / "run")
    own = getattr(cfg, part)
    shutil.copytree(own, tmp_path / "other")
    assert Unified.from_preset("shapes", tmp_path / "run", **{part: own})
    said = complaint(lambda: Unified.from_preset("shapes", tmp_path / "run",
                                                 **{part: str(tmp_path / "other")}))
    assert f"run brings a whole {part} of its own: leave --{part} out" in said


OWN = """
import torch
from model import MMDiT

WAVES = torch.ones(3)                                            # made where the file is read


class Mine(MMDiT):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.again = self.proj_out                               # a weight with two names

    def forward(self, *inputs, **more):
        return super().forward(*inputs, **more) * WAVES.mean()
"""


def test_a_dit_of_a_users_own(cfg, parts, tmp_path, monkeypatch):
    """The plan looks at shapes first; then what its file computed has memory, and what it has tied
    stays tied, also in a checkpoint."""
    (tmp_path / "mine.py").write_text(OWN)
    mine = replace(cfg, mmdit={}, dit_class=f"{tmp_path}/mine.py:Mine", dit_args=cfg.mmdit,
                   dit=str(tmp_path / "dit"))
    shutil.copytree(parts / "dit", tmp_path / "dit")
    file = tmp_path / "dit/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {k.replace("proj_out", "again"): v.clone() for k, v in weights.items()
                         if k.startswith("proj_out")}, file)
    monkeypatch.setitem(presets_py.PRESETS, "shapes", mine)
    Unified.from_preset("shapes", meta=True)
    model = learn(Unified.from_preset("shapes"), dict(dit=None))
    checkpoint(model, tmp_path / "run")
    for m in (model, Unified.from_preset("shapes", tmp_path / "run")):
        assert m.dit.again.weight is m.dit.proj_out.weight
        same(outcome(m), outcome(tiny.build(cfg)))


def test_a_dit_that_can_have_no_lora(cfg):
    model = tiny.build(cfg)
    model.dit = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert "the dit can have no such LoRA" in complaint(
        learn, model, dict(dit=weights_py.adapter("dit", 2, 2)))


def test_shards(cfg, parts, tmp_path):
    shutil.copytree(parts / "dit", tmp_path / "dit")
    shard(tmp_path / "dit")
    model = tiny.build(replace(cfg, dit=str(tmp_path / "dit")))
    assert torch.equal(velocities(model.dit), velocities(tiny.build(cfg).dit))


@pytest.mark.parametrize("part, damage, words", [
    ("dit", "config", "it has no config.json"), ("vlm", "config", "it has no config.json"),
    ("dit", "parent", "no config.json; did you mean "),
    ("dit", "weights", "has no weights"), ("vae", "weights", "has no weights"),
    ("dit", "cut", "may be truncated"), ("vlm", "cut", "may be truncated"),
    ("dit", "gone", "is half-downloaded: 1 of 2 shards are missing, first diffusion_pytorch_"),
    ("dit", "keys", "12 keys differ, first a0 (unexpected), a1 (unexpected)"),
    ("vae", "keys", "12 keys differ, first a0 (unexpected)"),
    ("vlm", "keys", "12 keys differ, first a0 (unexpected)"),
    ("dit", "shape", "1 keys differ, first proj_out.bias ([3], not [16])"),
    ("dit", "heads", "does not fit preset 'shapes': attention_head_dim 4, not 8"),
    ("vlm", "as-vae", "not a VAE"), ("vae", "as-vlm", "cannot be loaded as AutoModelForImage"),
])
def test_a_damaged_or_wrong_folder(cfg, parts, tmp_path, part, damage, words):
    folder = tmp_path / "x" / part
    shutil.copytree(parts / part, folder)
    name = "model" if part == "vlm" else "diffusion_pytorch_model"
    file, config = folder / f"{name}.safetensors", folder / "config.json"
    if damage == "config":
        config.unlink()
    elif damage == "parent":
        folder = tmp_path / "x"
    elif damage == "weights":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "gone":
        shard(folder)
        next(folder.glob("*-00002-of*")).unlink()
    elif damage in ("keys", "shape"):
        weights = load_file(file)
        more = {f"a{i}": torch.zeros(1) for i in range(12)}
        save_file(weights | (more if damage == "keys" else {"proj_out.bias": torch.zeros(3)}), file,
                  {"format": "pt"})
    elif damage == "heads":
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(attention_head_dim=4)))
    flag = damage.removeprefix("as-") if damage.startswith("as-") else part
    said = complaint(tiny.build, replace(cfg, **{flag: str(folder)}))
    assert words in said and said.count("(unexpected)") in (0, 10)
    assert ("and 2 more" in said) == (damage == "keys")


def test_vlm_of_another_size(cfg):
    assert "has 2 layers of width 32; preset 'shapes' needs width 64" in complaint(
        tiny.build, replace(cfg, vlm_dim=64))
    assert "layers (9,)" in complaint(tiny.build, replace(cfg, layers=(9,)))


@pytest.mark.parametrize("error, words", [
    (GatedRepoError, "a/b is gated: accept its licence at https://huggingface.co/a/b"),
    (RepositoryNotFoundError, "a/b is neither a folder nor a repository on the Hub"),
    (LocalEntryNotFoundError, "out of reach: `hf download a/b`"),
    (None, "neither a folder nor owner/repo")])
def test_the_hub_refuses(cfg, monkeypatch, error, words):
    def refuse(repo, allow_patterns, **_):
        assert repo == "a/b" and "c/config.json" in allow_patterns or "c/*.json" in allow_patterns
        raise error.__new__(error)
    if error:
        monkeypatch.setattr(weights_py, "snapshot_download", refuse)
        assert words in complaint(weights_py.fetch, "a/b/c")
    else:                                                    # not asked: this is no repository
        assert words in complaint(weights_py.fetch, "/none/of/this")


def test_lora_folders_that_do_not_fit(cfg, parts, tmp_path):
    model = tuned(cfg, parts, dit=2)
    config = model.adapters["dit"][0]
    config.save_pretrained(tmp_path)
    assert "adapter_model.safetensors" in complaint(lambda: tiny.build(cfg, init=tmp_path))
    save_file({"base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 32)},
              tmp_path / "adapter_model.safetensors")
    said = complaint(lambda: tiny.build(cfg, init=tmp_path))
    assert "29 keys differ" in said and "(missing)" in said and "and 19 more" in said
    config.target_modules = {"nowhere"}
    config.save_pretrained(tmp_path)
    assert "does not fit" in complaint(lambda: tiny.build(cfg, init=tmp_path))
    assert "names no preset: give --preset" in complaint(Unified.load, tmp_path)


# --- memory ---


def test_what_is_frozen_is_held_in_bf16(parts, cfg):
    """As on a GPU; here its rules and its arithmetic, on the CPU."""
    gpu, prompts = SimpleNamespace(type="cuda"), ["a photo of a red circle", None]
    full, thin = (learn(tiny.build(cfg, bf16=True, init=parts / "sft"),
                        dict(dit=adapter("dit", 4, 8), bridge=None)) for _ in range(2))
    assert slim(tiny.build(cfg), gpu).vlm.dtype == torch.float32              # no bf16, no change
    assert slim(full, torch.device("cpu")).vlm.dtype == torch.float32
    slim(thin, gpu)
    kept = {k for k, p in thin.named_parameters() if p.dtype == torch.float32}
    assert kept == {k for k, p in thin.named_parameters()
                    if p.requires_grad or k.startswith("vae")} > {"bridge.meta_queries"}
    v = []
    for model in (full, thin):
        guided = [(1.0, model.encode(prompts))]
        v.append(model.velocity(model.noise([1, 2]), torch.tensor([0.3, 0.9]), guided))
        v[-1].square().mean().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all()
                   for p in model.parameters() if p.requires_grad)
    assert 0 < (v[0] - v[1]).abs().max() < 0.03 * v[0].abs().max()


def test_vae_takes_a_few_at_a_time(cfg, monkeypatch):
    """However many images go through the VAE at once, the result is one after the other's."""
    model, images = tiny.build(cfg), torch.randint(0, 256, (5, 3, 512, 512), dtype=torch.uint8)
    z = torch.cat([model.to_latents(i[None]) for i in images])
    x = torch.cat([model.to_images(a[None]) for a in z])
    seen = []
    for name in ("encode", "decode"):
        real = getattr(model.vae, name)
        monkeypatch.setattr(model.vae, name, lambda x, real=real, **k: [
            seen.append(len(x)), real(x, **k)][1])
    assert (model.to_latents(images) - z).abs().max() < 1e-3       # another batch, other rounding
    assert (model.to_images(z).int() - x.int()).abs().max() <= 1
    assert seen == [4, 1] + [1] * 5                      # a CPU decodes fewer


def test_memory_of_sd35_medium():
    """Without a download: what the preset says is enough for the DiT."""
    with torch.device("meta"):
        dit = MMDiT(**presets_py.PRESETS["flow-grpo"].mmdit)
    assert len(dit.state_dict()) == 909
    assert sum(p.numel() for p in dit.parameters()) == pytest.approx(2.243e9, rel=1e-3)
    inject_adapter_in_model(adapter("dit", 32, 64), dit)
    assert sum(p.numel() for p in dit.parameters() if p.requires_grad) == (
        (24 * 7 + 23 + 13 * 4) * 2 * 32 * 1536)


def test_parts_that_are_not_there_are_refused(parts):
    """Of a preset whose text tower speaks to the DiT directly"""
    model = tiny.build(Config(**json.loads((parts / "config.json").read_text())))
    model.vlm, model.bridge = None, torch.nn.Identity()
    model.requires_grad_(False)
    for what, words in ((dict(vlm=None), "has no vlm that could learn"),
                        (dict(bridge=None), "its bridge has no weights to learn")):
        assert words in complaint(learn, model, what)
