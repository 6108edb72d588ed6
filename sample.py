"""Draw: prompts -> a PNG grid with captions, or a GIF of the path from noise to image.

    python sample.py "a photo of a red circle left of a blue square" --n 8
    python sample.py "a photo of three stars" --init out/grpo --trajectory --out path.gif
    python sample.py --init out/grpo --export out/parts      # for diffusers, transformers and peft
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from eval import grid
from model import PARTS, Unified, fail, fetch, given_parts, setup


def export(model, folder, init):
    """transformer/ loads in diffusers, vlm/ in transformers, both with their LoRA merged; a LoRA
    that is not a share of other changes also stands alone, in lora/ (vlm_lora/) for peft."""
    dit = model.dit
    (folder / "transformer").mkdir(parents=True)
    name = dict(MMDiT="SD3Transformer2DModel", SanaDiT="SanaTransformer2DModel")[type(dit).__name__]
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


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompts", nargs="*", help="each in quotes")
    p.add_argument("--init", default="data/shapes/sft", help="checkpoint or run folder; with "
                   "--preset also a diffusers transformer's or a peft LoRA's folder, or none: ''")
    p.add_argument("--preset", default="", help="what --init is for, if no checkpoint of ours")
    for part in PARTS:
        p.add_argument(f"--{part}", default="", help="folder, or owner/repo[/subfolder] on the Hub")
    p.add_argument("--export", metavar="DIR", help="write the parts for other people's pipelines")
    p.add_argument("--out", default="sample.png", help="file to write; a .gif with --trajectory")
    p.add_argument("--n", type=int, default=4, help="images per prompt")
    p.add_argument("--steps", type=int, default=20, help="ODE steps, one DiT forward each")
    p.add_argument("--guidance", type=float, default=1.0, help="1 = none; else two forwards a step")
    p.add_argument("--seed", type=int, default=0, help="image i has seed + i")
    p.add_argument("--trajectory", action="store_true", help="write the denoising path as a GIF")
    p.error = fail
    args = p.parse_args()
    if not args.prompts and not args.export:
        fail("the following arguments are required: prompts")
    if args.n < 1:
        fail(f"--n {args.n}: at least one image per prompt")
    if args.export and Path(args.export).exists():
        fail(f"--export {args.export} exists: choose another folder")
    wanted = ".gif" if args.trajectory else ".png"
    if Path(args.out).suffix != wanted:
        fail(f"--out {args.out}: this writes a {wanted} file")
    _, _, device = setup()
    model = Unified.load(args.init, args.preset, **given_parts(args))
    if args.export:
        export(model, Path(args.export), args.init)
        if not args.prompts:
            return
    model.slim(device).to(device)
    prompts = [t for t in args.prompts for _ in range(args.n)]
    seeds = [args.seed + i for i in range(args.n)] * len(args.prompts)
    if not args.trajectory:
        images = model.draw(prompts, seeds, args.steps, args.guidance)
        grid(images, prompts, args.out, columns=args.n)
    else:
        with torch.no_grad():
            branches = model.guided(model.encode(prompts), args.guidance)
            path = model.sample(branches, args.steps, noise=model.noise(seeds), trajectory=True)
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
