"""What is left of a picture that the model is shown and told to keep: PSNR, SSIM (Wang et al. 2004)
and CLIP's similarity of the two. --bench-dir is a folder of pictures of yours.
"""

from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from benchmarks import About
from benchmarks.drawing import source_of
from benchmarks.tables import metrics
from common.read import PICTURES
from rewards.clip import clip_image

ABOUT = About("{id}.png", "a picture that the model is told to keep", 0, "pictures of yours",
              edits=True)


def items(release):
    files = sorted(f for f in Path(release).rglob("*") if f.suffix.lower().strip(".") in PICTURES)
    return [dict(id=f"{i:05d}", prompt="Keep the image unchanged.", tag="", source=file,
                 manifest=dict(source=str(file.relative_to(release)), crc=crc32(file.read_bytes())))
            for i, file in enumerate(files)]


def ssim(a, b):
    """Of two images (H,W,3) in [0,255] -> the mean over pixels and channels, at most 1"""
    def blur(x):
        return gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)
    a, b, c1, c2 = a.astype(np.float64), b.astype(np.float64), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    return float(((2 * ma * mb + c1) * (2 * cov + c2)
                  / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def measure(shots, images):
    out = []
    for shot, image in zip(shots, images):
        h, w = image.shape[:2]
        source = np.array(ImageOps.fit(source_of(shot.item), (w, h), Image.Resampling.LANCZOS))
        x, y = (torch.from_numpy(i).permute(2, 0, 1) for i in (image, source))
        error = np.mean((image.astype(np.float64) - source) ** 2)
        out.append(dict(psnr=float(20 * np.log10(255 / max(error, 1e-10) ** 0.5)),
                        score=ssim(image, source),
                        clip=clip_image(x[None], [dict(source_image=y)]).item()))
    return out


def table(rows):
    """`score` is SSIM; `psnr` in dB."""
    return metrics(rows, score="score", psnr="psnr", clip="clip")
