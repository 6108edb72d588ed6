"""Draw, edit, think or talk: prompts -> a PNG grid with captions, or a GIF of the path from noise
to image; questions -> answers.

    python sample.py "a photo of a red circle left of a blue square" --n 8
    python sample.py "a photo of three stars" --init out/grpo --trajectory --out path.gif
    python sample.py --image in.png --edit "add a red star" --guidance 3
    python sample.py --init out/sft-cot --think "a photo of as many stars as a square has sides"
    python sample.py --init out/sft-reflect --reflect --rounds 3 "a photo of a star and a ring"
    python sample.py --image in.png --answer "Describe the image."
    python sample.py --init out/grpo --export out/parts      # for diffusers, transformers and peft
"""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from common.draw import draw_edits, draw_reflecting, draw_thinking
from common.show import grid
from common.flags import check_seed, command_line, given_parts
from common.presets import PARTS, reference_ways
from common.shards import one_line
from common.read import UNREADABLE, as_text, read_image, to_bucket
from common.run import fail, setup
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
        home = folder / dict(dit="lora", vlm="vlm_lora")[part]
        config.base_model_name_or_path = init if part in model.trained else getattr(model.cfg, part)
        config.save_pretrained(home)
        save_file({f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()},
                  home / "adapter_model.safetensors", {"format": "pt"})
    print(*sorted(f"{f}/" for f in folder.iterdir()), sep="\n")


def read(file):
    try:
        return read_image(file)
    except UNREADABLE as e:
        fail(f"{file} cannot be read as an image: {one_line(e)}")


def main():
    p = command_line(__doc__)
    most = p.add_argument_group("What matters most")
    edits, words = p.add_argument_group("Edits"), p.add_argument_group("Words")
    files, parts = (p.add_argument_group(title) for title in (
        "More files to write", "Weights in place of the checkpoint's"))
    most.add_argument("prompts", nargs="*", help="what to draw, each prompt in quotes")
    most.add_argument("--init", help="checkpoint or folder of a run; with --preset also the folder "
                      "of a diffusers transformer or peft LoRA, or none: '' [data/shapes/sft, to "
                      "edit data/shapes/sft-edit]")
    most.add_argument("--image", action="append", default=[], help="picture to edit, to ask about "
                      "or to reflect on; given again: further references")
    most.add_argument("--edit", action="append", default=[],
                      help="what to change in --image, in quotes")
    most.add_argument("--think", action="store_true",
                      help="reason first, then draw from the prompt and those words")
    most.add_argument("--reflect", action="store_true", help="judge what was drawn, or --image, "
                      "and draw again what is judged wrong")
    most.add_argument("--answer", action="append", default=[],
                      help="a question in quotes, about --image if given")
    most.add_argument("--out", default="sample.png",
                      help="file to write, .png, or with --trajectory .gif [%(default)s]")
    most.add_argument("--n", type=int, default=4, help="images per prompt [%(default)s]")
    most.add_argument("--steps", type=int, default=20,
                      help="ODE steps, one DiT forward each [%(default)s]")
    most.add_argument("--solver", default="", help="of the ODE: euler, or dpm, of second order, "
                      "which wants fewer steps; empty: the preset's")
    most.add_argument("--guidance", type=float, default=1.0, help="weight of the prompt; 1: no "
                      "guidance, else two forwards a step [%(default)s]")
    most.add_argument("--seed", type=int, default=0,
                      help="0 to 2**63 - 1; image i has seed + i [%(default)s]")
    edits.add_argument("--image-guidance", type=float, default=1.0, help="weight of --image; 1: no "
                       "guidance by it, more: closer to it [%(default)s]")
    edits.add_argument("--mask", help="image of the size of --image, white where the edit may "
                       "change it")
    words.add_argument("--limit", type=int, default=64,
                       help="most tokens that a thought, critique or answer may have "
                       "[%(default)s]")
    words.add_argument("--temperature", type=float, default=0.0,
                       help="of drawing words; 0: the likeliest ones [%(default)s]")
    words.add_argument("--rounds", type=int, default=1,
                       help="of --reflect: most looks at a picture; a yes ends them [%(default)s]")
    files.add_argument("--trajectory", action="store_true",
                       help="write the path from noise to image as a GIF")
    files.add_argument("--export", metavar="DIR",
                       help="folder to write the parts to, for other people's pipelines")
    parts.add_argument("--preset", default="",
                       help="what --init is for, if it is no checkpoint of ours")
    for part in PARTS:
        parts.add_argument(f"--{part}", default="", help="folder, or owner/repo[/subfolder] on the "
                           "Hub; empty: the checkpoint's, or its preset's")
    parts.add_argument("-h", "--help", action="help", help="print this text")
    args = p.parse_args()
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
    if args.temperature < 0 or min(args.limit, args.rounds) < 1:
        fail("--temperature is not below 0, --limit and --rounds at least 1")
    if args.mask and not args.edit or args.mask and args.trajectory:
        fail("--mask confines an --edit, and has no --trajectory")
    check_seed(args)
    if args.init is None:
        args.init = "data/shapes/sft-edit" if args.edit else "data/shapes/sft"
    try:
        for texts in (args.prompts, args.edit, args.answer):
            texts[:] = [as_text(text, "a prompt") for text in texts]
    except ValueError as e:
        fail(e)
    images = [read(file) for file in args.image]
    mask = read(args.mask) if args.mask else None
    if mask and mask.size != images[0].size:
        fail(f"--mask {args.mask} has {mask.size[0]} x {mask.size[1]} pixels, --image "
             f"{images[0].size[0]} x {images[0].size[1]}")
    if args.n < 1:
        fail(f"--n {args.n}: at least one image per prompt")
    if args.export and Path(args.export).exists():
        fail(f"--export {args.export} exists: choose another folder")
    wanted = ".gif" if args.trajectory else ".png"
    if not args.answer and Path(args.out).suffix != wanted:
        fail(f"--out {args.out}: this writes a {wanted} file")
    _, _, device = setup()
    model = Unified.load(args.init, args.preset, **given_parts(args))
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
    how = args.steps, args.guidance
    if args.think:
        drawn, words = draw_thinking(model, prompts, seeds, *how, args.limit, args.temperature)
        grid(drawn, [f"{p}\n{text}" for p, text in zip(prompts, words.texts)], args.out,
             columns=args.n)
    elif args.reflect:       # a row of the grid: the first picture, then what each round made of it
        last = model.draw(prompts, seeds, *how) if not images else torch.stack(
            to_bucket(images, model.cfg) * len(prompts))
        rows, texts = [last.cpu()], [prompts]
        for i in range(args.rounds):                         # who says yes will say it again
            last, said = draw_reflecting(model, prompts, last, [s + 2**32 * i for s in seeds], 1,
                                         *how, args.limit)
            rows, texts = [*rows, last.cpu()], [*texts, [text for text, in said]]
        grid(torch.stack(rows, 1).flatten(0, 1), [t for row in zip(*texts) for t in row], args.out,
             columns=len(rows))
    elif not args.trajectory and not args.edit:
        grid(model.draw(prompts, seeds, *how), prompts, args.out, columns=args.n)
    elif not args.trajectory:
        images = draw_edits(model, prompts, rows, seeds, args.steps, *guidance, mask).cpu()
        images = images.unflatten(0, (-1, args.n))                               # (P,n,3,H,W)
        before = refs[0].expand(len(images), 1, -1, -1, -1)                      # in each row first
        grid(torch.cat([before, images], 1).flatten(0, 1),
             [t for edit in args.edit for t in ["source", *[edit] * args.n]], args.out,
             columns=args.n + 1)
    else:
        with torch.no_grad():
            branches = (model.edit_branches(prompts, rows, *guidance, seeds) if args.edit
                        else model.guided(model.encode(prompts), args.guidance))
            noise = model.noise(seeds, tuple(refs[0].shape[1:]) if args.edit else None)
            path = model.sample(branches, args.steps, noise=noise, trajectory=True)
        frames = []
        for z in path:                   # one row of images per prompt
            x = model.to_images(z).unflatten(0, (-1, args.n)).permute(0, 3, 1, 4, 2)  # (P,H,n,W,3)
            frames.append(Image.fromarray(x.flatten(2, 3).flatten(0, 1).cpu().numpy()).resize(
                (2 * x.shape[3] * args.n, 2 * x.shape[1] * len(x)), Image.Resampling.NEAREST))
        hold = [120] * (len(frames) - 1) + [1500]                                # ms per frame
        frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=hold, loop=0)
    print(args.out)


if __name__ == "__main__":
    main()
