"""From the VLM's hidden states to the DiT's context, as each paper has it; and its preset's values.

Everything in fp32 with random weights: each kind of bridge is compared with a second computation
that handles one unpadded row at a time and shares no code with model.py.
"""

import json
import sys
from dataclasses import asdict, fields, replace

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    SanaTransformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tiny import apart, letters, pictures, same
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from common.flow import train_times
import common.checkpoint as checkpoint_py
import common.text_encoders as text_encoders_py
import grpo
import model as model_py
import pretrain
import sft
from common.flags import parse
from common.presets import PRESETS, Config
from common.run import slices
from common.sana import SanaDiT
from common.text_encoders import SD3Text
from common.words import chat, mrope, spell
from model import Bridge, Cond, Unified, build_dit

SANA = dict(in_channels=4, caption_channels=24)          # all that is asked of a SanaDiT here
COMMON = dict(vlm_dim=32, c_dim=32, c_ff=64, c_layers=2, c_heads=4, n_query=3)
KINDS = {                                                # the five papers' bridges, and one more
    "unirl-zero": dict(bridge="last", keep="query", c_style="rms", sana=SANA, edit_queries=True,
                       pos="arange", null="zeros", system="You are a helpful assistant."),
    "deepgen": dict(bridge="scb", keep="all", layers=(3, 1), mmdit=tiny.MMDIT),
    "unipic2": dict(bridge="last", keep="query", c_dim=16, mmdit=tiny.MMDIT, pos="arange"),
    "parauni": dict(bridge="lim", keep="query", layers=(1, 2, 3, 4), sana=SANA),
    "openuni": dict(bridge="last", keep="query", sana=SANA, null="turn", suffix="<img>",
                    null_prompt="Generate an image."),
    "lim on an MMDiT": dict(bridge="lim", keep="all", layers=(1, 4), c_dim=16, mmdit=tiny.MMDIT),
}
USER, SAYS = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
PAD, EYE, EYES = "<|image_pad|>", "<|vision_start|>{}<|vision_end|>", "<img>{}</img>"
HELP = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
DRAW, CONTEXT = "Generate an image: ", "<IMG_CONTEXT>"
PROMPTS = ["a red circle", "three blue squares and a star", "a sign"]


def vlm_of(config, **text):
    for k, v in text.items():
        setattr(config.text_config, k, v)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    tiny.randomise(vlm)
    return vlm.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def qwen(parts):
    """VLM with 4 layers, tokenizer, image processor: 16 pixels a token, 32 to 64 a side."""
    return (vlm_of(Qwen2_5_VLConfig.from_pretrained(parts / "vlm"), num_hidden_layers=4),
            AutoTokenizer.from_pretrained(parts / "vlm"),
            Qwen2VLImageProcessor.from_pretrained(parts / "vlm"))


@pytest.fixture(scope="module")
def intern(parts):
    """InternVL3's layout at small size: a 32 x 32 image is 2 x 2 tokens."""
    tok = AutoTokenizer.from_pretrained(parts / "vlm")
    tok.add_tokens(["<img>", "<IMG_CONTEXT>", "</img>"], special_tokens=True)
    text = dict(model_type="qwen2", vocab_size=640, hidden_size=32, intermediate_size=64,
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                max_position_embeddings=256)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  image_size=[32, 32], patch_size=[8, 8])
    config = InternVLConfig(vision_config=vision, text_config=text,
                            image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"))
    return vlm_of(config), tok, GotOcr2ImageProcessor(size=dict(height=32, width=32))


def dit_of(cfg):
    """All that the bridge asks of the preset's DiT."""
    dit = nn.Linear(1, 1)
    dit.context_dim, dit.pooled_dim = (
        (cfg.mmdit["joint_attention_dim"], cfg.mmdit["pooled_projection_dim"]) if cfg.mmdit else
        (cfg.sana["caption_channels"], 0))
    return dit


def unified(vlm, **config):
    """A Unified around a VLM, whose DiT and VAE are beside the point."""
    cfg = Config(**COMMON | config)
    m = Unified(cfg, vlm[0], vlm[1], dit_of(cfg), None, None, vlm[2])
    m.bf16 = False
    torch.manual_seed(1)
    tiny.randomise(m.bridge)
    return m


INTERN = dict(image_tokens=("<img>", "<IMG_CONTEXT>", "</img>"), pos="arange")


# --- the second computation ---


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rms_connector(weights, x, heads):
    """UniRL-Zero's transformer_projector.py, one head at a time; x (L,D)."""
    w = {k.removeprefix("connector."): v for k, v in weights.items() if k.startswith("connector.")}

    def linear(name, y):
        return y @ w[name + ".weight"].T + w[name + ".bias"]

    for i in range(sum(k.endswith("layer_norm1.weight") for k in w)):
        at = f"layers.{i}."
        y = rms(x, w[at + "layer_norm1.weight"])
        q, k, v = (linear(at + f"self_attn.{n}_proj", y).chunk(heads, -1) for n in "qkv")
        mixed = []
        for h in range(heads):
            a = rms(q[h], w[at + "self_attn.q_norm.weight"])
            b = rms(k[h], w[at + "self_attn.k_norm.weight"])
            mixed.append((a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ v[h])
        x = x + linear(at + "self_attn.out_proj", torch.cat(mixed, -1))
        y = rms(x, w[at + "layer_norm2.weight"])
        wide = F.silu(linear(at + "mlp.fc1", y)) * linear(at + "mlp.gate", y)
        x = x + linear(at + "mlp.fc2", wide)
    return rms(x, w["norm.weight"])


def siglip(bridge, cfg):
    encoder = SiglipEncoder(SiglipVisionConfig(
        hidden_size=cfg.c_dim, intermediate_size=cfg.c_ff, num_hidden_layers=cfg.c_layers,
        num_attention_heads=cfg.c_heads, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6))
    encoder.load_state_dict(bridge.connector.state_dict(), strict=True)
    return lambda x: encoder(inputs_embeds=x[None]).last_hidden_state[0]


def directly(m, states, noise=None):
    """hidden_states of one unpadded row, each (1,L,d) -> context (L,Dc), pooled or None."""
    cfg, w = m.cfg, m.bridge.state_dict()
    connector = siglip(m.bridge, cfg) if cfg.c_style == "ln" else (
        lambda x: rms_connector(w, x, cfg.c_heads))
    h = [s[0, -cfg.n_query:] if cfg.keep == "query" else s[0] for s in states]

    def project(name, x):
        return x @ w[name + ".weight"].T + w[name + ".bias"] if name + ".weight" in w else x

    inputs = {"last": lambda: [h[-1]], "lim": lambda: [h[i] for i in cfg.layers],
              "scb": lambda: [torch.cat([h[i] for i in cfg.layers], -1)]}[cfg.bridge]()
    outs = [connector(project("projector_1", x)) for x in inputs]
    ctx = [project("projector_3", x) for x in outs]
    if cfg.bridge == "lim":
        ctx = [F.layer_norm(c, c.shape[-1:], w["agglayer_norm.weight"], w["agglayer_norm.bias"])
               for c in ctx]
        ctx = [c * n for c, n in zip(ctx, noise)] if noise else ctx
    pooled = None
    if cfg.mmdit:
        pooled = sum(project("projector_2", x.mean(0)) for x in outs) / len(outs)
    return sum(ctx) / len(ctx), pooled


def row(m, text, queries="meta_queries"):
    """hidden_states of one row without images, by the VLM's own tokenizer and default positions;
    of a text or of its tokens."""
    lm = m.vlm.model.language_model
    ids = torch.tensor([m.tokenizer(text)["input_ids"] if isinstance(text, str) else text])
    x = torch.cat([lm.get_input_embeddings()(ids), m.bridge.get_parameter(queries)[None]], 1)
    return lm(inputs_embeds=x, output_hidden_states=True).hidden_states


# --- bridge kinds ---


@pytest.mark.parametrize("vlm", ["qwen", "intern"])
@pytest.mark.parametrize("kind", KINDS)
def test_bridge_is_a_direct_computation(request, vlm, kind):
    """Also: rows are encoded as if each were alone and unpadded."""
    more = INTERN if vlm == "intern" else {}
    m = unified(request.getfixturevalue(vlm), **KINDS[kind] | more)
    cond = m.encode(PROMPTS)
    system = HELP if kind == "unirl-zero" else ""
    lengths = []
    for b, prompt in enumerate(PROMPTS):
        suffix = "<img>" if kind == "openuni" else ""
        ctx, pooled = directly(m, row(m, system + USER + DRAW + prompt + SAYS + suffix))
        n = len(ctx)
        lengths.append(n)
        same(cond.ctx[b, :n], ctx)
        assert cond.mask is None or cond.mask[b].tolist() == [True] * n + [False] * (
            cond.ctx.shape[1] - n)
        if m.cfg.mmdit:
            same(cond.pooled[b], pooled)
        else:
            assert cond.pooled is None
    assert (set(lengths) == {3} and cond.mask is None) == (m.cfg.keep == "query")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(qwen, kind):
    m = unified(qwen, **KINDS[kind])
    refs = [pictures((32, 48)), pictures((64, 32), (32, 32)), []]
    for more in [(), (refs, "edit")]:
        whole = m.encode(PROMPTS, *more)
        for b, prompt in enumerate(PROMPTS):
            alone = m.encode([prompt], *([[a[b]] if isinstance(a, list) else a for a in more]))
            assert alone.mask is None
            same(whole.ctx[b, : alone.ctx.shape[1]], alone.ctx[0])
            if whole.pooled is not None:
                same(whole.pooled[b], alone.pooled[0])


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient_rows_are_read_in_parts(qwen, kind, monkeypatch):
    """Of any number, with words and without: a rollout needs no more memory for more prompts."""
    m, prompts = unified(qwen, **KINDS[kind]), PROMPTS[1:] + PROMPTS
    words = spell(m, ["red", "two blue stars", None, "no", "yes"])
    read, rows = m.vlm.model.language_model.forward, []
    m.vlm.model.language_model.forward = lambda inputs_embeds, **more: (
        rows.append(len(inputs_embeds)), read(inputs_embeds=inputs_embeds, **more))[1]
    whole, logp = m.encode_words(prompts, None, words)
    monkeypatch.setattr(model_py, "slices", lambda n, most: slices(n, most and 2))
    with torch.no_grad():
        cond, logp_parts = m.encode_words(prompts, None, words)
        bare = m.encode(prompts)
    assert rows == [5, 2, 2, 1, 2, 2, 1]
    same(cond.ctx, whole.ctx)
    same(logp_parts, logp)
    same(bare.ctx, m.encode(prompts).ctx)
    assert (cond.mask is None) == (whole.mask is None) and (
        cond.mask is None or torch.equal(cond.mask, whole.mask))
    assert (cond.pooled is None) == (whole.pooled is None)
    if cond.pooled is not None:
        same(cond.pooled, whole.pooled)


def test_noise_on_layers(qwen):
    """ParaUni's LDAM: c_i, after connector and LayerNorm, times its factor."""
    m = unified(qwen, **KINDS["parauni"])
    factors = [1.5, 1.0, -0.5, 2.0]
    states = row(m, USER + "Generate an image: a sign" + SAYS)
    noisy = m.encode(["a sign"], layer_noise=torch.tensor(factors)).ctx[0]
    same(noisy, directly(m, states, factors)[0])
    assert apart(noisy, m.encode(["a sign"]).ctx[0])
    same(m.encode(["a sign"], layer_noise=torch.ones(4)).ctx[0], m.encode(["a sign"]).ctx[0])
    with pytest.raises(AssertionError, match="only bridge lim"):
        unified(qwen, **KINDS["deepgen"]).encode(["a sign"], layer_noise=torch.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_in_the_bridge_learns(qwen, kind):
    m = unified(qwen, **KINDS[kind])
    m.bridge.requires_grad_(True)
    cond = m.encode(PROMPTS)
    sum(a.square().sum() for a in (cond.ctx, cond.pooled) if a is not None).backward()
    idle = {n for n, p in m.bridge.named_parameters() if p.grad is None or not p.grad.any()}
    # A softmax does not feel what all keys share, unless they are normalised afterwards.
    assert {n for n in idle if not n.endswith("k_proj.bias")} == (
        {"edit_queries"} if m.cfg.edit_queries else set())


def test_start_is_no_prompt():
    """DeepGen's zero-initialised projectors; not where a norm, in lim or in SANA, follows."""
    for kind, zero in [("deepgen", True), ("unipic2", True), ("openuni", False), ("parauni", False),
                       ("lim on an MMDiT", False)]:
        cfg = Config(**COMMON | KINDS[kind])
        bridge = Bridge(cfg, dit_of(cfg))
        assert bool(bridge.projector_3.weight.any()) != zero


@pytest.mark.parametrize("n, layers", [(36, (35, 29, 23, 17, 11, 5)), (28, (27, 21, 15, 9, 3))])
def test_layer_indices(parts, n, layers):
    """hidden_states[i] is what block i puts out (counting from 1), but the last is normalised."""
    assert tuple(range(n - 1, 0, -6)) == layers
    assert PRESETS["deepgen"].layers == tuple(range(35, 0, -6))
    vlm = vlm_of(Qwen2_5_VLConfig.from_pretrained(parts / "vlm"), num_hidden_layers=n)
    lm, outs = vlm.model.language_model, []
    for layer in lm.layers:
        layer.register_forward_hook(lambda *a: outs.append(a[2]))
    states = lm(inputs_embeds=torch.randn(1, 5, 32), output_hidden_states=True).hidden_states
    assert len(states) == n + 1 and len(outs) == n
    for i in (*layers, 1, n - 1):
        assert torch.equal(states[i], outs[i - 1])
    same(states[n], lm.norm(outs[-1]))
    assert apart(states[n], outs[-1])


def test_connector_names(qwen):
    """SigLIP's, so that released connectors load as they are; UniRL-Zero's after convert."""
    connector = unified(qwen, **KINDS["deepgen"]).bridge.connector
    keys = {k.split(".", 2)[2] for k in connector.state_dict()}
    assert keys == {f"{n}.{p}" for p in ("weight", "bias") for n in (
        "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
        *(f"self_attn.{a}_proj" for a in ("q", "k", "v", "out")))}
    own = set(unified(qwen, **KINDS["unirl-zero"]).bridge.state_dict())
    assert {k for k in own if "layers" not in k} == {
        "meta_queries", "edit_queries", "connector.norm.weight", "projector_3.weight",
        "projector_3.bias"}
    assert {k.split(".", 3)[3] for k in own if "layers" in k} == (
        keys - {"layer_norm1.bias", "layer_norm2.bias"} | {"mlp.gate.weight", "mlp.gate.bias"}
        | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"})


# --- queries, nulls, prompts ---


def test_two_sets_of_queries(qwen):
    m, refs = unified(qwen, **KINDS["unirl-zero"]), [pictures((32, 32))]
    draw, edit = m.encode(["a"]).ctx, m.encode(["a"], refs, "edit").ctx
    m.bridge.edit_queries.data.normal_()
    assert torch.equal(m.encode(["a"]).ctx, draw) and apart(m.encode(["a"], refs, "edit").ctx, edit)
    edit = m.encode(["a"], refs, "edit").ctx
    m.bridge.meta_queries.data.normal_()
    assert apart(m.encode(["a"]).ctx, draw) and torch.equal(m.encode(["a"], refs, "edit").ctx, edit)
    one = unified(qwen, **KINDS["openuni"])                # everybody else has one set for both
    edit = one.encode(["a"], refs, "edit").ctx
    one.bridge.meta_queries.data.normal_()
    assert apart(one.encode(["a"], refs, "edit").ctx, edit)


def test_kinds_of_null(qwen):
    refs = [pictures((32, 32)), pictures((48, 32))]
    m = unified(qwen, **KINDS["deepgen"] | dict(null_prompt="dull", null_edit="blurry"))
    same(m.encode([None]).ctx, m.encode(["dull"]).ctx)                    # within t2i_text
    same(m.encode([None, None], refs, "edit").ctx, m.encode(["blurry"] * 2, refs, "edit").ctx)
    same(m.null(2).ctx, m.encode(["dull"] * 2).ctx)
    cond = m.encode(["a", "b"], refs, "edit")
    (w, c), (w0, null) = m.guided(cond, 3.5, refs, "edit")
    assert c is cond and (w, w0) == (3.5, -2.5)
    same(null.ctx, m.encode(["blurry"] * 2, refs, "edit").ctx)            # it keeps its images
    assert apart(null.ctx[0], null.ctx[1])

    m = unified(qwen, **KINDS["openuni"] | dict(suffix=""))               # the user's whole turn
    same(m.null(1).ctx[0], directly(m, row(
        m, USER + "Generate an image." + SAYS))[0])

    m = unified(qwen, **KINDS["unirl-zero"])                              # zeros, row by row
    mixed, plain = m.encode(["a", None, "b"]).ctx, m.encode(["a", "c", "b"]).ctx
    assert mixed.shape == plain.shape and not mixed[1].any() and not m.null(2).ctx.any()
    same(mixed[[0, 2]], plain[[0, 2]])
    assert not m.encode([None], [pictures((32, 32))], "edit").ctx.any()


CHATS = {                      # to draw, to edit, tokens of the edit's images, the null of drawing
    "unirl-zero": (
        HELP + USER + "Please generate image based on the following caption: a {b}" + SAYS,
        HELP + USER + EYE.format(2 * PAD) + "\nPlease edit the given image based on the folllowing "
        "instruction: a {b}." + SAYS, [2],
        HELP + USER + "Please generate image based on the following caption: " + SAYS),
    "deepgen": (
        USER + DRAW + "a {b}" + SAYS,
        USER + EYE.format(PAD) + EYE.format(2 * PAD) + "\na {b}" + SAYS, [1, 2],
        USER + DRAW + SAYS),
    "unipic2": (
        USER + DRAW + "a {b}" + SAYS, USER + EYE.format(2 * PAD) + "a {b}" + SAYS, [2],
        USER + DRAW + SAYS),
    "openuni": (
        USER + DRAW + "a {b}" + SAYS + "<img>",
        USER + EYES.format(3 * CONTEXT) + "\na {b}" + SAYS + "<img>", [3],
        USER + "Generate an image." + SAYS + "<img>"),
}
CHATS["parauni"] = CHATS["openuni"]


@pytest.mark.parametrize("name", CHATS)
def test_prompts_of_presets(name):
    """Word for word what each release feeds its VLM; a prompt may hold braces."""
    m = Unified.__new__(Unified)
    nn.Module.__init__(m)
    m.cfg = PRESETS[name]
    draw, edit, lengths, null = CHATS[name]
    assert chat(m.cfg, "a {b}", "t2i", []) == draw
    assert chat(m.cfg, "a {b}", "edit", lengths) == edit
    assert chat(m.cfg, None, "t2i", []) == null
    assert chat(m.cfg, None, "edit", lengths) == edit.replace("a {b}", m.cfg.null_edit)


# --- images ---


def inside(m, *args):
    """hidden_states that encode hands to the bridge, and the rows' lengths."""
    got = []
    m.bridge.forward = lambda hidden, lengths, noise: got.extend((hidden, lengths)) or Cond(
        hidden[0])
    m.encode(*args)
    del m.bridge.forward
    return got


def test_images_enter_qwen_as_in_transformers(qwen):
    """Up to the queries, hidden states are those of transformers' own forward: its placement of
    image tokens, its mrope."""
    vlm, tok, processor = qwen
    m = unified(qwen, **KINDS["deepgen"])
    refs = [pictures((64, 32), (32, 48)), [], pictures((48, 48))]
    states, lengths = inside(m, PROMPTS, refs, "edit")
    for b, prompt in enumerate(PROMPTS):
        eyes = "".join(EYE.format(PAD * (i[0].numel() // 256)) for i in refs[b])
        ids = tok(USER + eyes + "\n" + prompt + SAYS, return_tensors="pt")["input_ids"]
        seen = processor(images=refs[b], return_tensors="pt") if refs[b] else {}
        kinds = (ids == vlm.config.image_token_id).int()
        theirs = vlm.model(input_ids=ids, mm_token_type_ids=kinds, output_hidden_states=True,
                           **seen).hidden_states
        n = ids.shape[1]
        assert lengths[b] == n + 3
        for i in range(5):
            same(states[i][b, :n], theirs[i][0])
        vlm.model.rope_deltas = None


def test_images_enter_intern_as_in_transformers(intern):
    vlm, tok, processor = intern
    m = unified(intern, **KINDS["openuni"] | INTERN)
    refs = [pictures((64, 32), (32, 48)), pictures((48, 48))]
    states, lengths = inside(m, PROMPTS[:2], refs, "edit")
    for b, prompt in enumerate(PROMPTS[:2]):
        eyes = len(refs[b]) * EYES.format(4 * CONTEXT)
        ids = tok(USER + eyes + "\n" + prompt + SAYS + "<img>", return_tensors="pt")["input_ids"]
        pixels = processor(images=refs[b], return_tensors="pt")["pixel_values"]
        theirs = vlm.model(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
        n = ids.shape[1]
        assert lengths[b] == n + 3
        for i in range(5):
            same(states[i][b, :n], theirs.hidden_states[i][0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_mrope_is_get_rope_index(qwen, side):
    vlm, image = qwen[0], qwen[0].config.image_token_id
    grids = [[(2, 3), (4, 1)], [], [(1, 5)], [(3, 3)]]
    rows = []
    for b, row_grids in enumerate(grids):
        ids = list(range(3 + b))
        for r, c in row_grids:
            ids += [9] + [image] * (r * c) + [8, 7]
        rows.append(ids + [-1] * 4)                        # queries, as encode appends them
    L = max(map(len, rows))
    pads = [[0] * (L - len(r)) for r in rows]
    mask = [[0] * len(p) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * len(p)
            for r, p in zip(rows, pads)]
    ids = torch.tensor([p + r if side == "left" else r + p for r, p in zip(rows, pads)])
    theirs, _ = vlm.model.get_rope_index(
        ids, (ids == image).int(), torch.tensor([(1, 2 * r, 2 * c) for g in grids for r, c in g]),
        attention_mask=torch.tensor(mask))
    for b in range(4):
        assert torch.equal(mrope(rows[b], image, grids[b]), theirs[:, b, torch.tensor(mask[b]) > 0])


def test_positions_are_passed_and_not_remembered(qwen):
    """A VLM keeps the offset of the last image it saw; encode must not meet it again."""
    for kind in ("deepgen", "unipic2"):
        m = unified(qwen, **KINDS[kind])
        fresh = m.encode(PROMPTS).ctx
        m.vlm.model.rope_deltas = torch.full((3, 1), -7)
        assert torch.equal(m.encode(PROMPTS).ctx, fresh)
        m.vlm.model.rope_deltas = None
    refs, spied = [pictures((64, 64))], {}
    for pos in ("mrope", "arange"):
        m, lm = unified(qwen, **KINDS["unipic2"] | dict(pos=pos)), qwen[0].model.language_model
        handle = lm.register_forward_pre_hook(
            lambda _, a, k: spied.update({pos: k["position_ids"]}), with_kwargs=True)
        m.encode(["a"], refs, "edit")
        handle.remove()
    L = spied["arange"].shape[-1]
    assert torch.equal(spied["arange"], torch.arange(L)[None])
    assert spied["mrope"].shape == (3, 1, L) and spied["mrope"].max() == L - 1 - 16 + 4


@pytest.mark.parametrize("vlm", ["qwen", "intern"])
def test_an_edit_looks_at_its_images(request, vlm):
    more = INTERN if vlm == "intern" else {}
    m = unified(request.getfixturevalue(vlm), **KINDS["deepgen"] | more)
    one, two = pictures((32, 32), (32, 32))
    a, b = m.encode(["x"], [[one]], "edit").ctx, m.encode(["x"], [[two]], "edit").ctx
    assert apart(a, b) and apart(m.encode(["y"], [[one]], "edit").ctx, a)
    both, swapped = (m.encode(["x"], [r], "edit").ctx for r in ([one, two], [two, one]))
    assert both.shape[1] > a.shape[1] and apart(both, swapped)
    for args in [(["x"], [[one]]), (["x"], None, "edit")]:
        with pytest.raises(AssertionError, match="and nothing else"):
            m.encode(*args)


def patches(size, scale, processor):
    """Grid (time, rows, columns) and pixels that the VLM gets of one image of that size."""
    got = {}

    class Eye:
        def get_image_features(self, **kw):
            got.update(kw)
            return type("Out", (), dict(pooler_output=[None]))

    m = Unified.__new__(Unified)
    nn.Module.__init__(m)
    m.cfg, m.image_processor = Config(vit_scale=scale), processor
    m.vlm, m.dit = type("VLM", (), dict(model=Eye())), nn.Linear(1, 1)
    (_, grid), = m.see(pictures(size))
    return grid, got


@pytest.mark.parametrize("name, size, rows", [
    ("deepgen", (512, 512), (16, 16)), ("deepgen", (640, 416), (20, 13)),
    ("unipic2", (384, 512), (12, 16)), ("unirl-zero", (1024, 1024), (24, 24)),
    ("deepgen", (100, 10), (3, 1)),
])
def test_scale_at_which_the_vlm_sees(name, size, rows):
    """With Qwen's own processor: 28 pixels a token; DeepGen's 512 px are 256 tokens."""
    grid, got = patches(size, PRESETS[name].vit_scale, Qwen2VLImageProcessor())
    assert tuple(grid) == rows and got["image_grid_thw"].tolist() == [[1, 2 * rows[0], 2 * rows[1]]]


def test_pixels_are_deepgens():
    """Its code: bilinear to 28/32 of the DiT's pixels in [-1, 1], CLIP's mean and std, patches."""
    _, got = patches((64, 96), 28 / 32, Qwen2VLImageProcessor())
    x = pictures((64, 96))[0][None] / 127.5 - 1
    x = (F.interpolate(x, scale_factor=28 / 32, mode="bilinear") + 1) / 2
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    x = x.view(3, 2, 2, 14, 3, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)        # merged 2 x 2 together
    x = x.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(24, -1)
    same(got["pixel_values"], x, 1e-4)


def test_intern_sees_its_own_size(intern):
    m = unified(intern, **KINDS["openuni"] | INTERN)
    assert [len(t) for t, _ in m.see(pictures((32, 32), (20, 90), (128, 128)))] == [4, 4, 4]


# --- bridge text ---


def word_tokenizer(words):
    vocab = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """StableDiffusion3Pipeline at small size, with T5 and without, and where they are saved."""
    folder = tmp_path_factory.mktemp("sd3")
    signs = [*map(chr, range(97, 123)), *"</|>"]
    vocab = signs + [c + "</w>" for c in signs] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clips = [CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                           model_max_length=12, pad_token=pad) for pad in ("<|endoftext|>", "a")]
    torch.manual_seed(0)
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=d, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=12, projection_dim=d, hidden_act=act,
        bos_token_id=60, eos_token_id=61)) for d, act in ((8, "quick_gelu"), (16, "gelu"))]
    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2,
                                 num_heads=4, feed_forward_proj="gated-gelu"))
    for encoder in (*encoders, t5):
        tiny.randomise(encoder.eval().requires_grad_(False))
    parts = dict(
        transformer=SD3Transformer2DModel(**tiny.MMDIT), vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=encoders[0], tokenizer=clips[0],
        text_encoder_2=encoders[1], tokenizer_2=clips[1])
    words = ["red", "circle", "blue", "</", "s", ">"]
    t5s = dict(text_encoder_3=t5, tokenizer_3=word_tokenizer(words))
    pipes = {True: StableDiffusion3Pipeline(**parts, **t5s),
             False: StableDiffusion3Pipeline(**parts, **dict.fromkeys(t5s))}
    for with_t5, pipe in pipes.items():
        pipe.save_pretrained(folder / str(with_t5))
    return pipes, folder


@pytest.mark.parametrize("t5", [True, False])
def test_text_is_diffusers_sd3(sd3, t5):
    pipe, folder = sd3[0][t5], sd3[1] / str(t5)
    assert (folder / "text_encoder_3").exists() == t5
    prompts = ["a red circle", "", "blue " * 30]                          # too long for all three
    theirs, null, pooled, null_pooled = pipe.encode_prompt(
        prompts, None, None, device="cpu", max_sequence_length=9)
    cfg = Config(bridge="text", text="sd3" if t5 else "sd3-no-t5", t5_tokens=9, mmdit=tiny.MMDIT)
    m = Unified(cfg, None, None, dit_of(cfg), None, SD3Text(folder, t5, 9, 32))
    m.bf16 = False
    cond = m.encode(prompts)
    assert cond.ctx.shape == (3, 12 + 9, 32) and cond.mask is None
    same(cond.ctx, theirs)
    same(cond.pooled, pooled)
    same(m.null(3).ctx, null)
    same(m.null(3).pooled, null_pooled)
    assert bool(cond.ctx[:, 12:].any()) == t5
    # The name of a special token is letters, which all three part from "<|" and "</".
    named = m.encode(["<|endoftext|>", "</s> red"])
    spaced = m.encode(["<| endoftext |>", "</ s > red"])
    same(named.ctx, spaced.ctx)
    same(named.pooled, spaced.pooled)
    assert apart(named.pooled[:1], m.encode([""]).pooled)
    assert not t5 or apart(named.ctx[1:, 12:], m.encode(["red"]).ctx[:, 12:])
    m.cfg = replace(cfg, null_edit="blue")
    same(m.encode([None], task="edit").ctx, m.encode(["blue"]).ctx)       # images go to the DiT


PLAIN = ["a red circle", "", "it's 2 < 3; the end_of_text", "x" * 500]


def test_open_clips_own_tokenizer_reads_to_the_end():
    """The names of its special tokens are letters, which it parts at each "_"; all else is as it
    was."""
    ours, theirs = text_encoders_py.clip_words("ViT-B-32"), open_clip.get_tokenizer("ViT-B-32")
    assert torch.equal(ours(PLAIN), theirs(PLAIN))
    named, spaced = "a <end_of_text> b <START_OF_TEXT>", "a < end _of_ text > b < start _of_ text >"
    ids = ours([named])[0].tolist()
    assert ids == theirs([spaced])[0].tolist() and ids.count(49406) == ids.count(49407) == 1
    assert theirs([named])[0].tolist().count(49407) == 2


def test_a_classroom_text_is_read_to_its_end(parts):
    """By open_clip's CLIP with a tokenizer of transformers', whose end of text is a pad as well."""
    cfg = Config(**json.loads((parts / "config.json").read_text()))
    m = tiny.build(replace(cfg, bridge="text", n_query=0))
    assert torch.equal(m.tokenizer(PLAIN), open_clip.get_tokenizer(
        f"local-dir:{cfg.text_encoder}")(PLAIN))
    named = [f"a <|endoftext|> {x}" for x in ("ring", "star")]
    a, b = (m.encode([text]) for text in named)
    said = letters(m.tokenizer.tokenizer, named[0])
    assert m.tokenizer(named)[0, : len(said)].tolist() == said
    assert a.ctx.shape[1] == len(said) + 1                                # and one end of text
    assert apart(a.pooled, b.pooled) and apart(a.ctx[:, -2:], b.ctx[:, -2:])


# --- latents ---


def test_latents_of_a_dc_ae():
    """Deterministic, scaled, not shifted."""
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41407).eval().requires_grad_(False)
    tiny.randomise(vae)
    cfg = Config(bridge="text", mmdit=tiny.MMDIT)
    m = Unified(cfg, None, None, dit_of(cfg), vae)
    m.bf16 = False
    x = torch.stack(pictures((16, 8), (16, 8)))
    z = m.to_latents(x)
    same(z, vae.encode(x / 127.5 - 1).latent * 0.41407)
    pixels = ((vae.decode(z / 0.41407).sample.clamp(-1, 1) + 1) * 127.5).round()
    assert (m.to_images(z).float() - pixels).abs().max() <= 1


def test_training_times():
    g = torch.Generator().manual_seed(0)
    cfg = PRESETS["shapes"]
    assert train_times(20000, cfg, g).logit().mean().item() == pytest.approx(cfg.t_mean, abs=0.03)
    t = train_times(20000, PRESETS["openuni"], g)
    assert t.mean().item() == pytest.approx(0.5, abs=0.01) and t.var().item() == pytest.approx(
        1 / 12, abs=0.005)
    t = train_times(20000, PRESETS["deepgen"], g)                         # uniform, then shift 3
    assert (t / (3 - 2 * t)).mean().item() == pytest.approx(0.5, abs=0.01)


# --- training ---


def test_a_bridge_without_pooled_trains(parts, tmp_path, monkeypatch):
    """ParaUni's kind through stage 1 and RL; a DiT that takes no summary, a null that is zero."""
    sana = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
                num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=4,
                cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32)
    dit = SanaTransformer2DModel(**sana)
    tiny.randomise(dit)
    dit.save_pretrained(tmp_path / "dit")
    about = json.loads((parts / "config.json").read_text()) | dict(
        bridge="lim", keep="query", layers=[1, 2], null="zeros", mmdit={}, sana=sana,
        dit=str(tmp_path / "dit"))
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "prompts.jsonl").write_text((parts / "prompts.jsonl").read_text())
    for i, x in enumerate(pictures((64, 64), (64, 64))):
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=f"{i}.png", prompt="a sign")) + "\n" for i in range(2)))
    rows = tiny.play(tmp_path, tmp_path / "a", "--init", "", "--data", tmp_path, "--batch", 2,
                     "--steps", 2, "--drop", 0.5, main=pretrain.main)
    rows += tiny.play(tmp_path, tmp_path / "b", "--init", tmp_path / "a", "--steps", 1, "--train",
                      "bridge", "--guidance", 2)
    assert all(r["grad_norm"] > 0 for r in rows if "grad_norm" in r)
    assert rows[-1]["ratio_off"] <= 1e-6


# --- presets ---


def size(module):
    return sum(p.numel() for p in module.parameters())


# Published or computed from the releases, in millions: connector, projectors; then the DiT's.
COUNTS = {"unirl-zero": (504, 5), "deepgen": (394, 38), "unipic2": (888, 15), "parauni": (222, 4),
          "openuni": (222, 4)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name):
    """Built without a download, and without memory."""
    cfg = PRESETS[name]
    assert name == cfg.preset and bool(cfg.mmdit) != bool(cfg.sana)
    assert Config(**json.loads(json.dumps(asdict(cfg)))).dit_config.keys() == cfg.dit_config.keys()
    with torch.device("meta"):
        dit = build_dit(cfg)
        bridge = Bridge(cfg, dit)
    if name in COUNTS:
        connector = size(bridge.connector)
        queries = sum(p.numel() for n, p in bridge.named_parameters() if "queries" in n)
        rest = size(bridge) - connector - queries
        assert (round(connector / 1e6), round(rest / 1e6)) == COUNTS[name]
        assert queries == cfg.n_query * cfg.vlm_dim * (2 if name == "unirl-zero" else 1)
    if cfg.bridge == "text":
        assert size(bridge) == 0
    asked = dit_of(cfg)
    assert (dit.context_dim, dit.pooled_dim) == (asked.context_dim, asked.pooled_dim)
    if cfg.mmdit and not name.startswith("shapes"):
        assert round(size(dit) / 1e9, 3) == 2.243 and len(dit.state_dict()) == 909


@pytest.mark.parametrize("name, keys, billions", [
    ("unirl-zero", 400, 1.6), ("openuni", 396, 1.6), ("parauni", 476, 1.6), ("shapes-sana", 0, 0)])
def test_sana_presets_have_the_published_size(name, keys, billions):
    with torch.device("meta"):
        dit = SanaDiT(**PRESETS[name].sana)
    if keys:
        assert len(dit.state_dict()) == keys and round(size(dit) / 1e9, 1) == billions
    assert dit.config["in_channels"] == PRESETS[name].dit_config["in_channels"]


def test_values_of_presets():
    """facts that no other test meets: geometry, times, nulls."""
    table = {n: (c.size, c.vae_factor, c.t_dist, c.train_shift, c.sample_shift, c.null)
             for n, c in PRESETS.items()}
    uniform, normal = "uniform", "logit-normal"
    assert table == {
        "shapes": (64, 4, normal, 1.0, 3.0, "prompt"),
        "shapes-sana": (64, 4, normal, 1.0, 3.0, "prompt"),
        "unirl-zero": (1024, 32, normal, 1.0, 3.0, "zeros"),
        "deepgen": (512, 8, uniform, 3.0, 3.0, "prompt"),
        "flow-grpo": (512, 8, normal, 1.0, 3.0, "prompt"),
        "unipic2-kontext": (512, 8, uniform, 3.0, 3.0, "prompt"),
        "unipic2": (512, 8, uniform, 3.0, 3.0, "prompt"),
        "parauni": (1024, 32, uniform, 1.0, 3.0, "turn"),
        "openuni": (512, 32, uniform, 1.0, 3.0, "turn"),
    }
    assert PRESETS["parauni"].layers == tuple(range(1, 29))
    assert {n for n, c in PRESETS.items() if c.null_edit.startswith("blurry")} == {
        "deepgen", "unipic2", "unipic2-kontext"}


def test_shipped_checkpoint_has_the_presets_names():
    path = tiny.ROOT / "data/shapes/sft"
    tensors, about = checkpoint_py.read_init(path, None, None)[0], checkpoint_py.read_about(path)
    assert {k for k in tensors if k.startswith("bridge.")} == {
        "bridge." + k for k in Bridge(PRESETS["shapes"], dit_of(PRESETS["shapes"])).state_dict()}
    assert about.keys() <= {f.name for f in fields(Config)}               # older, but still known
    assert replace(PRESETS["shapes"], **about).null == "prompt"


# --- hyper-parameters: dataclass < preset < flag ---


SCRIPTS = dict(stage1=pretrain, stage2=sft, stage3=grpo)


def flags(monkeypatch, stage, *argv):
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, argv)])
    return parse(SCRIPTS[stage].Args, "", stage)


def test_preset_gives_way_to_flags(monkeypatch, tmp_path):
    plain = flags(monkeypatch, "stage1")
    assert plain == pretrain.Args()
    paper = flags(monkeypatch, "stage1", "--preset", "deepgen")
    assert (paper.lr, paper.batch, paper.warmup, paper.steps) == (1e-4, 512, 2000, 200_000)
    assert paper.drop == plain.drop and paper.out == plain.out            # what it does not set
    mine = flags(monkeypatch, "stage1", "--lr", 2e-3, "--preset", "deepgen", "--batch", 64)
    assert mine == replace(paper, lr=2e-3, batch=64)                      # even if as the dataclass
    (tmp_path / "own.json").write_text('{"recipe": "mr-grpo", "shared_noise": false}')
    its = ["stage3", "--preset", "deepgen", "--recipe", tmp_path / "own.json"]
    rl = flags(monkeypatch, *its)
    assert (rl.B, rl.G, rl.T, rl.eta, rl.kind, rl.shared_noise) == (32, 8, 50, 1.0, "cps-simple",
                                                                    False)
    assert flags(monkeypatch, *its[:3]) == replace(rl, recipe="mr-grpo", shared_noise=True)
    assert flags(monkeypatch, *its, "--eta", 0.5) == replace(rl, eta=0.5)


def test_a_typo_is_not_taken_for_a_renamed_flag(monkeypatch):
    """Though the flags that there are, --task and --prompts among them, are listed behind it."""
    for stage in SCRIPTS:
        with pytest.raises(SystemExit, match="unrecognized arguments: --no-such-thing; there are"):
            flags(monkeypatch, stage, "--no-such-thing")
    with pytest.raises(SystemExit, match="--task is now a flag of reflect.py"):
        flags(monkeypatch, "stage3", "--task", "vqa")


def test_preset_without_such_a_stage(monkeypatch):
    for stage, name, words in [
            ("stage1", "flow-grpo", "the paper of preset 'flow-grpo' has no stage1"),
            ("stage3", "openuni", "has no stage3"),
            ("stage1", "shape", "unknown --preset 'shape'; there are: shapes, shapes-sana, ")]:
        with pytest.raises(SystemExit, match=words):
            flags(monkeypatch, stage, "--preset", name)
    odd = replace(PRESETS["shapes"], stage2=dict(warp=3, lr=1.0))
    monkeypatch.setitem(PRESETS, "odd", odd)
    with pytest.raises(SystemExit, match="preset 'odd' needs --warp, which this script lacks"):
        flags(monkeypatch, "stage2", "--preset", "odd")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_flags_that_exist(name):
    """Names and types; and RL settings pass grpo's own check."""
    for stage, script in SCRIPTS.items():
        values = getattr(PRESETS[name], stage)
        if values is None:
            continue
        kinds = {f.name: f.type for f in fields(script.Args)}
        assert values.keys() <= kinds.keys()
        assert all(type(v) is kinds[k] for k, v in values.items())
        if script is grpo:
            grpo.check(grpo.Args(preset=name, prompts="its.jsonl", **values), 1)
