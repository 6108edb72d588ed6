"""Draw, edit, think or talk: prompts -> a PNG grid with captions, or a GIF of the path from noise
to image; questions -> answers.

    python sample.py "a photo of a red circle left of a blue square" --n 8
    python sample.py "a photo of three stars" --init out/grpo --trajectory --out path.gif
    python sample.py "a photo of two rings" --size 96x64
    python sample.py --image in.png --edit "add a red star" --guidance 3
    python sample.py --init out/sft-cot --think "a photo of as many stars as a square has sides"
    python sample.py --init out/sft-reflect --reflect --rounds 3 "a photo of a star and a ring"
    python sample.py --image in.png --answer "Describe the image."
    python sample.py --init out/grpo --export out/parts      # for diffusers, transformers and peft
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
from PIL import Image
from safetensors.torch import save_file

from common.checkpoint import read_step
from common.draw import NEXT_ROUND, draw_edits, draw_reflecting, draw_thinking
from common.show import grid
from common.flags import FILE, HUB, can_hold, flag, given_parts, parse, read_flag
from common.lora import write_lora
from common.presets import PRESETS, SOLVERS, reference_ways
from common.read import UNREADABLE, as_text, read_image, to_bucket
from common.run import fail, one_line, setup
from common.weights import fetch, slim
from model import Unified


def export(model, folder, init):
    """transformer/ loads in diffusers, vlm/ in transformers, both with their LoRA merged; a LoRA
    that is not a share of other changes also stands alone, in lora/ (vlm_lora/) for peft."""
    dit = model.dit
    (folder / "transformer").mkdir(parents=True)
    names = dict(MMDiT="SD3Transformer2DModel", SanaDiT="SanaTransformer2DModel")
    name = names.get(type(dit).__name__, type(dit).__mro__[1].__name__)      # a fork's: its base
    if dit.config.get("ref") == "add":
        print("transformer/ has no references: diffusers' SANA knows none")
    config = {k: v for k, v in dit.config.items() if k != "ref"}
    (folder / "transformer/config.json").write_text(
        json.dumps(dict(_class_name=name, **config), indent=1))
    save_file({k: v.contiguous() for k, v in dit.state_dict().items() if not k.startswith("ref_")},
              folder / "transformer/diffusion_pytorch_model.safetensors", {"format": "pt"})
    if model.vlm is not None:
        (folder / "vlm").mkdir()
        for f in fetch(model.cfg.vlm).iterdir():               # tokenizer, processor, templates
            if f.suffix in (".json", ".txt", ".jinja", ".model") and ".index." not in f.name:
                shutil.copy(f, folder / "vlm")
        model.vlm.save_pretrained(folder / "vlm")
    for part, (config, tensors) in model.adapters.items():
        write_lora(folder / dict(dit="lora", vlm="vlm_lora")[part], config, tensors,
                   init if part in model.trained else getattr(model.cfg, part), part == "dit")
    print(*sorted(f"{f}/" for f in folder.iterdir()), sep="\n")


def read(file):
    try:
        return read_image(file)
    except UNREADABLE as e:
        fail(f"{file} cannot be read as an image: {one_line(e)}")


def sides_of(text):
    """ "1024x768" or "512" -> [width, height]; ValueError"""
    given = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text)
    if not given:
        raise ValueError("must be WIDTHxHEIGHT or a number of pixels, such as 512")
    return [int(side or given[1]) for side in given.groups()]


@dataclass
class Args:
    prompts: tuple = flag((), "what to draw, each prompt in quotes", group="What matters most",
                          positional=True)
    init: str = flag(None, "checkpoint or folder of a run; with --preset also the folder of a "
                     "diffusers transformer or peft LoRA, or none: '' [data/shapes/sft, to edit "
                     "data/shapes/sft-edit]", HUB)
    image: tuple = flag((), "picture to edit, to ask about or to reflect on; given again: further "
                        "references", FILE)
    edit: tuple = flag((), "what to change in --image, in quotes")
    think: bool = flag(False, "reason first, then draw from the prompt and those words")
    reflect: bool = flag(False, "judge what was drawn, or --image, and draw again what is judged "
                         "wrong")
    answer: tuple = flag((), "a question in quotes, about --image if given")
    out: str = flag("sample.png", "file to write, .png, or with --trajectory .gif")
    n: int = flag(4, "images per prompt", "[1, 1000]")
    size: str = flag("", "pixels, WIDTHxHEIGHT or a number, of what is drawn from prompts; empty: "
                     "the preset's", sides_of)
    steps: int = flag(20, "ODE steps, one DiT forward each", "[1, 1000]")
    solver: str = flag("", "of the ODE: {}, the last of second order, which wants fewer steps; "
                       "empty: the preset's", SOLVERS)
    guidance: float = flag(1.0, "weight of the prompt; 1: no guidance, else two forwards a step",
                           "[0, 100]")
    seed: int = flag(0, "image i has seed + i", "[0, 2**63)")

    image_guidance: float = flag(1.0, "weight of --image; 1: no guidance by it, more: closer to it",
                                 "[0, 100]", group="Edits")
    mask: str = flag("", "image of the size of --image, white where the edit may change it", FILE)

    limit: int = flag(64, "most tokens that a thought, critique or answer may have", "[1, 10000]",
                      group="Words")
    temperature: float = flag(0.0, "of drawing words, but for --reflect's; 0: the likeliest ones",
                              "0 or [0.01, 100]")
    rounds: int = flag(1, "of --reflect: most looks at a picture; a yes ends them", "[1, 100]")

    trajectory: bool = flag(False, "write the path from noise to image as a GIF",
                            group="More files to write")
    export: str = flag("", "folder to write the parts to, for other people's pipelines")

    preset: str = flag("", "what --init is for, if it is no checkpoint of ours", PRESETS,
                       group="Weights in place of the checkpoint's")
    vlm: str = flag("", "folder, or owner/repo on the Hub; empty: the checkpoint's, or its "
                    "preset's", HUB)
    dit: str = flag("", "as --vlm, and /subfolder", HUB)
    vae: str = flag("", "as --dit", HUB)


def size_of(text, cfg, dit):
    """--size: pixels, "width x height" or one side of a square -> (height, width) that the DiT can
    draw; rounded, which it says, to the multiples that patches and VAE want."""
    sides = sides_of(text)
    step = cfg.vae_factor * dit.patch_size
    # SANA has no table of places; what is far from what it was trained on fills the memory in vain.
    table = cfg.dit_config.get("pos_embed_max_size")
    most = table * step if table else 8 * cfg.size // step * step
    near = [min(most, max(step, round(side / step) * step)) for side in sides]
    if min(sides) < step or max(sides) > most:
        fail(f"--size {text}: preset {cfg.preset!r} draws sides of {step} to {most} pixels; "
             f"nearest is {near[0]}x{near[1]}")
    if near != sides:
        print(f"--size {text} is rounded to {near[0]}x{near[1]}, multiples of {step} pixels")
    return near[1], near[0]


def can_write(file, ending):
    """ValueError and OSError where a file cannot be written; nothing is left behind."""
    if file.suffix != ending or file.is_dir():
        raise ValueError(f"this writes a {ending} file")
    TemporaryFile(dir=file.parent).close()


def check(args):
    """Every error that a user can make, before anything is loaded or written. -> images, mask"""
    if not args.prompts and not args.export and not args.edit and not args.answer:
        fail("the following arguments are required: prompts")
    if args.edit and (args.prompts or not args.image) or (
            args.image and not (args.edit or args.answer or args.reflect)):
        fail("an edit is an --image and an --edit; prompts are drawn without")
    talks = bool(args.answer) + args.think + args.reflect
    if talks + bool(args.edit) > 1 or talks and args.trajectory:
        fail("--edit, --answer, --think and --reflect are one at a time; the last three have no "
             "--trajectory")
    if args.answer and args.prompts or args.reflect and len(args.image) > 1:
        fail("--answer answers without drawing, and --reflect looks at one --image")
    if (args.think or args.reflect) and not args.prompts:
        fail("the following arguments are required: prompts")
    if args.mask and not args.edit or args.mask and args.trajectory:
        fail("--mask confines an --edit, and has no --trajectory")
    if args.size and (args.image or args.answer):
        fail("--size is of what is drawn from prompts: an --image keeps its own")
    if args.init == "" and not args.preset:
        fail("--init '' draws from the weights of --preset, which is missing")
    try:
        for name in ("prompts", "edit", "answer"):
            setattr(args, name, tuple(as_text(t, "a prompt") for t in getattr(args, name)))
    except ValueError as e:
        fail(e)
    images = [read(file) for file in args.image]
    mask = read(args.mask) if args.mask else None
    if mask and mask.size != images[0].size:
        fail(f"--mask {args.mask} has {mask.size[0]} x {mask.size[1]} pixels, --image "
             f"{images[0].size[0]} x {images[0].size[1]}")
    if args.export:
        if os.path.lexists(args.export):
            fail(f"--export {args.export} exists: choose another folder")
        read_flag(args, "export", can_hold)
    if not args.answer:
        ending = ".gif" if args.trajectory else ".png"
        read_flag(args, "out", lambda out: can_write(Path(out), ending))
    return images, mask


def main():
    args = parse(Args, __doc__)
    images, mask = check(args)
    if args.init is None:
        args.init = "data/shapes/sft-edit" if args.edit else "data/shapes/sft"
    _, _, device = setup()
    model = Unified.load(args.init, args.preset, **given_parts(args))
    size = (size_of(args.size, model.cfg, model.dit) if args.size else
            (model.cfg.size, model.cfg.size))
    if args.export:
        export(model, Path(args.export), args.init)
        if not args.prompts and not args.edit and not args.answer:
            return
    if args.edit or args.reflect:
        reference_ways(model.cfg, model.dit)
    if model.vlm is None and (args.answer or args.think or args.reflect):
        fail(f"preset {model.cfg.preset!r} has no language model: it cannot answer, think or judge")
    slim(model, device).to(device)
    prompts = [t for t in args.prompts + args.edit for _ in range(args.n)]
    seeds = [(args.seed + i) % 2**63 for i in range(args.n)] * (len(prompts) // args.n)
    if args.answer:
        seen = [[to_bucket([image], model.cfg)[0] for image in images]]
        said = model.generate(args.answer, seen * len(args.answer) if images else None, "answer",
                              args.limit, args.temperature, keys=range(args.seed, args.seed + len(
                                  args.answer)))
        for question, answer in zip(args.answer, said.texts):
            print(f"{question}\n{answer}\n")
        return
    if args.edit:      # the first image decides the size of what is drawn, as a target would
        *refs, _ = to_bucket([*images, images[0]], model.cfg)
        rows, guidance = [refs] * len(prompts), (args.guidance, args.image_guidance)
        if mask:
            mask = [to_bucket([mask], model.cfg)[0].float().mean(0) > 127] * len(prompts)
        size = tuple(refs[0].shape[1:])
    elif images:
        images = to_bucket(images, model.cfg)
        size = tuple(images[0].shape[1:])
    how = args.steps, args.guidance
    # What a file says of itself: all that draws it again.
    about = {k: v for k, v in vars(args).items() if k not in ("prompts", "edit", "out", "export")}
    about |= dict(preset=model.cfg.preset, solver=model.cfg.solver, size=f"{size[1]}x{size[0]}",
                  step=read_step(args.init) if args.init else None,
                  pictures=[dict(prompt=p, seed=s) for p, s in zip(prompts, seeds)])
    if args.think:
        drawn, words = draw_thinking(model, prompts, seeds, *how, args.limit, args.temperature,
                                     size=size)
        for picture, text in zip(about["pictures"], words.texts):
            picture["thought"] = text
        grid(drawn, [f"{p}\n{text}" for p, text in zip(prompts, words.texts)], args.out,
             columns=args.n, about=about)
    elif args.reflect:       # a row of the grid: the first picture, then what each round made of it
        last = (torch.stack(images * len(prompts)) if images else
                model.draw(prompts, seeds, *how, size))
        rows, texts = [last.cpu()], [prompts]
        for i in range(args.rounds):                         # who says yes will say it again
            last, said = draw_reflecting(model, prompts, last, [s + NEXT_ROUND * i for s in seeds],
                                         1, *how, args.limit)
            rows, texts = [*rows, last.cpu()], [*texts, [text for text, in said]]
        for picture, (_, *said) in zip(about["pictures"], zip(*texts)):
            picture["critiques"] = said
        grid(torch.stack(rows, 1).flatten(0, 1), [t for row in zip(*texts) for t in row], args.out,
             columns=len(rows), about=about)
    elif not args.trajectory and not args.edit:
        grid(model.draw(prompts, seeds, *how, size), prompts, args.out, columns=args.n, about=about)
    elif not args.trajectory:
        images = draw_edits(model, prompts, rows, seeds, args.steps, *guidance, mask).cpu()
        images = images.unflatten(0, (-1, args.n))                               # (P,n,3,H,W)
        before = refs[0].expand(len(images), 1, -1, -1, -1)                      # in each row first
        grid(torch.cat([before, images], 1).flatten(0, 1),
             [t for edit in args.edit for t in ["source", *[edit] * args.n]], args.out,
             columns=args.n + 1, about=about)
    else:
        with torch.no_grad():
            branches = (model.edit_branches(prompts, rows, *guidance, seeds) if args.edit
                        else model.guided(model.encode(prompts), args.guidance))
            noise = model.noise(seeds, size)
            path = model.sample(branches, args.steps, noise=noise, trajectory=True)
        frames = []
        for z in path:                   # one row of images per prompt
            x = model.to_images(z).unflatten(0, (-1, args.n)).permute(0, 3, 1, 4, 2)  # (P,H,n,W,3)
            frames.append(Image.fromarray(x.flatten(2, 3).flatten(0, 1).cpu().numpy()).resize(
                (2 * x.shape[3] * args.n, 2 * x.shape[1] * len(x)), Image.Resampling.NEAREST))
        hold = [120] * (len(frames) - 1) + [1500]                                # ms per frame
        frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=hold, loop=0,
                       comment=json.dumps(about).encode())
    print(args.out)


if __name__ == "__main__":
    main()
