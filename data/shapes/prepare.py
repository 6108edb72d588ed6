"""The classroom's files: training shards, prompts, and the training of its small parts.

    python -m data.shapes.prepare data     # training shards and prompt files, two minutes
    python -m data.shapes.prepare vae      # then clip, dit, sana, vlm: see LOG.md for times
"""

import argparse
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import tarfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers import processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from common.presets import PRESETS
from common.run import fail, key, keyed, setup, sum_grads
from common.sana import SanaDiT
from data.shapes.bench import bench_shapes
from data.shapes.captions import (CAPTION_ERROR, MIXTURE, mistaken, phrase, plural, sample_meta,
                                  scene_for, training_pair)
from data.shapes.edits import KINDS, sample_edit, split_edit, training_edit
from data.shapes.talk import (DRAW, IMAGE, MATCH, PICTURE_KINDS, SHOWS, THINK, WHICH, caption,
                              critique, picture, picture_question, split_picture, text_question,
                              think)
from data.shapes.world import (COLORS, GLYPHS, NUMBERS, PITCH, SHAPES, SIDE, SIZES, TAGS, box,
                               place, render, seen_color)
from model import Cond, MMDiT, Unified

HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------
# Files: training images as WebDataset shards, prompts as jsonl in GenEval's schema.

SHARDS, EDIT_SHARDS, COLD_SHARDS, PER_SHARD = 30, 30, 10, 1000
QUESTIONS, LOOKS = 20000, 2400  # of each kind, each tag: of 600 the VLM learns which, not how
RIGHT_SHARE = 0.25  # of the first pictures in reflect/: there the refined picture is the first
RL_MIX = dict(position=700, counting=500, color_attr=300, colors=100, two_object=100)  # Flow-GRPO's


def canonical(meta):
    """What a prompt asks for, in whatever order it is said: twins stay on one side of a split."""
    if meta["tag"] in ("text", "reason"):
        return meta["prompt"]
    things = [(g["class"], g["count"], g.get("color", "")) for g in meta["include"]]
    if meta["tag"] != "position":
        return str(sorted(things))
    rel = meta["include"][1]["position"][0]
    if rel in ("right of", "below"):  # "a right of b" is "b left of a"
        rel, things = {"right of": "left of", "below": "above"}[rel], things[::-1]
    return f"{things} {rel}"


def draw(tag, rng, n, skip=(), distinct=False, unseen=False):
    """n prompts of a tag, none of whose canonical forms is in `skip`; or all `distinct` ones up
    to n, where 5,000 tries see every one of a small tag's."""
    rows, known = [], set(skip)
    for _ in range(5000 if distinct else 10**9):
        if len(rows) == n:
            break
        meta = sample_meta(tag, rng, unseen)
        if canonical(meta) not in known:
            rows.append(meta)
            known |= {canonical(meta)} if distinct else set()
    return rows


def cycle(rows, n):
    return [rows[i % len(rows)] for i in range(n)]


def make_prompts():
    """{file name: rows}.  What is evaluated is never trained on by RL, in either order."""
    rng, files = random.Random(3), dict(eval=[], train=[], unseen=[])
    for tag in [*TAGS, "text", "reason"]:
        space = draw(tag, rng, 120, distinct=True)
        held = space[: 8 if tag == "single_object" else len(space) // 2]  # 60 at most
        skip = {canonical(m) for m in held}
        if tag in TAGS:
            files["eval"] += cycle(held, 60)
            files["train"] += draw(tag, rng, RL_MIX.get(tag, 0), skip)
        else:
            files |= {tag: cycle(held, 60), f"{tag}_train": draw(tag, rng, 500, skip)}
    for tag in ("colors", "color_attr", "counting"):
        files["unseen"] += cycle(draw(tag, rng, 20, distinct=True, unseen=True), 20)
    rng.shuffle(files["train"])
    return files


def make_questions(n_train=120):
    """{file name: rows of tag, question, answer and, to look at, a scene}. What is evaluated shows
    a held scene, or has an answer that no question of training has. n_train: of each kind, about
    pictures; others stay the same."""
    rng, files = random.Random(5), {}
    for name, n in dict(vqa_train=120, vqa=60).items():
        files[name] = [picture_question(kind, rng, name == "vqa")
                       for kind in PICTURE_KINDS for _ in range(n)]
    space = {q["question"]: q for q in (text_question(rng) for _ in range(20000))}
    answers = sorted({q["answer"] for q in space.values()})
    kept = set(rng.sample(answers, len(answers) // 2))
    for name, test in dict(textqa_train=False, textqa=True).items():
        files[name] = [space[q] for q in sorted(space) if (space[q]["answer"] in kept) == test]
    for name in ("vqa_train", "textqa_train"):
        rng.shuffle(files[name])
    files["vqa_train"] += [picture_question(kind, rng) for _ in range(120, n_train)
                           for kind in PICTURE_KINDS]
    return files


def make_reflections(prompts, n_train=80):
    """{file name: rows of GenEval metadata with `right` and `wrong`, scenes: first images to be
    judged}, on both sides of make_prompts' split and of the scenes'; reflect_known has prompts of
    training, scenes of the test. n_train: of each tag."""
    def looks(tag, side, test, n):
        metas = [m for m in prompts[side] if m["tag"] == tag]
        metas = cycle(metas, 5 * n) if metas else []
        both = (dict(m, **{k: split_picture(m, rng, k == "right", test)
                           for k in ("right", "wrong")}) for m in metas)  # fmt: skip
        return islice((row for row in both if row["right"] and row["wrong"]), n)

    rng, files = random.Random(6), {}
    files["reflect_train"] = [row for tag in TAGS for row in looks(tag, "train", False, 80)]
    files["reflect"] = [row for tag in TAGS for row in looks(tag, "eval", True, 30)]
    rng.shuffle(files["reflect_train"])
    files["reflect_known"] = [row for tag in TAGS for row in looks(tag, "train", True, 30)]
    files["reflect_train"] += [row for tag in TAGS for row in looks(tag, "train", False,
                                                                    n_train - 80)]
    return files


def make_edits():
    """{file name: rows of sample_edit}: what edit RL starts from, and what is evaluated."""
    rng, files = random.Random(4), {}
    for name, n in dict(edit_train=40, edit_eval=60).items():
        rows = files[name] = []
        for i in range(len(KINDS) * n):
            while (e := split_edit(rng, KINDS[i // n], name == "edit_eval")) in rows:
                pass
            rows.append(e)
    for e in files["edit_train"]:
        del e["target"]  # RL has to do without
    rng.shuffle(files["edit_train"])
    return files


def example(rng):
    """One captioned image of the training shards: {file's ending: scene or text}."""
    meta, scene = training_pair(rng)
    return dict(png=scene, json=dict(prompt=meta["prompt"]))


def edit_example(rng):
    e = training_edit(rng)
    return {"source.png": e["source"], "target.png": e["target"],
            "json": {k: e[k] for k in ("instruction", "inverse")}}  # fmt: skip


def cot_example(rng):
    """A picture, its prompt and what was thought about it. Riddles come out wrong as often as the
    VLM's (THINK_ERROR); the picture shows what the words answer, whatever the prompt asked."""
    tag = "reason" if rng.random() < 0.25 else rng.choices(list(MIXTURE), MIXTURE.values())[0]
    meta = sample_meta(tag, rng)
    text, told = think(meta, rng)
    return dict(png=scene_for(told, rng), json=dict(prompt=meta["prompt"], reasoning=text))


def reflect_example(rng):
    """A first picture, what the VLM would say of it if it saw all, and a picture that is right: a
    new one, or the first, where that is right already."""
    meta = sample_meta(rng.choices(list(MIXTURE), MIXTURE.values())[0], rng)
    right = rng.random() < RIGHT_SHARE
    first = split_picture(meta, rng, right)
    return {"image.png": first, "refined.png": first if right else split_picture(meta, rng, True),
            "json": dict(prompt=meta["prompt"], critique=critique(first, right))}  # fmt: skip


def write_shard(path, seed, make=example):
    """PER_SHARD examples, which may err, as WebDataset: 000000.png, 000000.json, ..."""
    rng = random.Random(seed)
    with tarfile.open(path, "w") as tar:
        for i in range(PER_SHARD):
            for end, what in make(rng).items():
                data = io.BytesIO()
                if end.endswith("png"):
                    Image.fromarray(render(what)).save(data, "png")
                else:
                    data.write(json.dumps(what).encode())
                info = tarfile.TarInfo(f"{i:06d}.{end}")  # its time is 0: same seed, same bytes
                info.size = data.tell()
                tar.addfile(info, io.BytesIO(data.getvalue()))


def write_shards(name, n, make):
    new = HERE / f"{name}.tmp"  # renamed once whole: nobody trains on half of it
    new.mkdir(exist_ok=True)
    whole = hashlib.sha256()
    for i in tqdm(range(n), name):
        path = new / f"{i:05d}.tar"
        write_shard(path, f"{name} {i}", make)
        whole.update(path.read_bytes())
    shutil.rmtree(HERE / name, ignore_errors=True)
    new.rename(HERE / name)
    print(f"{name}/: {n * PER_SHARD} examples, sha256 {whole.hexdigest()[:16]}")


def make_data():
    """train/, edits/, cot/ and reflect/*.tar (not committed), prompts/*.jsonl (committed, but for
    the two that hold tens of thousands)."""
    write_shards("train", SHARDS, example)
    write_shards("edits", EDIT_SHARDS, edit_example)
    write_shards("cot", COLD_SHARDS, cot_example)
    write_shards("reflect", COLD_SHARDS, reflect_example)
    (HERE / "prompts").mkdir(exist_ok=True)
    prompts = make_prompts()
    for name, rows in (prompts | make_edits() | make_questions(QUESTIONS)
                       | make_reflections(prompts, LOOKS)).items():  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (HERE / "prompts" / f"{name}.jsonl").write_bytes(text)
        print(f"prompts/{name}.jsonl: {len(rows)} rows, {len(set(text.splitlines()))} distinct, "
              f"sha256 {hashlib.sha256(text).hexdigest()[:16]}")  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Training of the parts.  One loop for all of them.


def fit(name, module, loss, steps, lr, muon=0.0, decay=0.995, every=500):
    """Minimise loss(step) over module's parameters; AdamW, or Muon on the blocks' matrices.

    One-cycle cosine with 2% warm-up, gradient clip 1, EMA weights at the end.  Resumes from
    out/prepare-<name>.pt, where it stops every `every` steps. Under torchrun ranks share the batch:
    loss(step) is then each rank's own part."""

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    params = {k: p for k, p in module.named_parameters() if p.requires_grad}
    inner = [p for k, p in params.items() if p.ndim == 2 and re.search("blocks|layers", k)
             and "norm1" not in k and "table" not in k]  # not AdaLN: no map from space to space
    hidden = inner if muon else []
    rest = [p for p in params.values() if not any(p is h for h in hidden)]
    opts = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if hidden:
        opts.append(torch.optim.Muon(hidden, lr=muon, weight_decay=0.01))

    def shape(s):
        return min(1, (s + 1) / (0.02 * steps)) * (0.51 + 0.49 * math.cos(math.pi * s / steps))

    scheds = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in opts]
    ema = {k: p.detach().clone() for k, p in params.items()}
    state, start = Path("out") / f"prepare-{name}.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        module.load_state_dict(saved["module"])
        for o, s in zip(opts + scheds, saved["opts"]):
            o.load_state_dict(s)
        ema, start = saved["ema"], saved["step"]
    state.parent.mkdir(exist_ok=True)
    bar = tqdm(range(start, steps), name, initial=start, total=steps, disable=rank > 0)
    begin, mean = time.time(), 0.0
    for step in bar:
        value = loss(step) / world
        value.backward()
        sum_grads(list(params.values()))
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        for o in opts + scheds:
            o.step()
        for o in opts:
            o.zero_grad(set_to_none=True)
        d = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in params.values()], 1 - d)
        mean += value.item() * world
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{mean / 50:.4f}", refresh=False)
            mean = 0.0
        if (step + 1) % every == 0 and rank == 0:
            saved = dict(module=module.state_dict(), opts=[o.state_dict() for o in opts + scheds],
                         ema=ema, step=step + 1)  # fmt: skip
            torch.save(saved, f"{state}.tmp")
            os.replace(f"{state}.tmp", state)
    for k, p in params.items():
        p.data.copy_(ema[k])
    print(f"{name}: {steps - start} steps in {(time.time() - begin) / 60:.1f} minutes")


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """What F.scaled_dot_product_attention computes, as two products: (B,heads,N,d) -> same."""
    score = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    return (score if attn_mask is None else score + attn_mask).softmax(-1).to(v.dtype) @ v


def to_tensor(images):
    """uint8 (B,64,64,3) numpy -> float (B,3,64,64) in [-1,1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crowd(rng):
    """As many things as fit: an autoencoder learns little from plain ground."""
    scene = []
    for _ in range(8):
        s = rng.choice(SHAPES)
        t = dict(shape=s, color=seen_color(s, rng), size=rng.choice(SIZES))
        scene = place([t], rng, keep=scene, tries=1) or scene
    return scene


def train_vae(steps=6000, batch=16, channels=4, kl=3e-4):
    """A diffusers AutoencoderKL, f4: 64x64x3 -> 16x16xchannels."""
    torch.manual_seed(0)
    rng = random.Random(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=channels,
        norm_num_groups=4, sample_size=SIDE, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss(step):
        # Plain ground too, or GroupNorm blows its silence up into a garish pattern.
        scenes = [[], *(training_pair(rng)[1] if i % 2 else crowd(rng) for i in range(batch - 1))]
        x = to_tensor([render(s) for s in scenes]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            q = vae.encode(x).latent_dist
            y = vae.decode(q.sample()).sample
        mean, logvar = q.mean.float(), q.logvar.float()
        kl_term = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return (y.float() - x).abs().mean() + kl * kl_term

    fit("vae", vae, loss, steps, lr=2e-3)
    x = to_tensor([render(training_pair(rng)[1]) for _ in range(1024)])
    with torch.no_grad():
        z = torch.cat([vae.encode(b).latent_dist.mode() for b in x.split(64)])
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    print("latent mean, std per channel", z.mean((0, 2, 3)), z.std((0, 2, 3)))
    vae.save_pretrained(HERE / "vae")


# ---------------------------------------------------------------------------------------------
# One vocabulary for CLIP and VLM: byte-level BPE, so that any text tokenises.
# The world's words; each becomes one token, so what the models learn about words is undisturbed
# by how words happen to split.

WORDS = f"""a an photo of and as many has sides in the color mixed with sign {' '.join(COLORS)}
{' '.join(SHAPES)} {' '.join(plural(2, s).split()[1] for s in SHAPES)} {' '.join(NUMBERS)} five
left right above below is are there does image images show how which what first second third to by
from it so that both object objects shape shapes add remove move replace recolor change make draw
edit describe generate yes no think then answer reasoning but not instead should be wrong missing
too few says read same other another between plain grey ground background text letter digit matches
match prompt picture better than""".split()
OPENERS = """a an the is are there does how which what describe generate think edit yes no it
A An The Is Are There Does How Which What Describe Generate Think Edit Yes No add remove move
replace recolor change make answer first second zero one two three four user assistant""".split()

# Qwen2.5-VL's format without its default system prompt.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
            "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
VOCAB = 640  # rows of the embeddings: 613 pieces, 8 specials, and room


def tokenizer(end, append_end=False):
    """transformers tokenizer, Qwen2.5's special tokens; `end` is its eos; pads are <|endoftext|>.

    Digits and capitals outside a capitalised word (the characters of signs) stand alone."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    split = Regex(r" ?\p{Lu}?\p{Ll}+|\p{L}|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=sorted(alphabet),
                                  show_progress=False)  # fmt: skip
    bpe.train_from_iterator([" " + w for w in WORDS] + OPENERS + ["</", "><", ' "'], trainer)
    bpe.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIALS])
    if append_end:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, bpe.token_to_id(end))])
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token="<|endoftext|>",
                                  clean_up_tokenization_spaces=False)  # fmt: skip
    assert len(tok) <= VOCAB
    return tok


def train_clip(steps=800, batch=64):
    """open_clip's CLIP, 64 px, patch 8; every second pair of rows is a scene and its edit."""
    # On a CPU, the backward of torch's fused attention takes ten times as long as these products.
    F.scaled_dot_product_attention = plain_attention
    torch.manual_seed(0)
    rng, out = random.Random(1), HERE / "clip"
    tok = tokenizer("<|endoftext|>", append_end=True)
    tok.save_pretrained(out)
    end = tok.eos_token_id
    model = dict(
        embed_dim=128,
        vision_cfg=dict(image_size=SIDE, layers=4, width=128, patch_size=8, head_width=64),
        text_cfg=dict(context_length=32, vocab_size=VOCAB, width=128, heads=4, layers=4,
                      hf_tokenizer_name="shapes", pool_type="eos", eos_id=end, pad_id=end),
    )  # fmt: skip
    clip = CLIP(**model)
    # open_clip starts these at 0.02 and 0.01, for months of training. In minutes the words would
    # remain faint ripples on one large common vector, and the DiT reads the words, token by token.
    torch.nn.init.normal_(clip.token_embedding.weight)
    torch.nn.init.normal_(clip.positional_embedding, std=0.5)

    def erring(meta, scene):
        return scene_for(mistaken(meta, rng), rng) if rng.random() < CAPTION_ERROR else scene

    def loss(step):
        # An edit changes one fact: the two captions are each other's hard negatives. Without
        # them a batch rarely holds both "red circle, blue square" and "blue circle, red square".
        pairs = [training_pair(rng) for _ in range(batch // 2)]
        for e in (sample_edit(rng) for _ in range(batch // 4)):
            pairs += [(e[k + "_meta"], erring(e[k + "_meta"], e[k])) for k in ("source", "target")]
        ids = tok([m["prompt"] for m, _ in pairs], padding="max_length", max_length=32,
                  return_tensors="pt").input_ids  # fmt: skip
        x = to_tensor([render(s) for _, s in pairs])
        with torch.autocast("cpu", torch.bfloat16):
            image, text, scale = clip(x, ids)
        logits = scale.clamp(max=100) * image.float() @ text.float().T
        labels = torch.arange(len(pairs))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    fit("clip", clip, loss, steps, lr=1e-3, muon=1e-2)
    save_file({k: v.bfloat16().contiguous() for k, v in clip.state_dict().items()},
              out / "open_clip_model.safetensors")  # fmt: skip
    preprocess = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="squash")
    (out / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=model, preprocess_cfg=preprocess), indent=2) + "\n")


def train_dit(preset="shapes", steps=12000, batch=128, images=60000):
    """A DiT on the text tower's states (bridge `text`), as SD3.5 was on CLIP and T5, SANA on Gemma.

    torchrun --nproc-per-node 2 shares the batch; captions err, a tenth is withheld for guidance."""

    rank, world, device = setup()
    torch.manual_seed(0)
    cfg = replace(PRESETS[preset], bridge="text")
    dit = MMDiT(**cfg.mmdit) if cfg.mmdit else SanaDiT(**cfg.sana)
    clip = open_clip.create_model(f"local-dir:{HERE / 'clip'}")
    words = open_clip.get_tokenizer(f"local-dir:{HERE / 'clip'}")
    vae = AutoencoderKL.from_pretrained(HERE / "vae").to(memory_format=torch.channels_last)
    model = Unified(cfg, None, words, dit, vae, clip).to(device)
    model.dit.requires_grad_(True)
    rng, captions, latents = random.Random(1000 + rank), [], []
    for _ in tqdm(range(images // 128), "latents", disable=rank > 0):
        metas, scenes = zip(*[training_pair(rng) for _ in range(128)])
        captions += [m["prompt"] for m in metas]
        pixels = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2)
        latents.append(model.to_latents(pixels).half())
    latents, n = torch.cat(latents), batch // world

    def loss(step):
        g = keyed(key(0, step, rank))
        i = torch.randint(len(latents), (n,), generator=g)
        x0, eps = latents[i].float(), torch.randn(n, *latents.shape[1:], generator=g).to(device)
        gone = torch.rand(n, generator=g) < 0.1
        t = torch.sigmoid(torch.randn(n, generator=g) + cfg.t_mean).to(device)
        x_t = torch.lerp(x0, eps, t.view(-1, 1, 1, 1))
        cond = model.encode(["" if d else captions[k] for d, k in zip(gone, i)])
        more = 20 - cond.ctx.shape[1]  # one length, one compiled graph: no caption is longer
        cond = Cond(F.pad(cond.ctx, (0, 0, 0, more)), F.pad(cond.mask, (0, more)), cond.pooled)
        return (model.velocity(x_t, t, [(1.0, cond)]) - (eps - x0)).square().mean()

    forward = model.dit.forward
    model.dit.forward = torch.compile(forward, dynamic=False)  # a quarter sooner; needs a compiler
    fit(f"dit-{preset}", model.dit, loss, steps, lr=2e-3, muon=2e-2)
    model.dit.forward = forward
    if rank == 0:
        out = Path(cfg.dit)
        out.mkdir(exist_ok=True, parents=True)
        save_file({k: v.bfloat16() for k, v in model.dit.state_dict().items()},
                  out / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        kind = "SD3Transformer2DModel" if cfg.mmdit else "SanaTransformer2DModel"
        about = dict(_class_name=kind, **cfg.dit_config)
        (out / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        for guidance in (1.0, 3.0):
            r = bench_shapes(lambda p, s: model.draw(p, s, guidance=guidance), 1, 240)
            print(guidance, {k: round(v, 3) for k, v in r.items()})


# ---------------------------------------------------------------------------------------------
# The VLM: Qwen2.5-VL, small, and what it is asked.

USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TASKS = dict(caption=5, yes_no=4, count=1, compare=4, critique=2, think=3, text=1)  # shares


def vlm_task(rng, task=None):
    """(text, answer, scenes): what stands before the loss begins, what is learned, images."""
    task = task or rng.choices(list(TASKS), TASKS.values())[0]
    meta = sample_meta(rng.choice([*TAGS, "text", "scene"]), rng)
    right = rng.random() < 0.5
    if task == "caption":
        scenes = [scene_for(meta, rng)]
        ask, answer = IMAGE + "Describe the image.", f"a photo of {caption(scenes[0])}"
    elif task == "yes_no":
        what = meta["prompt"] if rng.random() < 0.5 else phrase(meta)
        ask, answer = SHOWS.format(what), "yes" if right else "no"
        scenes = [picture(meta, rng, right)]
        if meta["tag"] in ("single_object", "colors") and rng.random() < 0.5:
            ask = IMAGE + f"Is there {phrase(meta)}?"
    elif task == "count":
        scenes = [scene_for(sample_meta("counting", rng), rng)]
        shape = scenes[0][0]["shape"] if rng.random() < 0.8 else rng.choice(SHAPES)
        ask = IMAGE + f"How many {plural(2, shape).split()[1]} are there?"
        answer = NUMBERS[sum(t["shape"] == shape for t in scenes[0])]
    elif task == "compare":
        scenes = [picture(meta, rng, r) for r in (right, not right)]
        ask, answer = WHICH.format(meta["prompt"]), "first" if right else "second"
    elif task == "critique":
        scenes = [picture(meta, rng, right)]
        answer = critique(scenes[0], right)
        ask = MATCH.format(meta["prompt"])
    else:
        meta = sample_meta("reason", rng) if rng.random() < 0.25 else meta
        ask, answer, scenes = THINK.format(meta["prompt"]), think(meta, rng)[0], []
        if task == "text":  # language modelling of the prompt itself: its states become rich
            head, _ = (USER + DRAW).split(" {}")
            return head, " " + meta["prompt"] + "<|im_end|>", []
    return USER + ask + ASSISTANT, answer + "<|im_end|>", scenes


def padded(rows, fill):
    """Lists of ids -> (B,L), filled up on the right."""
    return pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=fill)


CELL_LABELS = [*SHAPES, *COLORS, *GLYPHS, "centre"]


def cell_labels(scene):
    """(16, 35) of 0 and 1: what touches each of the 4x4 cells that the VLM sees as one token."""
    marks = []  # (x0, y0, x1, y1), labels
    for t in scene:
        x0, y0, x1, y1 = box(t)
        if "text" in t:
            marks += [((x0 + 2 + PITCH * i, y0, x0 + PITCH * (i + 1), y1), [c])
                      for i, c in enumerate(t["text"])]
        else:
            marks.append(((x0, y0, x1, y1), [t["shape"], t["color"]]))
            x, y = (x0 + x1) // 2, (y0 + y1) // 2
            marks.append(((x - 4, y - 4, x + 4, y + 4), ["centre"]))
    cells = [[0.0] * len(CELL_LABELS) for _ in range(16)]
    for (x0, y0, x1, y1), labels in marks:
        for i in range(16):  # touches: by 4 pixels or more both ways
            y, x = 16 * (i // 4), 16 * (i % 4)
            if min(x1, x + 16) - max(x0, x) >= 4 and min(y1, y + 16) - max(y0, y) >= 4:
                for label in labels:
                    cells[i][CELL_LABELS.index(label)] = 1.0
    return cells


def small_vlm(token):
    """A Qwen2.5-VL with random weights; token: name -> id."""
    return Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 6, 6]),
            bos_token_id=None, eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"), initializer_range=0.05),
        vision_config=dict(
            depth=3, hidden_size=128, intermediate_size=256, num_heads=4, patch_size=8,
            window_size=SIDE, fullatt_block_indexes=[0, 1, 2], out_hidden_size=128),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=False,
    ), attn_implementation="eager")  # fmt: skip


def train_vlm(eye_steps=1000, steps=1300, batch=32):
    """transformers' Qwen2.5-VL: hidden 128, 6 layers; 64 px images are 16 tokens.

    First its eye learns to name what lies under each token (as real VLMs start from a trained
    ViT): answers alone, a bit or two per image, would take it hours."""
    torch.manual_seed(0)
    rng, out, tok = random.Random(2), HERE / "vlm", tokenizer("<|im_end|>")
    token = tok.convert_tokens_to_ids
    images = Qwen2VLImageProcessor(
        patch_size=8, size=dict(shortest_edge=SIDE**2, longest_edge=SIDE**2),
        image_mean=[0.5] * 3, image_std=[0.5] * 3)  # fmt: skip
    processor = Qwen2_5_VLProcessor(images, tok, Qwen2VLVideoProcessor(patch_size=8), CHAT)
    vlm = small_vlm(token)
    torch.nn.init.normal_(vlm.get_input_embeddings().weight)  # as in train_clip: words stand out
    eye = vlm.model.visual
    probe = torch.nn.Linear(128, len(CELL_LABELS))  # only the eye's training needs it

    def see(scenes):
        return images(images=[render(s) for s in scenes], return_tensors="pt")

    def eye_loss(step):
        scenes = [training_pair(rng)[1] for _ in range(batch)]
        seen = see(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            cells = eye(seen["pixel_values"], seen["image_grid_thw"]).pooler_output  # (16B,128)
            guess = probe(cells)
        truth = torch.tensor([cell_labels(s) for s in scenes]).flatten(0, 1)
        return F.binary_cross_entropy_with_logits(guess.float(), truth)

    def loss(step):
        rows, scenes = [], []
        for text, answer, shown in (vlm_task(rng) for _ in range(batch)):
            rows.append((tok(text).input_ids, tok(answer).input_ids))
            scenes += shown
        ids = padded([a + b for a, b in rows], tok.pad_token_id)  # (B,L)
        labels = padded([[-100] * len(a) + b for a, b in rows], -100)[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = vlm(input_ids=ids, **see(scenes), use_cache=False,
                         mm_token_type_ids=(ids == vlm.config.image_token_id).int()).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels, reduction="none")
        # Between a mean over tokens, in which long answers drown yes and no, and one over answers.
        return (each.sum(1) / (labels >= 0).sum(1).sqrt()).mean()

    fit("vlm-eye", torch.nn.ModuleList([eye, probe]), eye_loss, eye_steps, lr=2e-3, muon=1e-2)
    eye.requires_grad_(False)
    fit("vlm", vlm, loss, steps, lr=2e-3, muon=1e-2)
    vlm.generation_config = GenerationConfig(
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, max_new_tokens=64)
    vlm.save_pretrained(out, state_dict={k: v.bfloat16() for k, v in vlm.state_dict().items()})
    processor.save_pretrained(out)


def main():
    parts = dict(data=make_data, vae=train_vae, clip=train_clip, dit=train_dit, vlm=train_vlm,
                 sana=partial(train_dit, "shapes-sana", steps=7000))  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail
    parser.add_argument("part", choices=parts)
    parts[parser.parse_args().part]()


if __name__ == "__main__":
    main()
