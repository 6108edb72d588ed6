"""--cache changes how long a latent takes, and nothing else."""

import json

import pytest
import ranks
import tiny
import torch

from common.cache import cache_latents
from common.presets import Config


@pytest.fixture(scope="module")
def photos(parts):
    return ranks.photos_of(parts)


@pytest.fixture(scope="module")
def cfg(parts):
    return Config(**json.loads((parts / "config.json").read_text()))


@pytest.fixture
def model(cfg):
    return tiny.build(cfg)


def pictures(n, seed=0):
    return torch.stack(tiny.pictures(*[(64, 64)] * n, seed=seed))


def test_each_picture_is_encoded_once(model, cfg, tmp_path, monkeypatch):
    """Here or in another run, in any order and company."""
    a, seen, real = pictures(4), [], model.vae.encode
    plain = model.to_latents(a)
    for m in (model, tiny.build(cfg)):
        monkeypatch.setattr(m.vae, "encode", lambda x, **more: (seen.append(len(x)),
                                                                 real(x, **more))[1])
        cache_latents(m, tmp_path)
        for rows in ([2, 0], [0, 1, 2, 3], [3, 3]):
            assert (m.to_latents(a[rows]) - plain[rows]).abs().max() < 1e-5
    assert seen == [2, 2]
    assert len([*tmp_path.rglob("*.npy")]) == 4


def test_what_is_not_the_same_is_not_taken_for_it(model, cfg, tmp_path):
    """A pixel, a shape with the same bytes, another VAE"""
    cache_latents(model, tmp_path)
    wide = pictures(1).view(1, 3, 32, 128)
    other = pictures(1).clone()
    other[0, 0, 0, 0] ^= 255
    for x in (pictures(1), wide, other):
        model.to_latents(x)
    assert len([*tmp_path.rglob("*.npy")]) == 3
    changed = tiny.build(cfg)
    changed.vae.decoder.conv_in.weight.data += 1
    cache_latents(changed, tmp_path)
    changed.to_latents(pictures(1))
    assert len([*tmp_path.rglob("*.npy")]) == 4
    scaled = tiny.build(cfg)
    scaled.vae.register_to_config(scaling_factor=2 * scaled.vae.config.scaling_factor)
    cache_latents(scaled, tmp_path)
    torch.testing.assert_close(scaled.to_latents(pictures(1)), 2 * model.to_latents(pictures(1)))


@pytest.mark.parametrize("torn", [b"", b"\x93NUMPY", None])
def test_a_torn_file_is_computed_again(model, tmp_path, torn):
    cache_latents(model, tmp_path)
    first = model.to_latents(pictures(1))
    file, = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-5] if torn is None else torn)
    assert torch.equal(model.to_latents(pictures(1)), first)
    assert torch.equal(model.to_latents(pictures(1)), first) and not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_runs_are_equal(photos, tmp_path, name):
    rows = [ranks.play(photos, tmp_path / f"{i}", name, *flags) for i, flags in enumerate(
        [[], ["--cache", tmp_path / "c"], ["--cache", tmp_path / "c"]])]
    for other in rows[1:]:
        for a, b in zip(rows[0], other, strict=True):
            assert all(abs(a[k] - b[k]) < 1e-4 for k in a if k in ("loss", "grad_norm", "score"))
    assert [*(tmp_path / "c").rglob("*.npy")]
