"""--cache: latents of pictures, computed once and then read from a disk."""

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from common.run import writing
from common.weights import crc


def cache_latents(model, folder):
    """model.to_latents reads what it has once encoded, in any run of this VAE, whatever file or
    crop the picture was: a latent's name is a digest of the pixels. A file that is torn is computed
    again. folder: empty, nothing is kept."""
    if not folder:
        return
    vae = crc({k: v.cpu() for k, v in model.vae.state_dict().items()} | dict(
        scale=torch.tensor([model.vae.config.scaling_factor, model.vae_shift])))
    folder, encode = Path(folder) / f"vae-{vae:08x}", model.to_latents
    folder.mkdir(parents=True, exist_ok=True)            # check_out has looked

    def to_latents(images):
        files = [folder / name[:2] / f"{name[2:]}.npy" for name in map(digest, images)]
        known = [read(file) for file in files]
        new = [i for i, latent in enumerate(known) if latent is None]
        for i, latent in zip(new, encode(images[new]).cpu() if new else ()):
            known[i] = latent
            write(files[i], latent)
        return torch.stack(known).to(model.device)
    model.to_latents = to_latents


def digest(image):
    """-> a name of a picture uint8 (3,H,W) by its pixels and their shape"""
    pixels = image.contiguous().cpu().numpy()
    return blake2b(pixels.data, digest_size=16, key=str(pixels.shape).encode()).hexdigest()


def read(file):
    try:
        return torch.from_numpy(np.load(file))
    except (OSError, ValueError, EOFError):              # there is none, or half of one
        return None


def write(file, latent):
    fresh = file.with_suffix(f".{os.urandom(8).hex()}.tmp")     # several runs may write the same
    with writing(file.parent):
        file.parent.mkdir(exist_ok=True)
        try:
            with fresh.open("wb") as handle:
                np.save(handle, latent.numpy())
            os.replace(fresh, file)
        finally:
            fresh.unlink(missing_ok=True)
