"""python tests/gpu.py --plan: the table of docs/gpus.md, computed without a GPU.

Memory is what a script's own main plans, up to where it would load weights. Seconds are its TFLOP,
counted on the meta device, at RATE; then gradients go round at LINK, or at LINK_OUT between nodes,
and AdamW reads and writes its 28 bytes a weight at MEMORY. Nothing overlaps; rewards, evaluations
and the reading of pictures cost nothing.
"""

import io
import re
import sys
import tempfile
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import full
import pytest
import torch
import torch.distributed as dist
import transformers.masking_utils as masking_py
from apart import Enough
from checks import counted, photos, planned
from transformers import AutoTokenizer

import grpo
import model as model_py
import pretrain
import sft
from common.flags import parse
from common.memory import learned
from common.presets import PRESETS
from model import Unified

RATE = 200e12        # FLOP/s, of 989 that an H100 has: what the eager kernels were foretold to give
LINK, LINK_OUT = 400e9, 50e9         # bytes/s of a GPU: NVLink; a network card of 400 Gb/s
MEMORY = 2.8e12                      # bytes/s, of 3.35 that an H100 has
WORLDS = (1, 8, 64)
PAGE = Path(__file__).parent.parent / "docs/gpus.md"
TABLE = re.compile(r"(?m)(^(?:\|---){6}\|\n)(?:^\|.*\n)*")
PROMPT = ("a photo of three red circles to the left of one blue square on a white table in a small "
          "room with green walls and a black sign")

# What the papers trained, at their batch, on cards of 80 GB: script, preset, what makes it fit
PLANS = [
    (pretrain, "deepgen", "--micro 8"),
    (sft, "deepgen", "--micro 4"),
    (sft, "deepgen", "--micro 8 --checkpoint --shard"),
    (grpo, "deepgen", "--micro 4 --checkpoint"),
    (grpo, "flow-grpo", "--micro 9"),
    (sft, "unipic2-kontext", "--micro 4"),
    (grpo, "unipic2-kontext", "--micro 8"),
    (pretrain, "unipic2", "--micro 4"),
    (sft, "unipic2", "--micro 4 --checkpoint --shard"),
    (grpo, "unipic2", "--micro 8"),
    (pretrain, "parauni", "--micro 8"),
    (sft, "parauni", "--micro 4 --checkpoint"),
    (grpo, "parauni", "--micro 4 --checkpoint"),
    (pretrain, "openuni", "--micro 16"),
    (sft, "openuni", "--micro 16"),
    (sft, "unirl-zero", "--micro 4 --checkpoint"),
    (grpo, "unirl-zero", "--micro 4 --checkpoint"),
]
STAGE = {pretrain: "stage1", sft: "stage2", grpo: "stage3"}


def as_planned(script, name, flags, world, folder):
    """A script's main up to where it would load weights, as if it ran on `world` GPUs. -> its flags
    as parsed, GiB a GPU, its model on the meta device"""
    models, real, said = [], Unified.from_preset, io.StringIO()

    def from_preset(*given, meta=False, **more):
        if not meta:
            raise Enough
        models.append(real(*given, meta=True, **more))
        return models[-1]
    data = folder / "photos/folder"
    argv = ["--preset", name, "--init", "", "--out", folder / "run", *flags.split()]
    argv += ["--prompts", folder / "prompts.jsonl", "--sft-data", data, "--reward",
             "jpeg_compressibility", "--ldam", ""] if script is grpo else ["--data", data]
    sys.argv = [f"{script.__name__}.py", *map(str, argv)]
    args = parse(script.Args, "", STAGE[script])
    if script is grpo:                   # each rank has whole groups
        sys.argv += ["--B", str(-(-args.B // world) * world)]
        args = parse(script.Args, "", STAGE[script])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(script, "setup", lambda: (0, world, torch.device("cuda")))
        m.setattr(dist, "is_initialized", lambda: True)
        m.setattr(dist, "get_world_size", lambda *group: world)
        m.setenv("LOCAL_WORLD_SIZE", str(min(8, world)))
        m.setattr(Unified, "from_preset", staticmethod(from_preset))
        with redirect_stdout(said), pytest.raises(Enough):
            script.main()
    return args, planned(said.getvalue()), models[0]


def countable(model):
    """A planned model, ready for its operations to be counted. -> it"""
    model = model.float()                # a product of two types is none; FLOP are the same
    model.autocast = nullcontext
    words = AutoTokenizer.from_pretrained(full.TOKENS)
    model.tokenizer = words
    if model.text_encoder is not None:
        words.model_max_length = 77
        model.text_encoder.tokenizers = [words] * 3
    return model


def costs(model):
    """-> TFLOP of one picture's, prompt's or row's parts, where something learns there and back"""
    cfg, x = model.cfg, model.noise([0])
    t = torch.full((1,), 0.5, device="meta")

    def read(grad):
        with torch.set_grad_enabled(grad):
            return model.encode([PROMPT])

    def back(out):
        if out.requires_grad:
            out.square().mean().backward()
    cond = read(False)
    image = torch.zeros(1, 3, cfg.size, cfg.size, dtype=torch.uint8, device="meta")
    with torch.no_grad():
        found = dict(read=counted(lambda: read(False)), encode=counted(
            lambda: model.to_latents(image)), decode=counted(lambda: model.vae.decode(x)),
            row=counted(lambda: model.velocity(x, t, [(1.0, cond)])))
    cond.ctx.requires_grad_(read(True).ctx.requires_grad)
    return found | dict(
        row_back=counted(lambda: back(model.velocity(x, t, [(1.0, cond)]))),
        read_back=counted(lambda: back(read(True).ctx)))


def flow_update(args, cost):
    """-> TFLOP of a step of stages 1 and 2, over all ranks; its images"""
    again = (cost["read"] + cost["row"]) * args.checkpoint
    each = cost["encode"] + cost["read_back"] + cost["row_back"] + again
    return args.batch * each, args.batch


def rl_update(args, cost):
    """-> TFLOP of an update of grpo.py, over all ranks; its images"""
    N, branches = args.B * args.G, 1 + (args.guidance != 1)
    start = (args.window_start + args.window_stop) / 2           # until there a group is one image
    rolled = (args.T - start) * N + start * (args.B if args.shared_noise else N)
    trained = N * (args.trained or args.window)
    again = args.checkpoint + (args.beta > 0)                    # the reference goes there only
    total = branches * (rolled * cost["row"] + trained * (cost["row_back"] + again * cost["row"]))
    total += N * cost["decode"] + args.B * args.updates * cost["read_back"]
    if args.sft:
        total += args.updates * args.sft_batch * (
            cost["encode"] + cost["read"] + cost["row_back"])
    return total, N


def seconds(args, tflop, world, learned):
    """Of an update on `world` GPUs that optimises so many weights"""
    around = 8 * learned * (world - 1) / world / (LINK if world <= 8 else LINK_OUT)
    if getattr(args, "shard", False):    # weights are gathered forward and backward, in a node
        near, parts = min(8, world), -(-args.batch // world // (args.micro or args.batch))
        around += parts * 8 * learned * (near - 1) / near / LINK
    return tflop * 1e12 / world / RATE + getattr(args, "updates", 1) * (
        around + 28 * learned / MEMORY)


def line(script, name, flags, folder):
    """-> a row of the table"""
    speeds, held = [], []
    for world in WORLDS:
        args, gib, model = as_planned(script, name, flags, world, folder)
        if world == WORLDS[0]:
            numbers, cost = learned(model), costs(countable(model))
        tflop, images = (rl_update if script is grpo else flow_update)(args, cost)
        took = seconds(args, tflop, world, numbers)
        speeds.append(images / took)
        held.append(f"{gib:.0f}")
        if world == WORLDS[0]:
            told = "steps" in getattr(PRESETS[name], STAGE[script]) or "mr-grpo" in args.recipe
            steps = args.steps if told else 1000
            run = f"{steps * took / 3600:,.0f}: {steps:,} of {images:,}" + (
                "" if told else ", as an example")
    held = held[:1] if len(set(held)) == 1 else held
    return (f"| `{script.__name__}.py --preset {name} {flags}` | {' / '.join(held)} | "
            + " | ".join(f"{x:,.0f}" if x > 99 else f"{x:.3g}" for x in speeds) + f" | {run} |")


@contextmanager
def without_weights():
    """Inside, all presets are of full size, and a GPU of 80 GB with bf16 seems to be there.
    -> a folder"""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as m:
        folder = Path(folder)
        for name, cfg in full.presets(folder / "parts").items():
            m.setitem(PRESETS, name, cfg)
        photos(folder / "photos", 32, 1)
        full.prompts(folder / "prompts.jsonl", 64)
        m.setattr(sys, "argv", [])
        m.setattr(model_py, "has_bf16", lambda: True)
        m.setattr(torch, "autocast", lambda *kind, **more: nullcontext())    # knows no meta device
        m.setattr(torch.cuda, "get_device_properties",
                  lambda device: SimpleNamespace(total_memory=80e9))
        # transformers would ask for values of the position ids.
        m.setattr(masking_py, "find_packed_sequence_indices", lambda position_ids: None)
        yield folder


def main(which):
    """Prints the rows of the preset `which`, or of all, and then puts them into docs/gpus.md."""
    with without_weights() as folder:
        rows = []
        for plan in PLANS:
            if which in ("all", plan[1]):
                rows.append(line(*plan, folder))
                print(rows[-1], flush=True)
    if which == "all":
        PAGE.write_text(TABLE.sub(lambda found: found[1] + "\n".join(rows) + "\n",
                                  PAGE.read_text(), count=1))
