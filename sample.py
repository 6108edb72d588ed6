"""Draw: prompts -> a PNG grid with captions, or a GIF of the path from noise to image.

    python sample.py "a photo of a red circle left of a blue square" --n 8
    python sample.py "a photo of three stars" --init out/grpo --trajectory --out path.gif
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from eval import grid
from model import Unified, fail, setup


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompts", nargs="+", help="each in quotes")
    p.add_argument("--init", default="data/shapes/sft", help="checkpoint or run folder")
    p.add_argument("--out", default="sample.png", help="file to write; a .gif with --trajectory")
    p.add_argument("--n", type=int, default=4, help="images per prompt")
    p.add_argument("--steps", type=int, default=20, help="ODE steps, one DiT forward each")
    p.add_argument("--guidance", type=float, default=1.0, help="1 = none; else two forwards a step")
    p.add_argument("--seed", type=int, default=0, help="image i has seed + i")
    p.add_argument("--trajectory", action="store_true", help="write the denoising path as a GIF")
    p.error = fail
    args = p.parse_args()
    wanted = ".gif" if args.trajectory else ".png"
    if Path(args.out).suffix != wanted:
        fail(f"--out {args.out}: this writes a {wanted} file")
    _, _, device = setup()
    model = Unified.load(args.init).to(device)
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
