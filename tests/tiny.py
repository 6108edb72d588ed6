"""The classroom's parts once more: the real classes with few random weights, made in a second.

    torchrun --nproc-per-node 2 tests/tiny.py FOLDER OUT ...    # grpo.py's main on them; where
    the last flag is --data FOLDER/edits.jsonl, cycle_edit.py's; where it is FOLDER/pool.jsonl, or
    there is a --task, reflect.py's
"""

import json
import os
import random
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))          # where torchrun does not look

import common.presets as presets_py  # noqa: E402
import data.shapes.edits as edits_py  # noqa: E402
import data.shapes.looks as looks_py  # noqa: E402
import data.shapes.talk as talk_py  # noqa: E402
import data.shapes.bench as bench_py  # noqa: E402
import cycle_edit  # noqa: E402
import eval as eval_py  # noqa: E402
import grpo  # noqa: E402
import model  # noqa: E402
import reflect  # noqa: E402
import rewards  # noqa: E402
from data.shapes.prepare import tokenizer  # noqa: E402
from data.shapes.captions import sample_meta  # noqa: E402
from data.shapes.edits import sample_edit  # noqa: E402
from data.shapes.talk import picture  # noqa: E402
from common.checkpoint import save_checkpoint  # noqa: E402
from common.presets import Config  # noqa: E402
from model import MMDiT, Unified  # noqa: E402

MMDIT = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
             attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
             joint_attention_dim=32, pooled_projection_dim=16, pos_embed_max_size=16,
             qk_norm="rms_norm")
# One update of 4 prompts x 4 images, 3 of 6 steps random.
FLAGS = "--B 4 --G 4 --T 6 --window-stop 2 --eval-T 2 --reward blue".split()


def randomise(module):
    """Zero-initialised layers would hide errors: every matrix is random and matters."""
    for p in module.parameters():
        p.data.normal_(0, p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)


def make(folder):
    """Writes vlm/, vae/, dit/, sft/ (a checkpoint), prompts, edits, pool.jsonl. -> their Config"""
    torch.manual_seed(0)
    tok = tokenizer("<|im_end|>")
    tok.save_pretrained(folder / "vlm")
    Qwen2VLImageProcessor(patch_size=8, size=dict(shortest_edge=32**2, longest_edge=64**2)
                          ).save_pretrained(folder / "vlm")
    pad, image = tok.pad_token_id, tok.convert_tokens_to_ids("<|image_pad|>")
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    text = dict(vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                rope_parameters=rope, bos_token_id=None, eos_token_id=tok.eos_token_id,
                pad_token_id=pad, tie_word_embeddings=True, initializer_range=0.2)
    vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=8,
                  window_size=64, fullatt_block_indexes=[0], out_hidden_size=32)
    Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, tie_word_embeddings=True,
    )).save_pretrained(folder / "vlm")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4, layers_per_block=1,
        norm_num_groups=4, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.2, shift_factor=0.1, sample_size=64)
    vae.save_pretrained(folder / "vae")
    dit = MMDiT(**MMDIT)
    randomise(dit)
    (folder / "dit").mkdir()
    save_file(dit.state_dict(), folder / "dit" / "diffusion_pytorch_model.safetensors")
    (folder / "dit" / "config.json").write_text(
        json.dumps(dict(_class_name="SD3Transformer2DModel", **MMDIT)))
    cfg = Config(**{part: str(folder / part) for part in ("vlm", "vae", "dit")},
                 text_encoder=str(ROOT / "data/shapes/clip"), layers=(2, 1), n_query=3, vlm_dim=32,
                 c_dim=32, c_ff=64, c_layers=1, mmdit=MMDIT)
    rows = (ROOT / "data/shapes/prompts/train.jsonl").read_text().splitlines()[:4]
    rows = [json.loads(line) | dict(flat=i == 1) for i, line in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rng = random.Random(0)
    rows = [sample_edit(rng, kind) | dict(flat=kind == "move")
            for kind in ("add", "move", "recolor", "replace")]
    (folder / "edits.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metas = [sample_meta(tag, rng) for tag in ("colors", "position", "counting")]
    rows = [m | dict(flat=i == 1, right=picture(m, rng, True), wrong=picture(m, rng, False))
            for i, m in enumerate(metas)]
    (folder / "pool.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    full = build(cfg)
    torch.manual_seed(0)                                 # whatever from_preset drew before
    randomise(full.bridge)
    trained = {k: p for k, p in full.state_dict().items() if k.startswith(("bridge", "dit"))}
    save_checkpoint(folder / "sft", trained, cfg, 0)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    return cfg


def build(cfg, bf16=False, init=None):
    with pytest.MonkeyPatch.context() as m:
        m.setitem(presets_py.PRESETS, "shapes", cfg)
        m.setattr(model, "has_bf16", lambda: bf16)
        return Unified.from_preset("shapes", init)


def blue(images, rows):
    """How many of its group an image beats in blueness: no pixel's rounding changes that; NaN of
    one in a group of its own. Rows marked `flat` get 1/3 whatever is drawn."""
    b, groups = images[:, 2].float().mean((1, 2)), {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", f"image {i}"), []).append(i)
    r = torch.zeros(len(rows))
    for mine in groups.values():
        r[mine] = b[mine].argsort().argsort() / (len(mine) - 1)
    return torch.where(torch.tensor([row["flat"] for row in rows]), torch.tensor(1 / 3), r)


def pictures(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8) for h, w in sizes]


def letters(tokenizer, text):
    """Tokens of a text by the parts of its tokenizer, which know of no special token."""
    backend = tokenizer.backend_tokenizer
    words = backend.pre_tokenizer.pre_tokenize_str(text)
    return [t.id for word, _ in words for t in backend.model.tokenize(word)]


def same(a, b, tol=2e-5):
    assert b.abs().max() > 0.1, "compares nothing but zeros"
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def apart(a, b):
    return a.shape != b.shape or (a - b).abs().max() > 1e-3


@contextmanager
def killed_at(module, name, n):
    """Inside, the user interrupts when module.name is called for the n-th time, n from 0."""
    calls, real = iter(range(n)), getattr(module, name)

    def killed(*inputs):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*inputs)
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(module, name, killed)
        yield


def as_recipe(Args, flags, file):
    """Of flags those that are settings of recipes are written into `file`, a .json that goes on
    from the --recipe among the flags, else from the preset's. -> the other flags, and --recipe"""
    paper = {f.name: f.type for f in fields(Args) if f.metadata.get("setting")}
    own, rest, given = {}, [], list(map(str, flags))
    while given:
        flag = given.pop(0)
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if not flag.startswith("--") or name not in paper:
            rest.append(flag)
        elif paper[name] is bool:
            own[name] = not flag.startswith("--no-")
        else:
            own[name] = paper[name](given.pop(0))
    if not own:
        return rest
    named = dict(zip(rest, rest[1:]))                        # of a flag given twice the last counts
    preset = presets_py.PRESETS.get(named.get("--preset", "shapes"))
    recipe = ((preset and preset.stage3) or {}).get("recipe", Args.recipe)
    file.write_text(json.dumps(dict(recipe=named.get("--recipe", recipe)) | own))
    return [*rest, "--recipe", str(file)]


def play(folder, out, *flags, bf16=False, main=grpo.main):
    """A script's own main on the tiny model, in this process. -> rows of its log"""
    cfg = Config(**json.loads((folder / "config.json").read_text()))
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    script = sys.modules[main.__module__]
    recipe = out.parent / f"{out.name}-recipe{os.environ.get('RANK', '')}.json"
    with pytest.MonkeyPatch.context() as m:
        m.setitem(presets_py.PRESETS, "shapes", cfg)
        m.setattr(model, "has_bf16", lambda: bf16)
        m.setitem(rewards.REWARDS, "blue", blue)
        for file in (eval_py, looks_py, script):                       # one image per tag is enough
            m.setattr(file, "bench_shapes", lambda draw, n=4, limit=None, png=None: (
                bench_py.bench_shapes(draw, 1, 6, png)), raising=False)
        m.setattr(cycle_edit, "bench_edit",
                  lambda edit, n=1, limit=None, png=None: edits_py.bench_edit(edit, 1, 5, png))
        m.setattr(reflect, "bench_think", lambda draw, think, n=4, limit=None, png=None:
                  talk_py.bench_think(draw, think, 1, 4, png))
        m.setattr(reflect, "bench_answer", lambda answer, name, n=1, limit=None, png=None:
                  talk_py.bench_answer(answer, name, 1, 8, png))
        m.setattr(reflect, "bench_reflect",
                  lambda do, n=1, limit=None, png=None: talk_py.bench_reflect(do, 1, 12, png))
        first = ["--data", folder / "prompts.jsonl"] if "--task" in flags else [
            "--limit", 8, "--data", folder / "pool.jsonl"]
        rl = {grpo.main: [*FLAGS, "--prompts", folder / "prompts.jsonl"],
              cycle_edit.main: [*FLAGS, "--data", folder / "edits.jsonl"],
              reflect.main: [*FLAGS, *first]}.get(main, [])
        init = ["--init", folder / "sft"] if hasattr(script.Args, "init") else []
        argv = [*init, "--out", out, *rl, *flags]
        m.setattr(sys, "argv", ["x.py", *as_recipe(script.Args, argv, recipe)])
        try:
            main()
        finally:
            recipe.unlink(missing_ok=True)
            [signal.signal(s, handler) for s, handler in handlers.items()]
    return [json.loads(line) for line in open(out / "log.jsonl")]


if __name__ == "__main__":
    play(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
