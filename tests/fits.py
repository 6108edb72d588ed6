"""What fits on one GPU, by the memory plan:

    python tests/fits.py        # writes the table of docs/weights.md

Each row is a command, whose own main goes on here until it would print the plan of its memory: on
shapes alone, without a GPU and without a download, since the sizes of released parts stand here.
tests/test_memory.py holds the rows against fake_gpu.py.
"""

import json
import os
import re
import shlex
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common.memory as memory_py  # noqa: E402
import common.weights as weights_py  # noqa: E402
import cycle_edit  # noqa: E402
import grpo  # noqa: E402
import model as model_py  # noqa: E402
import pretrain  # noqa: E402
import reflect  # noqa: E402
import sft  # noqa: E402

SCRIPTS = {f"{s.__name__}.py": s for s in (pretrain, sft, grpo, cycle_edit, reflect)}


def qwen_vl(width, layers, heads, pairs, wide, words):
    """Qwen2.5-VL's config.json; pairs: heads of keys and values"""
    tied = width == 2048
    text = dict(model_type="qwen2_5_vl_text", vocab_size=words, hidden_size=width,
                intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=pairs, tie_word_embeddings=tied,
                rope_parameters=dict(rope_type="default", rope_theta=1e6,
                                     mrope_section=[16, 24, 24]))
    vision = dict(model_type="qwen2_5_vl", depth=32, hidden_size=1280, intermediate_size=3420,
                  num_heads=16, out_hidden_size=width)
    return dict(model_type="qwen2_5_vl", text_config=text, vision_config=vision,
                image_token_id=151655, tie_word_embeddings=tied, torch_dtype="bfloat16")


def clip_text(width, layers, heads, act):
    return dict(model_type="clip_text_model", hidden_size=width, intermediate_size=4 * width,
                num_hidden_layers=layers, num_attention_heads=heads, projection_dim=width,
                hidden_act=act)


# The configs of released parts, in what their sizes depend on.
INTERNVL_2B = dict(
    model_type="internvl", image_token_id=151667, tie_word_embeddings=False,
    torch_dtype="bfloat16",
    text_config=dict(model_type="qwen2", vocab_size=151674, hidden_size=1536, num_hidden_layers=28,
                     intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
                     tie_word_embeddings=False),
    vision_config=dict(model_type="internvl_vision", hidden_size=1024, intermediate_size=4096,
                       num_hidden_layers=24, num_attention_heads=16))
SD3_VAE = dict(
    _class_name="AutoencoderKL", latent_channels=16, block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2, norm_num_groups=32, sample_size=1024, scaling_factor=1.5305,
    shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
DC_AE = dict(_class_name="AutoencoderDC", latent_channels=32, attention_head_dim=32,
             downsample_block_type="Conv", upsample_block_type="interpolate",
             decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
             encoder_layers_per_block=[2, 2, 2, 3, 3, 3], decoder_layers_per_block=[3] * 6)
for side in ("encoder", "decoder"):
    DC_AE |= {f"{side}_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
              f"{side}_block_out_channels": [128, 256, 512, 512, 1024, 1024],
              f"{side}_qkv_multiscales": [[], [], [], [5], [5], [5]]}
T5_XXL = dict(model_type="t5", d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64,
              vocab_size=32128, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
SD3 = dict(vae=SD3_VAE, text_encoder_3=T5_XXL, text_encoder=clip_text(768, 12, 12, "quick_gelu"),
           text_encoder_2=clip_text(1280, 32, 20, "gelu"))
RELEASED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": qwen_vl(2048, 36, 16, 2, 11008, 151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen_vl(3584, 28, 28, 4, 18944, 152064),
    "OpenGVLab/InternVL3-2B-hf": INTERNVL_2B,
    "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": DC_AE,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers/vae": DC_AE,
    "Skywork/UniPic2-Metaquery-9B/vae": SD3_VAE,
} | {f"{name}/{part}": config for part, config in SD3.items() for name in (
    "stabilityai/stable-diffusion-3.5-medium", "Skywork/UniPic2-SD3.5M-Kontext-2B")}


@contextmanager
def released():
    """Inside, the working directory holds the configs under the names that presets give them."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, config in RELEASED.items():
            file = Path(folder, name, "config.json")
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(config))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


class Planned(Exception):
    """Thrown where a script would print its plan"""


@cache
def planned(command, ranks=1):
    """A script's command line -> what its main gives memory_report: the model on the meta device,
    args, rows ... ranks: as under torchrun on one node"""
    script, *flags = shlex.split(command)
    module, cuda = SCRIPTS[script], torch.device("cuda")

    def stop(*given):
        raise Planned(given)
    with released(), pytest.MonkeyPatch.context() as m:
        Path("own.jsonl").write_text(json.dumps(dict(
            prompt="a photo of a bench", tag="single_object", include=[{"class": "bench",
                                                                        "count": 1}])))
        own = ["--out", "out/run", "--init", ""]
        own += (["--prompts", "own.jsonl", "--sft-data", "own.jsonl"] if module is grpo else
                ["--data", "own.jsonl"])
        m.setattr(sys, "argv", [script, *flags, *own])
        m.setattr(module, "setup", lambda: (0, ranks, cuda))
        m.setattr(model_py, "has_bf16", lambda: True)
        m.setattr(weights_py, "memory_report", stop)
        for name in ("uniform_", "normal_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_"):
            m.setattr(torch.nn.init, name, lambda tensor, *how, **more: tensor)  # has no numbers
        try:
            module.main()
        except Planned as found:
            return found.args[0]
    raise AssertionError(f"{command} printed no plan")


def at(row, n):
    """What a row's main gives memory_report with --micro n"""
    command, ranks = ROWS[row]
    plain, again, _ = command.partition(" --checkpoint")
    model, args, _, reads, copies, device = planned(f"{plain} --micro 1", ranks)
    args = replace(args, micro=n, checkpoint=bool(again))
    return model, args, n, reads if hasattr(args, "window") else n, copies, device


@cache
def plan_of(row, n):
    """-> {phase: bytes}, of all that is held in it"""
    ranks = ROWS[row][1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(memory_py, "ranks_of", lambda args: (ranks, ranks if "--shard" in row else 1))
        held, phases = memory_py.memory_plan(*at(row, n))
    return {name: sum(held.values()) + size for name, size in phases.items()}


# What is to be used of a card: a tenth is left for CUDA, kernels' workspaces and fragments.
CARDS = {"24 GB": 21.6, "48 GB": 40.5, "80 GB": 71.5, "141 GB": 125.5}      # GiB
ROWS = {f"{'torchrun --nproc-per-node 8 ' if ranks > 1 else ''}{command}": (command, ranks)
        for command, ranks in (
    ("grpo.py --preset flow-grpo", 1),
    ("grpo.py --preset flow-grpo --checkpoint", 1),
    ("grpo.py --preset flow-grpo", 8),
    ("grpo.py --preset deepgen --reward geneval --lora-rank 32", 1),
    ("grpo.py --preset deepgen", 1),
    ("pretrain.py --preset deepgen", 1),
    ("pretrain.py --preset deepgen --checkpoint", 1),
    ("pretrain.py --preset openuni", 1),
    ("sft.py --preset deepgen", 1),
    ("sft.py --preset deepgen --checkpoint", 1),
    ("sft.py --preset deepgen --shard", 8),
    ("sft.py --preset deepgen --lora-rank 32 --checkpoint", 1),
    ("sft.py --preset openuni", 1),
    ("sft.py --preset unirl-zero", 1))}  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)                                        # of --micro


def most(row, card):
    """-> the largest --micro that fits, and its GiB; None: none does"""
    sizes = [(n, max(plan_of(row, n).values()) / 2**30) for n in SIZES]
    fits = [(n, gib) for n, gib in sizes if gib <= CARDS[card]]
    return fits[-1] if fits else None


def table():
    lines = ["| with `--micro N` | " + " | ".join(CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
    for row in ROWS:
        cells = [most(row, card) for card in CARDS]
        lines.append(f"| `{row}` | " + " | ".join(
            f"{n} ({gib:.0f})" if n else "-" for n, gib in [cell or (0, 0) for cell in cells])
            + " |")
    return "\n".join(lines)


def written(text):
    """docs/weights.md with the table as it is now"""
    return re.sub(r"\| with `--micro N` \|.*?\|\n\n", lambda _: table() + "\n\n", text, flags=re.S)


if __name__ == "__main__":
    page = ROOT / "docs/weights.md"
    page.write_text(written(page.read_text()))
    print(table())
