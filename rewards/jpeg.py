"""Size as a JPEG: the rewards that show what hacking is (DDPO, Flow-GRPO, UniRL-Zero fig. 2)."""

import torch

from common.read import arrays, jpeg_kb


def jpeg_compressibility(images, rows):
    """-kB/500 (Flow-GRPO; DDPO's is -kB): smooth images win. Grey 512x512 -0.0094, noise -0.62."""
    return torch.tensor([-jpeg_kb(x) / 500 for x in arrays(images)])


def jpeg_incompressibility(images, rows):
    """kB (DDPO, Flow-GRPO, UniRL-Zero): detail wins. Grey 512x512 4.7, noise 310."""
    return torch.tensor([jpeg_kb(x) for x in arrays(images)])
