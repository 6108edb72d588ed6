"""Peers' releases at small size -> data/convert.py -> Unified.load, as a user would.

Each release is made of library classes (diffusers' DiTs, transformers' SigLIP encoder and VLMs,
peft's LoRA), so key names are theirs, and laid out in files as published. What the converted
model computes is compared with the release's own classes, in fp32; model.py has no part in them.
"""

import copy
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_bridges import intern  # noqa: F401
from torch import nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder

import model
from data import convert
from common.presets import PRESETS
from model import Unified

SANA = dict(sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2,
            num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24, mlp_ratio=2.5)
PROMPT, T = "three blue squares and a star", 0.3
USER, SAYS = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


# --- the releases, each with its own condition and velocity ---


class Release(nn.Module):
    """What the four have in common; lmm is the VLM, `parts` the folder of tiny parts."""

    def __init__(self, vlm, c_dim=32, ff=64, queries=3):
        super().__init__()
        self.lmm = AutoModelForImageTextToText.from_pretrained(vlm)
        self.tokenizer = AutoTokenizer.from_pretrained(vlm)
        self.meta_queries = nn.Parameter(torch.zeros(queries, 32))
        self.connector = SiglipEncoder(SiglipVisionConfig(
            hidden_size=c_dim, intermediate_size=ff, num_hidden_layers=2, num_attention_heads=4,
            hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6))

    def states(self, text, queries):
        """hidden_states of the text and the queries, by the VLM as it is."""
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        x = torch.cat([self.lmm.get_input_embeddings()(ids), queries[None]], 1)
        return self.lmm.model.language_model(
            inputs_embeds=x, output_hidden_states=True).hidden_states

    def velocity(self, x, ctx, pooled=None):
        more = {} if pooled is None else dict(pooled_projections=pooled)
        return self.transformer(x, encoder_hidden_states=ctx, return_dict=False,
                                timestep=torch.tensor([1000 * T]), **more)[0]


class DeepGen(Release):
    config = dict(bridge="scb", keep="all", layers=(2, 1), mmdit=tiny.MMDIT)

    def __init__(self, vlm):
        super().__init__(vlm)
        self.projector_1, self.projector_2 = nn.Linear(64, 32), nn.Linear(32, 16)
        self.projector_3 = nn.Linear(32, 32)
        self.transformer = SD3Transformer2DModel(**tiny.MMDIT)
        layers = [n for n, m in self.lmm.named_modules()
                  if isinstance(m, (nn.Linear, nn.Embedding))]
        self.lmm.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian",
                                        target_modules=layers, lora_dropout=0.05))

    def condition(self):
        h = self.states(USER + "Generate an image: " + PROMPT + SAYS, self.meta_queries)
        x = self.projector_1(torch.cat([h[2], h[1]], -1))
        x = self.connector(inputs_embeds=x).last_hidden_state
        return self.projector_3(x), self.projector_2(x.mean(1))

    def save(self, folder, stage="SFT"):
        """Pretrain and SFT: what learned, and buffers; RL: its own state_dict, without the VLM."""
        keys = {"Pretrain": ("meta_queries", "connector", "projector", "transformer.pos_embed.pos"),
                "SFT": ("meta_queries", "connector", "projector", "transformer", "lmm"),
                "RL": ("meta_queries", "connector", "projector", "transformer")}[stage]
        weights = {k: v for k, v in self.state_dict().items() if k.startswith(keys)
                   and (not k.startswith("lmm.") or "lora_" in k)}
        name = dict(Pretrain="iter_200000.pth", SFT="iter_400000.pth", RL="model.pt")[stage]
        torch.save(weights, folder / name)
        return folder / name


class UniPic2(Release):
    config = dict(bridge="last", keep="query", c_dim=16, mmdit=tiny.MMDIT, pos="arange")

    def __init__(self, vlm):
        super().__init__(vlm, c_dim=16)
        self.projector_1, self.projector_2 = nn.Linear(32, 16), nn.Linear(16, 16)
        self.projector_3 = nn.Linear(16, 32)
        self.transformer = SD3Transformer2DModel(**tiny.MMDIT)

    def condition(self):
        h = self.states(USER + "Generate an image: " + PROMPT + SAYS, self.meta_queries)[-1]
        x = self.connector(inputs_embeds=self.projector_1(h[:, -3:])).last_hidden_state
        return self.projector_3(x), self.projector_2(x.mean(1))

    def save(self, folder):
        for part in ("scheduler", "conditioner"):
            (folder / "UniPic2-Metaquery-9B" / part).mkdir(parents=True)
        folder /= "UniPic2-Metaquery-9B"
        self.transformer.save_pretrained(folder / "transformer")
        shutil.copytree(self.parts / "vae", folder / "vae")
        save_file({k: v for k, v in self.state_dict().items()
                   if k.startswith(("meta_queries", "connector", "projector"))},
                  folder / "conditioner" / "diffusion_pytorch_model.safetensors")
        return folder


class OpenUni(Release):
    config = dict(bridge="last", keep="query", sana=SANA, null="turn", suffix="<img>", pos="arange",
                  image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"))

    def __init__(self, vlm):
        super().__init__(vlm)
        self.projector = nn.Linear(32, 24)
        self.transformer = SanaTransformer2DModel(**SANA)

    def condition(self):
        text = USER + "Generate an image: " + PROMPT + SAYS + "<img>"
        x = self.connector(inputs_embeds=self.states(text, self.meta_queries)[-1][:, -3:])
        return self.projector(x.last_hidden_state), None

    def save(self, folder, stage="finetune"):
        keys = ("meta_queries", "connector", "projector") + ("transformer",) * (stage != "pretrain")
        file = folder / f"openuni_l_internvl3_2b_sana_1_6b_512_hf_{stage}.pth"
        torch.save({k: v for k, v in self.state_dict().items() if k.startswith(keys)}, file)
        return file


class Projector(nn.Module):
    """UniRL-Zero's block, of which no library has a class; its names are those of its code."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(32, 1e-6), nn.RMSNorm(32, 1e-6)
        self.attn = nn.ModuleDict({f"{n}_proj": nn.Linear(32, 32) for n in ("q", "k", "v", "out")}
                                  | {n: nn.RMSNorm(8, 1e-6) for n in ("q_norm", "k_norm")})
        self.ffn = nn.ModuleDict(dict(
            w1=nn.Linear(32, 64), w2=nn.Linear(32, 64), w3=nn.Linear(64, 32)))

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (self.attn[n](y).view(1, -1, 4, 8) for n in ("q_proj", "k_proj", "v_proj"))
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        y = F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)))
        x = x + self.attn.out_proj(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.ffn.w3(F.silu(self.ffn.w1(y)) * self.ffn.w2(y))


class UniRL(Release):
    config = dict(bridge="last", keep="query", c_style="rms", sana=SANA | dict(ref="add"),
                  edit_queries=True, pos="arange", null="zeros",
                  system="You are a helpful assistant.")

    def __init__(self, vlm):
        super().__init__(vlm)
        self.t2i_queries, self.i2i_queries = (nn.Parameter(torch.zeros(1, 3, 32)) for _ in "ab")
        self.down_projector = nn.ModuleDict(dict(
            layers=nn.ModuleList(Projector() for _ in range(2)), norm_final=nn.RMSNorm(32, 1e-6),
            output_linear=nn.Linear(32, 24)))
        self.transformer = dit = SanaTransformer2DModel(**SANA)
        dit.ref_patch_embed = PatchEmbed(8, 8, 1, 4, 32, pos_embed_type=None)
        dit.ref_linear = nn.Linear(32, 32)
        dit.patch_embed.register_forward_hook(
            lambda m, x, y: y + dit.ref_linear(dit.ref_patch_embed(self.reference)))

    def condition(self):
        text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + USER
                + "Generate an image: " + PROMPT + SAYS)
        x = self.states(text, self.t2i_queries[0])[-1][:, -3:]
        for layer in self.down_projector.layers:
            x = layer(x)
        return self.down_projector.output_linear(self.down_projector.norm_final(x)), None

    def save(self, folder):
        """transformers' sharded folder, whole: Qwen2.5-VL under its older names, and the VAE."""
        folder /= "checkpoint-1000"
        folder.mkdir()
        weights = {f"model.{k}": v for k, v in self.state_dict().items()
                   if k.startswith(("t2i", "i2i", "down"))}
        weights |= {f"model.dit.{k}": v for k, v in self.transformer.state_dict().items()}
        weights |= {k.replace("model.language_model", "model").replace("model.visual", "visual"): v
                    for k, v in self.lmm.state_dict().items() if k != "lm_head.weight"}
        weights["model.gen_vision_tower.decoder.conv_in.weight"] = torch.zeros(1)
        shards = {}
        for i, name in enumerate(sorted(weights)):
            shards.setdefault(f"model-{i % 2 + 1:05}-of-00002.safetensors", []).append(name)
        for file, names in shards.items():
            save_file({n: weights[n].contiguous() for n in names}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps(dict(
            metadata={}, weight_map={n: file for file, names in shards.items() for n in names})))
        return folder


KINDS = dict(deepgen=DeepGen, unipic2=UniPic2, openuni=OpenUni, unirl=UniRL)
STAGES = [("deepgen", "Pretrain"), ("deepgen", "SFT"), ("deepgen", "RL"), ("unipic2", None),
          ("openuni", "pretrain"), ("openuni", "finetune"), ("unirl", None)]


@contextmanager
def presets(parts, vlm):
    """The real presets' names at the releases' size; the DiT they start from has other weights."""
    with pytest.MonkeyPatch.context() as m:
        for layout, kind in KINDS.items():
            cfg = PRESETS[convert.PRESET[layout]]
            dit = "sana" if layout in ("openuni", "unirl") else "dit"
            m.setitem(PRESETS, cfg.preset, replace(cfg, **dict(
                vlm=str(vlm), dit=str(parts / dit), vae=str(parts / "vae"), vlm_dim=32, n_query=3,
                c_dim=32, c_ff=64, c_layers=2, c_heads=4, mmdit={}, sana={}, system="", size=32,
                t2i_text="Generate an image: {}") | kind.config))
        m.setattr(model, "has_bf16", lambda: False)
        yield m


@pytest.fixture(scope="module")
def folders(parts, intern, tmp_path_factory):  # noqa: F811
    """Tiny parts with a SANA, which has no references, and InternVL as a folder."""
    folder = tmp_path_factory.mktemp("vlm") / "intern"
    for part in intern:
        part.save_pretrained(folder)
    torch.manual_seed(7)
    start = SanaTransformer2DModel(**SANA)
    tiny.randomise(start)
    start.save_pretrained(parts / "sana")
    return dict(openuni=folder) | {k: parts / "vlm" for k in ("deepgen", "unipic2", "unirl")}


@pytest.fixture(scope="module")
def releases(parts, folders, tmp_path_factory):
    """layout -> the release in memory, and a folder for its files."""
    made = {}
    for i, (layout, kind) in enumerate(KINDS.items()):
        torch.manual_seed(i)
        made[layout] = release = kind(folders[layout]).eval()
        base = {k: v.clone() for k, v in release.lmm.state_dict().items() if "lora_" not in k}
        tiny.randomise(release)
        release.lmm.load_state_dict(base, strict=False)                   # the VLM is as published
        release.requires_grad_(False)
        release.parts = parts
    return made


def run(*argv):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["convert.py", *map(str, argv)])
        convert.main()


def files(release, folder, stage=None):
    return release.save(folder, *[stage] * bool(stage))


def compare(release, m):
    """Condition and velocity of the converted model against the release's classes."""
    cond = m.encode([PROMPT])
    ctx, pooled = release.condition()
    g = torch.Generator().manual_seed(0)
    x, release.reference = (torch.randn(1, 4, 8, 8, generator=g) for _ in range(2))
    cond.refs = [[release.reference[0]]] if isinstance(release, UniRL) else None
    v = release.velocity(x, ctx, pooled)
    pairs = [(cond.ctx, ctx), (m.velocity(x, T, [(1.0, cond)]), v)]
    for ours, theirs in pairs + [(cond.pooled, pooled)] * (pooled is not None):
        assert theirs.abs().max() > 0.1, "compares nothing but zeros"
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@contextmanager
def without_lora(release, off):
    if off:
        release.lmm.disable_adapters()
    yield
    if off:
        release.lmm.enable_adapters()


@pytest.mark.parametrize("layout, stage", STAGES)
def test_release_computes_the_same(parts, folders, releases, tmp_path, layout, stage):
    release = releases[layout]
    more = ["--lora-from", files(release, tmp_path, "SFT")] if stage == "RL" else []
    with presets(parts, folders[layout]):
        run(layout, files(release, tmp_path, stage), tmp_path / "out/new", *more)
        m = Unified.load(tmp_path / "out/new")
    assert m.cfg.preset == convert.PRESET[layout]
    alone = stage in ("Pretrain", "pretrain")                             # no DiT comes with it
    assert m.trained == ({"bridge"} if alone or layout == "unipic2" else {"bridge", "dit"})
    with without_lora(release, stage == "Pretrain"):
        if alone:
            with pytest.raises(AssertionError, match="not close"):        # the preset's DiT
                compare(release, m)
            m.dit.load_state_dict(release.transformer.state_dict())
        compare(release, m)
    if layout == "unirl":
        assert torch.equal(m.bridge.edit_queries, release.i2i_queries[0])


@pytest.fixture(scope="module")
def deepgen(parts, folders, releases, tmp_path_factory):
    """DeepGen's SFT converted."""
    folder = tmp_path_factory.mktemp("deepgen")
    with presets(parts, folders["deepgen"]):
        run("deepgen", releases["deepgen"].save(folder), folder / "out")
    return folder / "out"


def test_merged_vlm_is_the_unmerged(releases, deepgen):
    """All of it, from pixels to logits; embedding and lm_head, tied before, have become two. In
    fp64, so that only the merged weights are rounded: the LoRA is large here."""
    release = copy.deepcopy(releases["deepgen"]).double()
    ours = AutoModelForImageTextToText.from_pretrained(deepgen / "vlm").eval().double()
    assert not torch.equal(ours.lm_head.weight, ours.get_input_embeddings().weight)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 500, (1, 12), generator=g)
    ids[:, 3:7] = ours.config.image_token_id
    inputs = dict(input_ids=ids, image_grid_thw=torch.tensor([[1, 4, 4]]),
                  pixel_values=torch.randn(16, 384, generator=g, dtype=torch.float64),
                  mm_token_type_ids=(ids == ours.config.image_token_id).int())
    with torch.no_grad():
        a, b = ours(**inputs).logits, release.lmm(**inputs).logits
        with without_lora(release, True):
            plain = release.lmm(**inputs).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert (plain - b).abs().max() > 0.1, "the LoRA does nothing"


def test_older_names_and_shards(parts, folders, releases, deepgen, tmp_path):
    """DeepGen's RL names a LoRA as older transformers did; zero_to_fp32.py writes shards; a table
    of places that is not in the file is SD3's own."""
    weights = torch.load(releases["deepgen"].save(tmp_path), weights_only=True)
    weights = {k.replace("lmm.model.visual", "lmm.visual").replace(
        "lmm.model.language_model", "lmm.model"): v for k, v in weights.items()
        if k != "transformer.pos_embed.pos_embed"}
    folder, index = tmp_path / "consolidated", {}
    folder.mkdir()
    for i, name in enumerate(weights):
        index[name] = f"pytorch_model-{i % 2}.bin"
    for file in set(index.values()):
        torch.save({k: v for k, v in weights.items() if index[k] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=index)))
    with presets(parts, folders["deepgen"]):
        run("deepgen", folder, tmp_path / "out")
    for name in ("model.safetensors", "vlm/model.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / "out" / name), load_file(deepgen / name),
                                   atol=1e-6, rtol=0)


def test_precision_is_kept(parts, folders, releases, tmp_path):
    file = releases["deepgen"].save(tmp_path, "Pretrain")
    weights = {k: v.bfloat16() for k, v in torch.load(file, weights_only=True).items()}
    torch.save(dict(state_dict=weights), file)                            # mmengine's wrapper too
    with presets(parts, folders["deepgen"]):
        run("deepgen", file, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.pop("bridge.projector_2.bias").equal(weights["projector_2.bias"])
    assert all(v.dtype == torch.bfloat16 for v in got.values())


def swap(layout, a, b):
    """The table with the meanings of two rows exchanged."""
    table = dict(convert.NAMES[layout])
    table[a], table[b] = table[b], table[a]
    return tuple(table.items())


FFN = "model.down_projector.layers.*.ffn."
MISTAKES = {
    "LoRA at alpha": ("deepgen", "LORA_SCALE", 8),
    "LoRA left out": ("deepgen", "LORA_SCALE", 0),
    "gate and fc1 exchanged": ("unirl", "NAMES", dict(unirl=swap(
        "unirl", FFN + "w1.", FFN + "w2."))),
    "query sets exchanged": ("unirl", "NAMES", dict(unirl=swap(
        "unirl", "model.t2i_queries", "model.i2i_queries"))),
    "norms exchanged": ("unirl", "NAMES", dict(unirl=swap(
        "unirl", FFN.replace("ffn", "norm1"), FFN.replace("ffn", "norm2")))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_can_fail(parts, folders, releases, tmp_path, monkeypatch, mistake):
    """Mistakes that no name and no shape betrays."""
    layout, name, value = MISTAKES[mistake]
    monkeypatch.setattr(convert, name, value)
    with presets(parts, folders[layout]):
        run(layout, releases[layout].save(tmp_path), tmp_path / "out")
        m = Unified.load(tmp_path / "out")
    with pytest.raises(AssertionError, match="not close"):
        compare(releases[layout], m)


# --- what is wrong is said in one line, and nothing is written ---


def fails(folder, parts, vlm, words, *argv):
    before = set(folder.rglob("*"))
    with presets(parts, vlm), pytest.raises(SystemExit, match=words) as e:
        run(*argv)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    assert set(folder.rglob("*")) == before
    return str(e.value)


@pytest.mark.parametrize("layout, made, stage", [
    ("deepgen", "openuni", "pretrain"), ("deepgen", "openuni", "finetune"),
    ("openuni", "deepgen", "Pretrain"), ("openuni", "deepgen", "RL"), ("unirl", "deepgen", "SFT"),
    ("deepgen", "unirl", None), ("openuni", "unirl", None)])
def test_wrong_layout(parts, folders, releases, tmp_path, layout, made, stage):
    path = files(releases[made], tmp_path, stage)
    fails(tmp_path, parts, folders[layout], f"is not {layout}'s release .* missing: .*bridge",
          layout, path, tmp_path / "out")


def test_keys_are_strict(parts, folders, releases, tmp_path):
    file = releases["deepgen"].save(tmp_path, "SFT")
    whole, out = torch.load(file, weights_only=True), tmp_path / "out"

    def wrong(words, drop=(), **more):
        torch.save({k: v for k, v in whole.items() if not k.startswith(drop)} | more, file)
        return fails(tmp_path, parts, folders["deepgen"], words, "deepgen", file, out)
    wrong("1 missing: bridge.meta_queries$", "meta_queries")
    wrong("1 unexpected: ema.steps$", **{"ema.steps": torch.zeros(1)})
    wrong(r"1 of another shape: bridge.meta_queries \(2, 32\), not \(3, 32\)$",
          meta_queries=torch.zeros(2, 32))
    line = wrong("missing: bridge.connector.layers.0.layer_norm1.bias, .* and 22 more", "connector")
    assert line.count("bridge.") == 10
    query = "model.language_model.layers.1.self_attn.q_proj"
    wrong(f"the LoRA of .* is not this VLM's: 1 missing: {query}$", f"lmm.{query}.lora_B")
    wrong("1 missing: model.visual.merger.mlp.0$", "lmm.model.visual.merger.mlp.0")
    wrong("1 unexpected: model.language_model.layers.9.mlp.up_proj.lora_A.default.weight$",
          **{"lmm.model.language_model.layers.9.mlp.up_proj.lora_A.default.weight": torch.ones(1)})
    wrong(f"{query} \\(32, 30\\), not \\(32, 32\\)$",
          **{f"lmm.{query}.lora_A.default.weight": torch.ones(4, 30)})
    wrong("lacks the VLM's LoRA, .* --lora-from", "lmm")
    wrong("2 missing: dit.proj_out.bias, dit.proj_out.weight$", "transformer.proj_out")


def test_lora_from(parts, folders, releases, tmp_path):
    rl, sft, stage1 = (releases["deepgen"].save(tmp_path, s) for s in ("RL", "SFT", "Pretrain"))
    for words, *argv in [
            ("lacks the VLM's LoRA, as files saved in RL do: add --lora-from", "deepgen", rl),
            ("model.pt holds no LoRA of the VLM", "deepgen", rl, rl),
            ("needs no --lora-from: it has a LoRA", "deepgen", sft, sft),
            ("needs no --lora-from: it is of stage 1", "deepgen", stage1, sft),
            ("no other release has a LoRA", "openuni", rl, sft)]:
        layout, path, *more = argv
        fails(tmp_path, parts, folders["deepgen"], words, layout, path, tmp_path / "out",
              *(["--lora-from", *more] if more else []))


def test_files(parts, folders, releases, tmp_path):
    file, out = releases["deepgen"].save(tmp_path, "Pretrain"), tmp_path / "out"

    def wrong(words, path, layout="deepgen", out=out, *more):
        fails(tmp_path, parts, folders["deepgen"], words, layout, path, out, *more)
    wrong("exists: choose another OUT", file, out=tmp_path)
    wrong("nothing.pth' does not exist", tmp_path / "nothing.pth")
    (tmp_path / "half.pth").write_bytes(file.read_bytes()[:1000])
    wrong("half.pth cannot be read, it may be truncated", tmp_path / "half.pth")
    (tmp_path / "half.safetensors").write_bytes(bytes(100))
    wrong("half.safetensors cannot be read, it may be truncated", tmp_path / "half.safetensors")
    torch.save(dict(a=Release), tmp_path / "code.pth")                    # a pickle could run it
    wrong("code.pth cannot be read, it may .* hold more than weights", tmp_path / "code.pth")
    torch.save(dict(step=3), tmp_path / "optim.pt")
    wrong("optim.pt holds more than weights", tmp_path / "optim.pt")
    (tmp_path / "two").mkdir()
    [shutil.copy(file, tmp_path / "two" / name) for name in ("a.pth", "b.pth")]
    wrong("two holds 2 files of weights: give one, such as a.pth, b.pth", tmp_path / "two")
    (tmp_path / "iter_1.pth").mkdir()
    wrong("holds 0 files of weights", tmp_path / "iter_1.pth")
    (tmp_path / "iter_1.pth" / "mp_rank_00_model_states.pt").touch()
    wrong("is DeepSpeed's folder: first `zero_to_fp32.py .* -t iter_1.pth", tmp_path / "iter_1.pth")
    wrong("argument layout: invalid choice", file, "deepgem")


def test_half_downloaded(parts, folders, releases, tmp_path):
    vlm, out = folders["deepgen"], tmp_path / "out"
    folder = releases["unirl"].save(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder / "moved")
    fails(tmp_path, parts, vlm, "00002.safetensors is missing: download", "unirl", folder, out)
    save_file(dict(a=torch.zeros(1)), shard)
    fails(tmp_path, parts, vlm, "incomplete, .* its index promises .* more", "unirl", folder, out)
    folder = releases["unipic2"].save(tmp_path)
    (folder / "vae" / "config.json").unlink()
    fails(tmp_path, parts, vlm, "vae holds no VAE", "unipic2", folder, out)
    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors.pop("proj_out.bias")
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    fails(tmp_path, parts, vlm, "transformer .*1 missing: dit.proj_out.bias$", "unipic2", folder,
          out)
    file = releases["deepgen"].save(tmp_path, "SFT")
    fails(tmp_path, parts, tmp_path / "no-vlm", "the VLM .*no-vlm cannot be loaded, .*--vlm",
          "deepgen", file, out)


def test_command_line(releases, tmp_path):
    """The script itself, with the real presets' sizes."""
    file = releases["openuni"].save(tmp_path, "pretrain")
    done = subprocess.run([sys.executable, tiny.ROOT / "data" / "convert.py", "openuni", file,
                           tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "out").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert "of another shape: bridge.connector.layers.0.layer_norm1.bias (32,), not (1536,)" in last
