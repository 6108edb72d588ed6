"""Weights from elsewhere: a LoRA as peft and diffusers write it, in and out; and whatever is broken
in a file gets one line, before anything is written."""

import json
import random
import re
import shutil
import sys
from dataclasses import asdict, replace

import huggingface_hub.constants as hub
import numpy as np
import pytest
import tiny
import torch
from diffusers import (SanaPipeline, SanaTransformer2DModel, SD3Transformer2DModel,
                       StableDiffusion3Pipeline)
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import complaint, files
from test_lora import SANA

import common.presets as presets_py
import eval as eval_py
import grpo
import sample
from common.checkpoint import read_init, read_step, save_checkpoint
from common.lora import DIFFUSERS, PEFT
from common.presets import Config
from common.weights import adapter, crc, learn
from data import convert
from model import Unified

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj"]
CROSS = ["attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0"]


@pytest.fixture(scope="module")
def ours(parts, tmp_path_factory):
    """{class of diffusers: (its folder, Config of a preset on it, what a LoRA adapts)}"""
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    folder = tmp_path_factory.mktemp("sana") / "dit"
    torch.manual_seed(0)
    dit = SanaTransformer2DModel(**SANA)
    tiny.randomise(dit)
    dit.save_pretrained(folder)
    sana = replace(cfg, mmdit={}, sana=SANA, dit=str(folder), bridge="lim", keep="query",
                   layers=(1, 2))
    return {SD3Transformer2DModel: (parts / "dit", cfg, ATTENTION),
            SanaTransformer2DModel: (folder, sana, CROSS)}


def velocity(dit, seed=0):
    """Of ours, of diffusers' classes and of what peft has made of them, on the same input."""
    g = torch.Generator().manual_seed(seed)
    x, ctx, pooled = (torch.randn(s, generator=g) for s in ((2, 4, 16, 16), (2, 5, 32), (2, 16)))
    t, names = torch.tensor([0.3, 0.8]), [type(m).__name__ for m in dit.modules()]
    with torch.no_grad():
        if "MMDiT" in names or "SanaDiT" in names:
            return dit(x, t, ctx, pooled=pooled)
        more = dict(pooled_projections=pooled) if "SD3Transformer2DModel" in names else {}
        return dit(x, encoder_hidden_states=ctx, timestep=1000 * t, **more)[0]


def as_far(got, want, base):
    """To 1e-5 of its largest, and the LoRA does something."""
    assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
    assert (velocity(base) - want).abs().max() > 0.002


def stir(module):
    """A LoRA that matters, as one that was trained."""
    g = torch.Generator().manual_seed(1)
    for k, p in module.named_parameters():
        if "lora_" in k:
            p.data += 0.2 * torch.randn(p.shape, generator=g)


KINDS = pytest.mark.parametrize("kind", [SD3Transformer2DModel, SanaTransformer2DModel])
PATCHES = {SD3Transformer2DModel: "pos_embed.proj", SanaTransformer2DModel: "patch_embed.proj"}


@KINDS
@pytest.mark.parametrize("how", [
    {}, dict(use_rslora=True), dict(use_dora=True), dict(rank_pattern={"0.attn.*to_q": 2}),
    dict(rank_pattern={"to_q": 2}, alpha_pattern={"to_v": 1, "to_q": 7}), dict(patches=True),
    dict(layers_to_transform=[1], layers_pattern="transformer_blocks"),
    dict(exclude_modules=["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn1.to_q"]),
    dict(target_modules=r"transformer_blocks\.1\..*to_[qk]", init_lora_weights="orthogonal")],
    ids=lambda how: "-".join(how) or "plain")
def test_a_lora_of_peft(ours, tmp_path, kind, how):
    folder, cfg, where = ours[kind]
    if how.get("patches"):
        where, how = [*where, PATCHES[kind]], {}
    torch.manual_seed(0)
    theirs = get_peft_model(kind.from_pretrained(folder), LoraConfig(**(dict(
        r=4, lora_alpha=8, target_modules=where, init_lora_weights="gaussian") | how)))
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path)
    as_far(velocity(tiny.build(cfg, init=tmp_path).dit), velocity(again),
           kind.from_pretrained(folder))


PIPELINES = {SD3Transformer2DModel: StableDiffusion3Pipeline, SanaTransformer2DModel: SanaPipeline}


@KINDS
@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("how", [{}, dict(rank_pattern={"to_q": 2}), dict(use_dora=True)],
                         ids=lambda how: "-".join(how) or "plain")
def test_a_lora_of_diffusers(ours, tmp_path, kind, how, metadata):
    """As its training scripts save it. Without metadata it forgets alpha, which becomes the rank:
    so diffusers, too."""
    folder, cfg, where = ours[kind]
    theirs, base = (kind.from_pretrained(folder) for _ in range(2))
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=where, **how))
    stir(theirs)
    about = theirs.peft_config["default"].to_dict() if metadata else None
    PIPELINES[kind].save_lora_weights(
        tmp_path, transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=about)
    again = kind.from_pretrained(folder)
    again.load_lora_adapter(str(tmp_path), weight_name=DIFFUSERS)
    got = velocity(tiny.build(cfg, init=tmp_path).dit)
    as_far(got, velocity(again), base)
    assert ((got - velocity(theirs)).abs().max() < 1e-4) == metadata


@KINDS
def test_an_alpha_of_its_own_per_module(ours, tmp_path, kind):
    folder, cfg, where = ours[kind]
    theirs = kind.from_pretrained(folder)
    theirs.add_adapter(LoraConfig(r=4, target_modules=where, rank_pattern={"to_q": 2}))
    stir(theirs)
    tensors = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(theirs).items()}
    modules = sorted({k.partition(".lora_")[0] for k in tensors})
    alphas = {f"{k}.alpha": float(2 + i % 3) for i, k in enumerate(modules)}
    save_file(tensors | {k: torch.tensor(v) for k, v in alphas.items()}, tmp_path / DIFFUSERS)
    again = kind.from_pretrained(folder)
    again.load_lora_adapter(tensors, network_alphas=alphas)
    as_far(velocity(tiny.build(cfg, init=tmp_path).dit), velocity(again),
           kind.from_pretrained(folder))


def exported(monkeypatch, cfg, run, out):
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--init", str(run), "--export", str(out)])
    sample.main()
    return out / "lora"


def a_run(cfg, folder):
    """-> a pure LoRA run's checkpoint, and its model"""
    model = learn(tiny.build(cfg), dict(dit=adapter("dit", 2, 6)))
    stir(model.dit)
    tensors = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    save_checkpoint(folder, tensors, cfg, 7, loras=dict(dit=model.adapters["dit"][0]))
    return model


@KINDS
def test_ours_in_peft_in_diffusers_and_back(ours, tmp_path, monkeypatch, kind):
    folder, cfg, _ = ours[kind]
    model = a_run(cfg, tmp_path / "run")
    home = exported(monkeypatch, cfg, tmp_path / "run", tmp_path / "parts")
    want, base = velocity(model.dit), kind.from_pretrained(folder)
    by_peft = PeftModel.from_pretrained(kind.from_pretrained(folder), home)
    by_diffusers, in_a_pipeline = (kind.from_pretrained(folder) for _ in range(2))
    by_diffusers.load_lora_adapter(str(home), weight_name=DIFFUSERS)
    words = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer",
                           "tokenizer_2", "tokenizer_3", "vae", "scheduler"))
    pipeline = PIPELINES[kind](transformer=in_a_pipeline, **{
        k: None for k in words if kind is SD3Transformer2DModel or k[-2:] not in ("_2", "_3")})
    pipeline.load_lora_weights(str(home))
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(home / DIFFUSERS, only)
    for dit in (by_peft, by_diffusers, in_a_pipeline, tiny.build(cfg, init=home).dit,
                tiny.build(cfg, init=only).dit):
        as_far(velocity(dit), want, base)
    assert sorted(f.name for f in home.iterdir() if f.suffix != ".md") == sorted(
        [PEFT, "adapter_config.json", DIFFUSERS])


def test_from_the_hub(ours, tmp_path, monkeypatch):
    """Its cache as the client lays it out, and the client itself, which is offline."""
    folder, cfg, _ = ours[SD3Transformer2DModel]
    model = a_run(cfg, tmp_path / "run")
    home = exported(monkeypatch, cfg, tmp_path / "run", tmp_path / "parts")
    repo = tmp_path / "cache/models--some--lora"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("a" * 40)
    at = repo / "snapshots" / ("a" * 40)
    shutil.copytree(home, at, ignore=lambda *_: [DIFFUSERS])
    shutil.copytree(home, at / "deep/er", ignore=lambda *_: [PEFT, "adapter_config.json"])
    shutil.copytree(tmp_path / "run", at / "ours")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    for name in ("some/lora", "some/lora/deep/er", "some/lora/ours"):
        assert (velocity(tiny.build(cfg, init=name).dit) - velocity(model.dit)).abs().max() < 1e-5
    assert read_step("some/lora/ours") == 7 and read_step("some/lora") is None
    assert "no checkpoint at some/lora/none" in complaint(tiny.build, cfg, False, "some/lora/none")
    for name in ("no/such", "no/such/er"):
        assert "not in the Hub's cache" in complaint(tiny.build, cfg, False, name)


# --- what is broken: one line, and nothing is written ---


def told(about, **more):
    return {"checkpoint": json.dumps(dict(config=about, step=3, loras={}) | more)}


def lora(cfg, change=None, **config):
    """A writer of peft's LoRA whose config has those values; change: of its tensors."""
    def write(folder):
        dit = tiny.build(cfg).dit
        LoraModel(dit, usual := adapter("dit", 2, 4), "default")
        usual.save_pretrained(folder)
        about = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(about))
        tensors = {f"base_model.model.{k}": v.detach()
                   for k, v in get_peft_model_state_dict(dit).items()}
        (change or (lambda t: None))(tensors)
        save_file(tensors, folder / PEFT)
    return write


def diffusers_lora(change, metadata=None):
    def write(folder):
        tensors = {f"transformer.transformer_blocks.0.attn.to_q.lora_{c}.weight": torch.ones(s)
                   for c, s in (("A", (2, 32)), ("B", (32, 2)))}
        save_file(change(tensors) or tensors, folder / DIFFUSERS, metadata)
    return write


def put(k, value):
    """A change of tensors: of the first whose name ends in k."""
    def change(tensors):
        name = next(name for name in tensors if name.endswith(k))
        tensors[name] = value(tensors[name]) if callable(value) else value
    return change


def poke(value):
    def change(t):
        t = t.clone()
        t.view(-1)[t.numel() // 2] = value
        return t
    return change


def ours_with(change=None, metadata=None, **config):
    """A writer of a checkpoint of ours; change: of its tensors, metadata: of what it says."""
    def write(folder, parts):
        tensors, about = load_file(parts / "sft/model.safetensors"), json.loads(
            (parts / "config.json").read_text())
        (change or (lambda t: None))(tensors)
        save_file(tensors, folder / "model.safetensors",
                  told(about | config) if metadata is None else metadata(about))
    return write


NAN, INF = float("nan"), float("inf")
CHECKPOINTS = {
    "no metadata": (ours_with(metadata=lambda a: {}), "not a checkpoint of ours"),
    "no JSON": (ours_with(metadata=lambda a: dict(checkpoint="{")), "is no JSON"),
    "deep JSON": (ours_with(metadata=lambda a: dict(checkpoint="[" * 10**5)), "is no JSON"),
    "a list": (ours_with(metadata=lambda a: dict(checkpoint="[]")), "no JSON object"),
    "null": (ours_with(metadata=lambda a: dict(checkpoint="null")), "no JSON object"),
    "old, no JSON": (ours_with(metadata=lambda a: dict(config="shapes")), "is no JSON"),
    "old, a list": (ours_with(metadata=lambda a: dict(config="[1]")), "no JSON object"),
    "config a list": (ours_with(metadata=lambda a: told([])), "no JSON object"),
    "loras a list": (ours_with(metadata=lambda a: told(a, loras=[])), "no JSON object"),
    "no preset": (ours_with(metadata=lambda a: told(dict(a, preset=""))), "preset"),
    "a newer version": (ours_with(colour_space="rgb"), "was written by a newer version, whose "
                        "config has colour_space: update"),
    "newer by a default": (ours_with(colour_space=""), "was written by a newer version"),
    "a number for a name": (ours_with(vae=3), "its config's vae is 3"),
    "a name for a number": (ours_with(size="64"), "its config's size is '64'"),
    "NaN": (ours_with(sample_shift=NAN), "its config's sample_shift is nan"),
    "a bool for a number": (ours_with(n_query=True), "its config's n_query is True"),
    "a text for a list": (ours_with(layers="12"), "its config's layers is '12'"),
    "a list of lists": (ours_with(layers=[[1]]), "its config's layers is [[1]]"),
    "a list for a dict": (ours_with(mmdit=[1]), "its config's mmdit is [1]"),
    "a preset nobody has": (ours_with(preset="nobody's"), "preset"),
    "LoRA of the VAE": (ours_with(metadata=lambda a: told(a, loras=dict(vae={}))), "LoRA of 'vae'"),
    "LoRA a list": (ours_with(metadata=lambda a: told(a, loras=dict(dit=[]))), "not a list"),
    "LoRA newer": (ours_with(metadata=lambda a: told(a, loras=dict(dit=dict(r=2, warp=1)))),
                   "has warp 1, which is not read"),
    "LoRA without tensors": (ours_with(metadata=lambda a: told(a, loras=dict(dit=dict(
        r=2, target_modules=["to_q"])))), "(missing)"),
    "LoRA unannounced": (ours_with(lambda t: t.update({"dit.proj_out.lora_A.weight":
                                                       torch.ones(1)})), "(unexpected)"),
    "a part nobody has": (ours_with(lambda t: t.update({"soul.weight": torch.ones(1)})),
                          "soul.weight (unexpected)"),
    "nan": (ours_with(put("to_q.weight", poke(NAN))), "not finite, first dit."),
    "inf in bf16": (ours_with(put("bias", lambda t: poke(-INF)(t.bfloat16()))), "not finite"),
    "integers": (ours_with(put("to_q.weight", torch.Tensor.long)), "is of type int64, not float"),
    "int8": (ours_with(put("to_q.weight", torch.Tensor.char)), "quantised"),
    "float8": (ours_with(put("to_q.weight", lambda t: t.to(torch.float8_e4m3fn))), "quantised"),
    "a shape": (ours_with(put("to_q.weight", torch.ones(3))), "1 keys differ"),
    "another crc": (ours_with(metadata=lambda a: told(a, crc=1)), "its checksum differs"),
    "no bytes": (lambda folder, parts: (folder / "model.safetensors").touch(), "may be truncated"),
    "no file": (lambda folder, parts: (folder / "model.safetensors").mkdir(), "cannot be read"),
}


@pytest.fixture
def refuses(parts, tmp_path, monkeypatch):
    """-> what a script says of --init (or another flag) that it must refuse; nothing is written"""
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)

    def run(script, *flags):
        before = files(tmp_path)
        if script is grpo:
            said = complaint(tiny.play, parts, tmp_path / "out", *flags)
        else:
            own = {sample: ["x", "--out", tmp_path / "x.png"],
                   eval_py: ["--out", tmp_path / "out"], convert: []}[script]
            monkeypatch.setattr(sys, "argv", ["x.py", *map(str, [*own, *flags])])
            said = complaint(script.main)
        assert files(tmp_path) == before and not (tmp_path / "out").exists()
        return said
    return run


def in_turn(cases):
    """Each case with one of the scripts that read weights."""
    scripts = (sample, grpo, eval_py)
    return pytest.mark.parametrize("case, script", [
        pytest.param(case, scripts[i % 3], id=f"{case}-{scripts[i % 3].__name__}")
        for i, case in enumerate(cases)])


@in_turn(CHECKPOINTS)
def test_a_broken_checkpoint(parts, tmp_path, refuses, script, case):
    write, words = CHECKPOINTS[case]
    (tmp_path / "ckpt").mkdir()
    write(tmp_path / "ckpt", parts)
    assert words in refuses(script, "--init", tmp_path / "ckpt")


def test_a_config_whose_dit_cannot_be(parts, tmp_path, refuses):
    for mmdit in (dict(layers=3), dict(num_layers="two"), dict(qk_norm="none")):
        folder = tmp_path / f"{[*mmdit][0]}"
        folder.mkdir()
        ours_with(mmdit=tiny.MMDIT | mmdit)(folder, parts)
        assert "the DiT of preset 'shapes' cannot be built" in refuses(sample, "--init", folder)


LORAS = {
    "PiSSA": (dict(init_lora_weights="pissa"), "init_lora_weights cannot be 'pissa'"),
    "modules_to_save": (dict(modules_to_save=["proj_out"]), "has modules_to_save ['proj_out']"),
    "biases": (dict(bias="all"), "has bias 'all', which is not read here"),
    "replicated layers": (dict(layer_replication=[[0, 2]]), "has layer_replication"),
    "aLoRA": (dict(alora_invocation_tokens=[1]), "has alora_invocation_tokens"),
    "a newer peft": (dict(use_warp=True), "has use_warp True, which is not read here"),
    "LoHa": (dict(peft_type="LOHA"), "is no LoRA but a 'LOHA'"),
    "AdaLoRA": (dict(peft_type="ADALORA"), "is no LoRA but a 'ADALORA'"),
    "nobody's type": (dict(peft_type=["LORA"]), "peft_type must be LORA"),
    "rank 0": (dict(r=0), "r cannot be 0"), "rank text": (dict(r="2"), "r cannot be '2'"),
    "rank true": (dict(r=True), "r cannot be True"),
    "rank another": (dict(r=3), "keys differ"), "rank huge": (dict(r=10**12), "keys differ"),
    "alpha nan": (dict(lora_alpha=NAN), "lora_alpha cannot be nan"),
    "alpha text": (dict(lora_alpha="8"), "lora_alpha cannot be '8'"),
    "dropout 2": (dict(lora_dropout=2), "lora_dropout cannot be 2"),
    "DoRA without": (dict(use_dora=True), "lora_magnitude_vector (missing)"),
    "rslora text": (dict(use_rslora="no"), "use_rslora cannot be 'no'"),
    "pattern list": (dict(rank_pattern=[1]), "rank_pattern cannot be [1]"),
    "pattern text": (dict(alpha_pattern={"a": "b"}), "alpha_pattern cannot be"),
    "no regex": (dict(target_modules="(to_q"), "does not fit"),
    "a pattern that is no regex": (dict(rank_pattern={"(": 3}), "does not fit"),
    "targets number": (dict(target_modules=3), "target_modules cannot be 3"),
    "no target": (dict(target_modules=None), "does not fit"),
    "nowhere": (dict(target_modules=["nowhere"]), "does not fit"),
    "layers text": (dict(layers_to_transform="1"), "layers_to_transform cannot be '1'"),
}


@in_turn(LORAS)
def test_a_foreign_adapter_config(parts, tmp_path, refuses, script, case):
    config, words = LORAS[case]
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    (tmp_path / "lora").mkdir()
    lora(cfg, **config)(tmp_path / "lora")
    assert words in refuses(script, "--init", tmp_path / "lora", "--preset", "shapes")


def raw(name, text):
    return lambda folder: (folder / name).write_text(text)


TWICE = {"lora_adapter_metadata": '{"transformer.r": 2}'}
ALPHA = {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(3.0)}
LORA_FILES = {
    "config no JSON": (raw("adapter_config.json", "{"), "is no JSON"),
    "config a list": (raw("adapter_config.json", "[]"), "is no JSON object but a list"),
    "config empty": (raw("adapter_config.json", ""), "is no JSON"),
    "no tensors": (raw("adapter_config.json", "{}"), "adapter_model.safetensors"),
    "diffusers, no bytes": (raw(DIFFUSERS, ""), "may be truncated"),
    "diffusers, kohya's names": (diffusers_lora(lambda t: {
        "lora_unet_a.lora_down.weight": torch.ones(2, 2)}), "do not begin with transformer."),
    "diffusers, a text encoder's": (diffusers_lora(lambda t: t | {
        "text_encoder.a.lora_A.weight": torch.ones(2, 2)}), "first text_encoder.a"),
    "diffusers, older names": (diffusers_lora(lambda t: {
        "transformer.a.lora.down.weight": torch.ones(2, 2)}), "holds more than a LoRA: 1 names"),
    "diffusers, half": (diffusers_lora(lambda t: {k: v for k, v in t.items() if "lora_B" in k}),
                        "lora_A.weight (missing)"),
    "diffusers, nowhere": (diffusers_lora(lambda t: {
        k.replace("attn", "soul"): v for k, v in t.items()}), "does not fit"),
    "diffusers, a shape": (diffusers_lora(put("A.weight", torch.ones(2, 9))), "[2, 9], not"),
    "diffusers, nan": (diffusers_lora(put("A.weight", poke(NAN))), "not finite"),
    "diffusers, integers": (diffusers_lora(put("A.weight", torch.Tensor.int)), "int32, not float"),
    "diffusers, alpha's module": (diffusers_lora(lambda t: t | {
        "transformer.b.alpha": torch.tensor(3.0)}), "transformer.b.alpha"[12:]),
    "diffusers, alpha two": (diffusers_lora(lambda t: t | {
        k: torch.ones(2) for k in ALPHA}), "not one number"),
    "diffusers, alpha nan": (diffusers_lora(lambda t: t | {
        k: torch.tensor(NAN) for k in ALPHA}), "lora_alpha cannot be nan"),
    "diffusers, alpha twice": (diffusers_lora(lambda t: t | ALPHA, TWICE), "states alpha twice"),
    "diffusers, metadata no JSON": (diffusers_lora(lambda t: t, {"lora_adapter_metadata": "{"}),
                                    "lora_adapter_metadata is no JSON"),
    "diffusers, metadata a list": (diffusers_lora(lambda t: t, {"lora_adapter_metadata": "[1]"}),
                                   "lora_adapter_metadata is no JSON"),
    "diffusers, metadata newer": (diffusers_lora(lambda t: t, {
        "lora_adapter_metadata": '{"transformer.warp": 1}'}), "has warp 1, which is not read"),
    "diffusers, metadata empty": (diffusers_lora(lambda t: t, {"lora_adapter_metadata": "{}"}),
                                  "does not fit"),
}


@pytest.mark.parametrize("case", LORA_FILES)
def test_a_broken_lora(tmp_path, refuses, case):
    write, words = LORA_FILES[case]
    (tmp_path / "lora").mkdir()
    write(tmp_path / "lora")
    assert words in refuses(sample, "--init", tmp_path / "lora", "--preset", "shapes")


@pytest.mark.parametrize("change, words", [
    (put("lora_A.weight", poke(INF)), "not finite"),
    (put("lora_A.weight", torch.Tensor.long), "int64, not float"),
    (put("lora_B.weight", torch.ones(2, 2)), "[2, 2], not"),
    (lambda t: t.pop(next(iter(t))), "(missing)"),
    (lambda t: t.update(a=torch.ones(1)), "holds more than a LoRA: 1 names, first a"),
    (lambda t: t.update({"a.lora_A.weight": torch.ones(1)}), "a.lora_A.weight (unexpected)")])
def test_broken_tensors_of_peft(parts, tmp_path, refuses, change, words):
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    (tmp_path / "lora").mkdir()
    lora(cfg, change)(tmp_path / "lora")
    assert words in refuses(sample, "--init", tmp_path / "lora", "--preset", "shapes")


def tensors_of(change):
    def damage(folder):
        [file] = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    return damage


def index(weight_map):
    """Instead of the one file of a folder, an index of shards."""
    def damage(folder):
        [file] = folder.glob("*.safetensors")
        file.rename(folder.parent / "x.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps(
            dict(weight_map=weight_map))
        (folder / f"{file.name}.index.json").write_text(text)
    return damage


def first(tensors, value):
    name = next(k for k, v in sorted(tensors.items()) if v.ndim > 1)
    tensors[name] = value(tensors[name])


PARTS = {
    "config no JSON": (raw("config.json", "{"), "is no JSON"),
    "config a list": (raw("config.json", "[]"), "is no JSON object but a list"),
    "config empty": (raw("config.json", ""), "is no JSON"),
    "config another": (raw("config.json", "{}"), ""),
    "config latin-1": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "is no JSON"),
    "no bytes": (lambda f: next(f.glob("*.safetensors")).write_bytes(b""), "may be truncated"),
    "huge header": (lambda f: next(f.glob("*.safetensors")).write_bytes(b"\xff" * 64), "truncated"),
    "nan": (tensors_of(lambda t: first(t, poke(NAN))), "not finite"),
    "inf": (tensors_of(lambda t: first(t, poke(INF))), "not finite"),
    "integers": (tensors_of(lambda t: first(t, torch.Tensor.int)), "not float"),
    "index no JSON": (index("{"), "is no JSON"), "index a list": (index("[]"), "a list"),
    "index without": (index("{}"), "is no index of shards"),
    "index outside": (index({"a": "../x.safetensors"}), "is no index of shards"),
    "index absolute": (index({"a": "/x.safetensors"}), "is no index of shards"),
    "index of numbers": (index({"a": 3}), "is no index of shards"),
    "index of none": (index({"a": "b.safetensors"}), "is half-downloaded"),
}


@pytest.mark.parametrize("part, case", [
    (part, case) for part in ("dit", "vae", "vlm") for case in PARTS
    if (part, case) != ("dit", "config another")]      # diffusers' may leave out what is usual
    + [("init", case) for case in ("config no JSON", "nan", "index outside")])
def test_a_broken_part(parts, tmp_path, refuses, part, case):
    damage, words = PARTS[case]
    folder = tmp_path / "part"
    shutil.copytree(parts / ("dit" if part == "init" else part), folder)
    damage(folder)
    flags = [f"--{part}", folder, "--preset", "shapes"]
    # sft/ brings a whole DiT: only without it is another read.
    said = refuses(sample, *flags, *([] if part == "init" else ["--init", ""]))
    assert words in said and str(folder) in said


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json",
                                  "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"a": '])
def test_a_broken_tokenizer(parts, tmp_path, refuses, file, text):
    shutil.copytree(parts / "vlm", tmp_path / "vlm")
    (tmp_path / "vlm/processor_config.json").unlink(missing_ok=True)  # it may hold the third again
    assert (tmp_path / "vlm" / file).exists()
    (tmp_path / "vlm" / file).write_text(text)
    assert "that could be read" in refuses(sample, "--init", parts / "sft", "--vlm",
                                           tmp_path / "vlm")


@pytest.mark.parametrize("name", ["a b/c", "a//b", "a/b/../c", "a/b/", "-/-", "a--b/c", "ü/ß",
                                  "a/b\0c", "x" * 3000 + "/y"])
@pytest.mark.parametrize("flag", ["--init", "--dit", "--vlm", "--vae"])
def test_a_malformed_id(refuses, flag, name):
    said = refuses(sample, "--preset", "shapes", *(["--init", ""] if flag != "--init" else []),
                   f"{flag}={name}")
    assert "must be a folder that exists, or owner/repo on the Hub" in said or (
        "is neither a folder nor owner/repo[/subfolder] on the Hub" in said) or (
        "must be text in UTF-8" in said and "\0" in name)


CONVERTED = {
    "no bytes": (raw("w.pth", ""), "cannot be read"),
    "no bytes, safetensors": (raw("w.safetensors", ""), "cannot be read"),
    "a list": (lambda f: torch.save([torch.ones(1)], f / "w.pth"), "holds more than weights"),
    "state_dict a list": (lambda f: torch.save(dict(state_dict=[1]), f / "w.pth"), "holds more"),
    "numbers for names": (lambda f: torch.save({1: torch.ones(1)}, f / "w.pth"), "holds more"),
    "nan": (lambda f: torch.save(dict(meta_queries=torch.tensor([NAN])), f / "w.pth"),
            "not finite, first bridge.meta_queries"),
    "integers": (lambda f: save_file(dict(meta_queries=torch.ones(2).long()),
                                     f / "w.safetensors"), "int64, not float"),
    "index no JSON": (raw("w.bin.index.json", "{"), "is no JSON"),
    "index a list": (raw("w.safetensors.index.json", "[]"), "a list"),
    "index without": (raw("w.bin.index.json", "{}"), "is no index of shards"),
    "index outside": (raw("w.bin.index.json", '{"weight_map": {"a": "../x"}}'), "no index of"),
    "index of none": (raw("w.bin.index.json", '{"weight_map": {"a": "x"}}'), "x is missing"),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_broken_release(tmp_path, refuses, case):
    write, words = CONVERTED[case]
    (tmp_path / "w").mkdir()
    write(tmp_path / "w")
    assert words in refuses(convert, "openuni", tmp_path / "w", tmp_path / "out")


# --- the checksum ---


def test_every_flipped_byte_is_noticed(ours, tmp_path):
    _, cfg, _ = ours[SD3Transformer2DModel]
    a_run(cfg, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, rng = load_file(file), random.Random(0)
    tensors = {k: v.bfloat16() if i % 2 else v for i, (k, v) in enumerate(tensors.items())}
    with safe_open(file, "pt") as f:
        about = json.loads(f.metadata()["checkpoint"])
    save_file(tensors, file, {"checkpoint": json.dumps(about | dict(crc=crc(tensors)))})
    tiny.build(cfg, init=tmp_path)
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in rng.sample(range(begin, len(whole)), 60):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        assert "is damaged: its checksum differs; copy it again" in complaint(
            read_init, tmp_path, cfg, None)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64,
                                  torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_checksum_is_of_bytes(kind):
    x = torch.arange(24).view(2, 3, 4)
    tensors = dict(a=x.to(kind), b=torch.ones(()).to(kind), c=torch.ones(0, 2).to(kind))
    assert crc(tensors) == crc(dict(reversed(tensors.items()))) == crc(
        tensors | dict(a=x.mT.to(kind).mT))                    # of another order in memory
    assert crc(tensors) != crc(tensors | dict(b=torch.zeros(()).to(kind)))


# --- sizes, and what a picture says of itself ---


@pytest.fixture
def drawn(parts, tmp_path, monkeypatch, capsys):
    """-> the sizes of pictures drawn, what was printed, and the file"""
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    sizes, real = [], Unified.to_images
    monkeypatch.setattr(Unified, "to_images", lambda self, z: [
        x := real(self, z), sizes.append(tuple(x.shape[2:]))][0])
    monkeypatch.setitem(presets_py.PRESETS, "shapes", cfg)
    monkeypatch.chdir(tmp_path)

    def run(*argv, out="x.png"):
        sizes.clear()
        argv = ["--init", parts / "sft", "--out", out, "--n", 1, "--steps", 1, *argv]
        monkeypatch.setattr(sys, "argv", list(map(str, ["sample.py", *argv])))
        sample.main()
        return {*sizes}, capsys.readouterr().out, Image.open(tmp_path / out)
    return run


@pytest.mark.parametrize("flags, size, pixels, note", [
    ([], "40", (40, 40), ""), ([], "", (64, 64), ""), (["--think"], "48x32", (32, 48), ""),
    (["--reflect"], "32x48", (48, 32), ""), (["--trajectory"], "48x32", (32, 48), ""),
    ([], "50x30", (32, 48), "--size 50x30 is rounded to 48x32, multiples of 8 pixels")])
def test_sizes(drawn, flags, size, pixels, note):
    out = "x.gif" if flags == ["--trajectory"] else "x.png"
    sizes, said, file = drawn("a", *flags, "--limit", 2, "--size", size, out=out)
    assert sizes == {pixels} and (note or "rounded") in said + "rounded" * (not note)
    about = json.loads(file.info["comment"] if out == "x.gif" else file.text["parameters"])
    assert about["size"] == f"{pixels[1]}x{pixels[0]}"


@pytest.mark.parametrize("size, words", [
    ("0", "draws sides of 8 to 128 pixels; nearest is 8x8"), ("4x64", "nearest is 8x64"),
    ("999999x64", "nearest is 128x64"),
    *((text, "must be WIDTHxHEIGHT or a number") for text in ("x", "64x", "-8", "64.5", "６４"))])
def test_sizes_that_cannot_be(parts, tmp_path, refuses, size, words):
    assert words in refuses(sample, "--init", parts / "sft", f"--size={size}")


def test_a_size_is_for_prompts(parts, tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["sample.py", "--image", str(tmp_path / "a.png"), "--edit",
                                      "x", "--size", "64"])
    assert "an --image keeps its own" in complaint(sample.main)


def test_a_picture_says_how_it_was_drawn(drawn, parts, tmp_path):
    """README's line reads it; and the same flags draw the same pixels again."""
    prompts = ["a photo of a ü\u2028 star", "two rings"]
    _, _, file = drawn(*prompts, "--n", 2, "--seed", 5, "--guidance", 2, "--solver", "dpm",
                       "--size", "48x32")
    about = json.loads(file.text["parameters"])
    assert about["pictures"] == [dict(prompt=p, seed=s) for p in prompts for s in (5, 6)]
    assert about.items() >= dict(guidance=2, steps=1, solver="dpm", size="48x32", preset="shapes",
                                 step=0, init=str(parts / "sft")).items()
    assert not {"out", "export", "prompts"} & about.keys()
    again = about["pictures"][1]
    _, _, one = drawn(again["prompt"], "--seed", again["seed"], *[
        x for k in ("guidance", "solver", "size", "steps", "init") for x in (f"--{k}", about[k])],
        out="y.png")
    a, b = (np.asarray(image.crop((x + 6, 6, x + 102, 70))).astype(int)        # twice as large
            for image, x in ((file, 108), (one, 0)))
    assert np.abs(a - b).max() <= 1 < np.abs(a).max() - np.abs(a).min()


def test_edits_and_thoughts_say_it_too(drawn, tmp_path):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.png")
    _, _, file = drawn("--image", "a.png", "--edit", "add a star", "--image-guidance", 2)
    about = json.loads(file.text["parameters"])
    assert about["pictures"] == [dict(prompt="add a star", seed=0)] and about["image"] == ["a.png"]
    assert about["image_guidance"] == 2 and re.fullmatch(r"\d+x\d+", about["size"])
    _, _, file = drawn("two rings", "--think", "--limit", 2)
    assert "thought" in json.loads(file.text["parameters"])["pictures"][0]
    _, _, file = drawn("two rings", "--reflect", "--limit", 2, "--rounds", 2)
    assert len(json.loads(file.text["parameters"])["pictures"][0]["critiques"]) == 2


def test_the_classroom_is_as_it_was(parts):
    """What is shipped still loads: older metadata, in parts."""
    for name in ("sft", "sft-edit", "sana/sft"):
        assert read_step(f"data/shapes/{name}") > 0
    assert asdict(Config()).keys() >= {"preset", "mmdit"}
