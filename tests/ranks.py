"""All five training scripts on the tiny model; not a test by itself:

    torchrun --nproc-per-node 2 tests/ranks.py TINY OUT                # all of them
    torchrun --nproc-per-node 2 tests/ranks.py TINY OUT sft --shard    # one, with flags

OUT/<script>/rank<r>.safetensors is what a rank's model holds in the end, if all were run."""

import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_cli import folder_of, photo

import common.run as run_py
import common.weights as weights_py
import cycle_edit
import grpo
import pretrain
import reflect
import sft

THREE = "--steps 3 --eval-every 3".split()
FLOW = [*THREE, "--batch", 4]
MAINS = {          # --init "": the bridge is drawn, not loaded
    "pretrain": (pretrain.main, lambda f: [*FLOW, "--init", "", "--data", f / "photos"]),
    "sft": (sft.main, lambda f: [*FLOW, "--init", "", "--data", f / "photos"]),
    "reward": (sft.main, lambda f: [*FLOW, "--task", "reward", "--vlm", "data/shapes/vlm"]),
    "grpo": (grpo.main, lambda f: [*THREE, "--init", "", "--train", "both"]),
    "cycle_edit": (cycle_edit.main, lambda f: [*THREE, "--init", "", "--train", "both"]),
    "reflect": (reflect.main, lambda f: [*THREE, "--init", "", "--lr", 1e-3]),
}


def photos_of(parts):
    """The tiny model's folder, with pictures to learn from in photos/ -> it"""
    folder = parts / "photos"
    if not folder.exists():
        folder.mkdir()
        names = [f"{i}.png" for i in range(6)]
        for i, name in enumerate(names):
            photo(folder / name, 64, 64, i)
        folder_of(folder, names)
    return parts


def play(folder, out, name, *flags):
    main, own = MAINS[name]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sft, "HELD_OUT", 8)
        return tiny.play(folder, out, *own(folder), *flags, main=main)


def main(folder, out):
    rank, _, _ = run_py.setup()
    torch.manual_seed(rank)                        # as different as two processes may be
    built, start = [], run_py.same_start

    def remember(m):
        built.append(m)
        return start(m)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(weights_py, "same_start", remember)   # start_model's
        m.setattr(sft, "same_start", remember)
        for name in MAINS:
            play(folder, out / name, name)
            save_file({k: p.detach().clone() for k, p in built[-1].named_parameters()},
                      out / name / f"rank{rank}.safetensors")


if __name__ == "__main__":
    folder, out, *one = sys.argv[1:]
    if one:
        play(Path(folder), Path(out), *one)
    else:
        main(Path(folder), Path(out))
