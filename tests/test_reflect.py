"""The real reflect.py, on tiny real parts: words and steps both start at ratio 1 and learn from one
advantage, and a critique that says nothing of use costs its reward and nothing else."""

import json
import random

import tiny
import torch
from safetensors.torch import load_file

from data.shapes.prepare import picture, render, sample_meta
from model import Config, save_checkpoint


def teach(parts, folder):
    """A folder of parts whose language model has learned to say yes, no and why, or nonsense,
    about as often, whatever it sees."""
    folder.mkdir()
    for part in ("vae", "dit", "pool.jsonl"):
        (folder / part).symlink_to(parts / part)
    about = json.loads((parts / "config.json").read_text())
    model = tiny.build(Config(**about))
    lm, rng = model.vlm, random.Random(0)
    opt = torch.optim.Adam(lm.model.language_model.parameters(), 1e-2)
    lm.requires_grad_(True)
    for _ in range(60):
        metas = [sample_meta("colors", rng) for _ in range(16)]
        images = [[torch.from_numpy(render(picture(m, rng, True))).permute(2, 0, 1)] for m in metas]
        words = model.spell([rng.choice(["yes", "no, red", "no, the image shows a star", "star"])
                             for _ in metas])
        logp = model.text_logp([m["prompt"] for m in metas], images, words, "judge")
        (-logp.sum() / words.mask.sum()).backward()
        opt.step()
        opt.zero_grad()
    lm.save_pretrained(folder / "vlm")
    for file in (parts / "vlm").iterdir():
        if not (folder / "vlm" / file.name).exists():
            (folder / "vlm" / file.name).symlink_to(file)
    cfg = Config(**about | dict(vlm=str(folder / "vlm")))
    save_checkpoint(folder / "sft", load_file(parts / "sft/model.safetensors"), cfg, 0)
    (folder / "config.json").write_text(json.dumps(vars(cfg)))
    return folder
