"""Editing: what a reference does to condition, velocity and picture; the data; the mixture."""

import io
import json
import struct
import sys
import tarfile
import zlib
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import collect, complaint
from tiny import apart, pictures, same

import model as ours
import pretrain
import sample
import data.shapes.looks as looks_py
import sft
from common.checkpoint import save_checkpoint
from common.draw import draw_edits
from common.presets import PRESETS, Config, reference_ways
from common.data import all_positions, mixture
from common.read import bucket, read_image, to_bucket
from common.run import key
from common.sana import SanaDiT
from common.weights import learn
from model import build_dit, sigmas

TEXTS = ["add a red circle", "remove the blue star", "move the ring above the heart"]
SANA = dict(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, sample_size=16,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, mlp_ratio=2.0, patch_size=2, ref="add")


@pytest.fixture(scope="module")
def cfg(parts):
    return Config(**json.loads((parts / "config.json").read_text()))


@pytest.fixture(scope="module")
def model(parts, cfg):
    return tiny.build(cfg, init=parts / "sft")


ROWS = [pictures((64, 64)), pictures((64, 64), (32, 48), seed=1), pictures((64, 64), seed=2)]


# --- references and guidance ---


def test_references_go_with_their_rows(model):
    cond, x = model.encode_edit(TEXTS, ROWS), model.noise(range(3))
    v = model.velocity(x, 0.5, [(1.0, cond)])
    for index in ([2, 0], slice(1, 3), torch.tensor([1, 1, 0]), torch.tensor([True, False, True])):
        same(model.velocity(x[index], 0.5, [(1.0, cond.rows(index))]), v[index])
    twice = cond.repeat(2)
    same(model.velocity(x.repeat_interleave(2, 0), 0.5, [(1.0, twice)]), v.repeat_interleave(2, 0))
    assert [len(r) for r in twice.refs] == [1, 1, 2, 2, 1, 1]
    same(model.velocity(x, 0.5, [(1.0, cond.map(torch.clone))]), v)


@pytest.mark.parametrize("refs", ["both", "vlm", "dit"])
def test_who_is_shown_references(parts, cfg, refs):
    """UniPic2's table 2: the VLM reads them in its sequence, the DiT attends to their latents."""
    m = tiny.build(cfg, init=parts / "sft")
    m.cfg = replace(m.cfg, refs=refs)
    one, two = (m.encode_edit(TEXTS, rows) for rows in (ROWS, [r[::-1] for r in ROWS[::-1]]))
    assert apart(one.ctx, two.ctx) == (refs != "dit")
    assert (one.refs is None) == (refs == "vlm")
    if one.refs:
        assert [[r.shape for r in row] for row in one.refs] == [
            [(4, i.shape[1] // 4, i.shape[2] // 4) for i in row] for row in ROWS]
        same(one.refs[1][1], m.to_latents(ROWS[1][1][None])[0])
    branches = m.edit_branches(TEXTS, ROWS, 3.0, 1.5)
    assert all((c.refs is not None) == (refs != "vlm") for _, c in branches[:2])


def test_two_way_guidance(model):
    x, n = model.noise(range(3)), len(TEXTS)

    def v(prompts, rows):
        return model.velocity(x, 0.6, [(1.0, model.encode_edit(prompts, rows))])
    full, image, none = v(TEXTS, ROWS), v([None] * n, ROWS), v([None] * n, [[]] * n)
    same(none, model.velocity(x, 0.6, [(1.0, model.null(n))]))      # of drawing and editing alike
    assert apart(full, image) and apart(image, none)
    for g, i in ((3.0, 1.5), (1.0, 1.5), (4.0, 1.0), (2.0, 2.0), (1.0, 1.0), (0.0, 1.0)):
        branches = model.edit_branches(TEXTS, ROWS, g, i)
        assert len(branches) == (g != 0) + (i != g) + (i != 1)
        assert abs(sum(w for w, _ in branches) - 1) < 1e-9
        same(model.velocity(x, 0.6, branches), none + i * (image - none) + g * (full - image), 1e-4)


def test_noise_on_references(parts, cfg):
    """UniRL-Zero's .8 z + .2 eps, a row's from its key alone, and not what its image starts from"""
    assert {n for n, c in PRESETS.items() if c.ref_noise} == {"unirl-zero"}
    m = tiny.build(replace(cfg, ref_noise=PRESETS["unirl-zero"].ref_noise), init=parts / "sft")
    clean = tiny.build(cfg, init=parts / "sft").ref_latents(ROWS)
    keys = [key(0, 7, i) for i in range(3)]
    noisy, alone = m.ref_latents(ROWS, keys), m.ref_latents(ROWS[1:2], keys[1:2])
    [same(a, b) for a, b in zip(noisy[1], alone[0])]
    eps = [(z - 0.8 * c) / 0.2 for z, c in zip(sum(noisy, []), sum(clean, []))]
    many = torch.cat([e.flatten() for e in eps])
    assert abs(many.mean()) < 0.06 and abs(many.std() - 1) < 0.06
    for e, start in zip([eps[0], eps[1], eps[3]], m.noise(keys)):
        assert (e - start).abs().max() > 1
    assert apart(eps[0], eps[3])
    with pytest.raises(AssertionError, match="needs keys"):
        m.ref_latents(ROWS)
    (_, full), (_, image), _ = m.edit_branches(TEXTS, ROWS, 3.0, 1.5, keys)
    assert all(torch.equal(a, b) for a, b in zip(sum(full.refs, []), sum(image.refs, [])))


def test_sana_edits(parts, cfg, tmp_path):
    """One reference, added; a checkpoint from before it knew any draws and edits as if blind."""
    torch.manual_seed(0)
    plain = SanaDiT(**SANA | dict(ref="none"))
    tiny.randomise(plain)
    (tmp_path / "dit").mkdir()
    save_file(plain.state_dict(), tmp_path / "dit/diffusion_pytorch_model.safetensors")
    (tmp_path / "dit/config.json").write_text(json.dumps({k: v for k, v in SANA.items()
                                                          if k != "ref"}))
    old = replace(cfg, mmdit={}, dit=str(tmp_path / "dit"), sana=SANA | dict(ref="none"),
                  bridge="lim", keep="query", layers=(1, 2), refs="dit")
    m = tiny.build(old)
    save_checkpoint(tmp_path / "old", {k: v for k, v in m.state_dict().items()
                                       if k.startswith(("dit", "bridge"))}, old, 0)
    m = tiny.build(replace(old, sana=SANA), init=tmp_path / "old")
    x, rows = m.noise(range(3)), [r[:1] for r in ROWS]
    blind = m.velocity(x, 0.5, [(1.0, m.encode(TEXTS, rows, "edit"))])
    assert torch.equal(m.velocity(x, 0.5, [(1.0, m.encode_edit(TEXTS, rows))]), blind)
    m.dit.ref_linear.weight.data.normal_()
    assert apart(m.velocity(x, 0.5, [(1.0, m.encode_edit(TEXTS, rows))]), blind)
    assert "SANA adds one reference to what it draws, not 2" in complaint(
        m.encode_edit, TEXTS, ROWS)


def test_presets_that_edit():
    with torch.device("meta"):
        dits = {n: build_dit(c) for n, c in PRESETS.items()}
    one = {"unipic2-kontext": {"dit"}, "parauni": {"vlm"}, "openuni": {"vlm"}}
    assert {n: reference_ways(c, dits[n]) for n, c in PRESETS.items() if c.refs != "none"} == {
        n: one.get(n, {"vlm", "dit"}) for n in PRESETS if n != "flow-grpo"}
    for name, refs, words in (("flow-grpo", "none", "images to: dit"),
                              ("unipic2-kontext", "both", "images to: dit"),
                              ("openuni", "dit", "cannot edit with --refs dit"),
                              ("shapes", "eyes", "there are: vlm, dit, both")):
        assert words in complaint(reference_ways, replace(PRESETS[name], refs=refs), dits[name])


def test_references_are_computed_together(model, monkeypatch):
    """64 references of one size: one call of the VAE and of the patch embedding, two of the VLM's
    eye, which sees 32 at a time."""
    calls = []

    def spy(module, name, size):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, *a, **k: (calls.append((name, size(x))),
                                                              real(x, *a, **k))[1])
    spy(model.vae, "encode", len)
    spy(model.vlm.model.visual, "forward", len)
    spy(model.dit.pos_embed.proj, "forward", len)
    cond = model.encode_edit(TEXTS[:1] * 64, [[p] for p in pictures(*[(64, 64)] * 64)])
    model.velocity(model.noise(range(64)), 0.5, [(1.0, cond)])
    assert calls == [("forward", 32 * 64)] * 2 + [
        ("encode", 64), ("forward", 64), ("forward", 64)]


# --- pictures ---


def test_an_edit_depends_on_its_row_alone(model):
    together = draw_edits(model, TEXTS, ROWS, [5, 6, 7], 3, 2.0, 1.5).int()
    for b in range(3):
        one = draw_edits(model, TEXTS[b : b + 1], ROWS[b : b + 1], [5 + b], 3, 2.0, 1.5).int()
        assert (one[0] - together[b]).abs().max() <= 1
    wide = draw_edits(model, TEXTS[:1], [pictures((32, 64))], [5], 3)
    assert wide.shape == (1, 3, 32, 64) and wide.dtype == torch.uint8


def test_a_mask_confines_the_edit(model):
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, 10:30, 20:50], masks[1, 0, 0] = True, True
    free, held = (draw_edits(model, TEXTS, ROWS, range(3), 4, masks=m) for m in (None, list(masks)))
    first = torch.stack([row[0] for row in ROWS])
    for b in range(3):
        assert torch.equal(held[b][:, ~masks[b]], first[b][:, ~masks[b]])
    assert (held[0] != first[0]).any() and not torch.equal(free[2], first[2])
    everything = draw_edits(model, TEXTS, ROWS, range(3), 4, masks=[torch.ones(64, 64).bool()] * 3)
    assert torch.equal(everything, free)
    # On the way, too: what is kept is the source at the step's own noise, else the two halves
    # of a picture would not know of each other.
    z, noise, kept = model.to_latents(first), model.noise(range(3)), torch.ones(3, 1, 16, 16).bool()
    kept[0, :, 2:8, 5:13] = False
    path = model.sample(model.edit_branches(TEXTS, ROWS), 4, noise=noise, trajectory=True,
                        keep=(z, kept))
    plain = model.sample(model.edit_branches(TEXTS, ROWS), 4, noise=noise, trajectory=True)
    for x, t in zip(path, sigmas(4, model.cfg.sample_shift).tolist()):
        same(x[1:], ((1 - t) * z + t * noise)[1:])
    assert torch.equal(path[1][0, :, 2:8, 5:13], plain[1][0, :, 2:8, 5:13])
    assert apart(path[2][0, :, 2:8, 5:13], plain[2][0, :, 2:8, 5:13])


# --- images of any mode ---


def png16(kind, pixels):
    """A PNG of 16 bits, which PIL writes only in grey: kind 2 RGB, 4 grey + alpha, 6 RGBA."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(
            ">I", zlib.crc32(name + data))
    h, w = pixels.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n"
                      + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, kind, 0, 0, 0))
                      + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def file(image, kind="png", **more):
    data = io.BytesIO()
    image.save(data, kind, **more)
    return io.BytesIO(data.getvalue())


def test_modes_become_rgb():
    ramp = (np.arange(6)[None] * np.array([[13000], [5000]])).astype(np.uint16)      # to 65000
    grey = np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, 2)
    for source in (file(Image.fromarray(ramp)), file(Image.fromarray(ramp), "tiff"),
                   file(Image.fromarray(ramp.astype(np.int32)), "tiff"),
                   png16(2, np.stack([ramp] * 3, 2)),
                   png16(4, np.stack([ramp, np.full_like(ramp, 65535)], 2))):
        assert np.abs(np.array(read_image(source)).astype(int) - grey).max() <= 1
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "LAB"):
        red = Image.new("RGB", (3, 2), (220, 20, 20))
        try:
            # Pillow 12 cannot read the TIFF that it writes of YCbCr; as such pictures are JPEGs.
            source = file(red.convert(mode), "jpeg" if mode == "YCbCr" else "tiff")
        except ValueError:                    # PIL converts into LAB by its colour management only
            source = file(Image.new(mode, (3, 2), (120, 180, 170)), "tiff")
        assert read_image(source).mode == "RGB" and read_image(source).size == (3, 2)
    assert read_image(file(red.convert("CMYK"), "tiff")).getpixel((0, 0)) == (220, 20, 20)
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    half = Image.new("LA", (2, 1), (0, 128))
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((1, 0))
    assert [read_image(file(clear)).getpixel((i, 0)) for i in (0, 1)] == [(200, 0, 0), (255,) * 3]
    assert read_image(file(palette)).getpixel((1, 0)) == (255,) * 3
    assert read_image(file(half)).getpixel((0, 0)) == (127,) * 3
    turned = Image.fromarray(ramp)
    exif = turned.getexif()
    exif[0x0112] = 6                                                  # a phone held upright
    assert read_image(file(turned, exif=exif)).size == (2, 6)
    for bad in (Image.fromarray(ramp.astype(np.float32)),
                Image.fromarray(ramp.astype(np.int32) * 1000)):
        with pytest.raises(ValueError, match="neither 8 nor 16 bits"):
            read_image(file(bad, "tiff"))


def test_sizes_become_buckets(cfg):
    assert bucket(64, 64, cfg) == bucket(1, 1, cfg) == bucket(5000, 5000, cfg) == (64, 64)
    assert bucket(640, 480, cfg) == (72, 56) and bucket(1, 1000, cfg) == (8, 128)
    one, two, target = (Image.new("RGB", size) for size in ((65, 63), (30, 90), (640, 480)))
    assert [tuple(i.shape) for i in to_bucket([one, two, target], cfg)] == [
        (3, 56, 72), (3, 112, 40), (3, 56, 72)]


# --- data ---


def save(path, image):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def folder_of_edits(folder, n=6, size=(64, 64), several=False):
    """Row i: source i, which is red i, and target i, blue i."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        for name, c in (("source", 0), ("target", 2)):
            image = torch.zeros(3, *size, dtype=torch.uint8)
            image[c] = 10 * i + 5
            save(folder / f"{name}{i}.png", image)
        save(folder / f"more{i}.png", torch.full((3, 96, 30), i, dtype=torch.uint8))
        source = [f"source{i}.png", f"more{i}.png"] if several else f"source{i}.png"
        rows.append(dict(source=source, target=f"target{i}.png", instruction=f"edit {i}",
                         inverse=f"undo {i}"))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize("several", [False, True])
def test_folder_of_edits(tmp_path, several):
    for images, texts, refs in collect(folder_of_edits(tmp_path, several=several), 9, form="edit"):
        assert images.shape == (2, 3, 64, 64) and len(texts) == len(refs) == 2
        for image, text, row in zip(images, texts, refs):
            i = int(text.removeprefix("edit "))
            assert (image[2] == 10 * i + 5).all() and (row[0][0] == 10 * i + 5).all()
            assert not image[0].any() and not row[0][2].any()
            assert [tuple(r.shape) for r in row] == [(3, 64, 64), (3, 112, 32)][: 1 + several]
            assert not several or (row[1] == i).all()


def test_shards_of_edits(tmp_path, capsys):
    folder_of_edits(tmp_path / "a", 8)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(8):
            (tmp_path / "t.json").write_text(json.dumps(dict(instruction=f"edit {i}")))
            tar.add(tmp_path / "a" / f"source{i}.png", f"{i}.source.png")
            tar.add(tmp_path / "a" / f"more{i}.png", f"{i}.source2.png")
            if i != 3:
                tar.add(tmp_path / "a" / f"target{i}.png", f"{i}.target.png")
            tar.add(tmp_path / "t.json", f"{i}.json")
    seen = collect(tmp_path, 7, form="edit")
    assert {t for _, ts, _ in seen for t in ts} == {f"edit {i}" for i in range(8) if i != 3}
    assert all((image[2] == row[0][0]).all() and len(row) == 2
               for images, _, refs in seen for image, row in zip(images, refs))
    assert "0.tar, 3 (1 of" in capsys.readouterr().err


def test_edits_that_cannot_be_used(tmp_path, capsys):
    folder = folder_of_edits(tmp_path / "a", 12)
    (folder / "source3.png").write_bytes(b"not an image")
    assert not any("edit 3" in ts for _, ts, _ in collect(folder, 12, form="edit"))
    assert "metadata.jsonl, line 4 (1 of" in capsys.readouterr().err
    for row, words in (('{"file_name": "a.png", "prompt": "x"}', "no source or src_img"),
                       ('{"source": 3, "target": "a.png"}', "a number is not the name of a file"),
                       ('{"source": "source1.png", "target": "target1.png"}', "no instruction")):
        (folder / "metadata.jsonl").write_text(row + "\n")
        assert f"line 1: {words}" in complaint(lambda: collect(folder, 1, form="edit"))
    (tmp_path / "b").mkdir()
    assert "neither metadata.jsonl" in complaint(lambda: collect(tmp_path / "b", 1, form="edit"))


# --- the mixture ---


def mixed(args, cfg, n, rank=0, world=1, trained=None):
    """n batches from where `trained` is, which then is behind them"""
    trained = trained or Namespace(start=0, position={})
    data = mixture(args, cfg, 2, rank, world, trained)
    rows = [next(data) for _ in range(n)]
    trained.start, trained.position = n, all_positions(trained.data)
    return rows


def test_share_of_edits(tmp_path, cfg):
    edits = folder_of_edits(tmp_path / "edits")
    plain = folder_of_edits(tmp_path / "plain")
    (plain / "metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=f"target{i}.png", prompt=f"{i}")) + "\n" for i in range(6)))
    args = Namespace(data=plain, edits=edits, edit_share=0.3, seed=3, columns="", workers=1)
    run = partial(mixed, args, cfg)
    rows = run(400)
    kinds = [refs is not None for _, _, refs, _ in rows]
    assert abs(sum(kinds) / 400 - 0.3) < 3 * (0.3 * 0.7 / 400) ** 0.5
    assert all(t.startswith("edit ") == k for row, k in zip(rows, kinds) for t in row[1])
    half = Namespace(start=0, position={})
    run(37, trained=half)
    for (x, p, r, _), (y, q, s, _) in zip(run(9, trained=half), rows[37:]):   # a run that resumes
        assert torch.equal(x, y) and p == q and (r is None) == (s is None)
    for rank in (0, 1):                                                # ranks do the same task
        assert [r is not None for _, _, r, _ in run(60, rank=rank, world=2)] == kinds[:60]
    args.edit_share = 1.0
    assert all(r is not None for _, _, r, _ in run(20))
    args.edits = ""
    assert not any(r is not None for _, _, r, _ in run(20))


def play(parts, tmp_path, out, *flags, main=sft.main):
    edits = folder_of_edits(tmp_path / "edits", several=True)
    plain = folder_of_edits(tmp_path / "plain")
    (plain / "metadata.jsonl").write_text("".join(
        json.dumps(dict(file_name=f"target{i}.png", prompt=f"{i}")) + "\n" for i in range(6)))
    return tiny.play(parts, tmp_path / out, "--data", plain, "--edits", edits, "--batch", 4, *flags,
                     main=main)


def test_training_learns_to_edit(parts, tmp_path, monkeypatch):
    """The loss of edits falls; both tasks are logged under their names; resuming changes nothing"""
    flags = ["--steps", 40, "--eval-every", 20, "--lr", 3e-3, "--warmup", 1, "--edit-share", 0.7]
    rows = play(parts, tmp_path, "a", *flags)
    edits = [r["edit_loss"] for r in rows if "edit_loss" in r]
    assert len(edits) + sum("loss" in r for r in rows) == 40 and 20 < len(edits) < 36
    assert np.mean(edits[-5:]) < 0.8 * np.mean(edits[:5])
    assert {p.stem for p in (tmp_path / "a/samples").iterdir()} == {
        f"{name}_{step:05d}" for name in ("step", "edits") for step in (20, 40)}
    with tiny.killed_at(sft, "train_times", 30):
        play(parts, tmp_path, "b", *flags)
    play(parts, tmp_path, "b", *flags, "--resume")
    a, b = (load_file(tmp_path / n / "ckpt/model.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert pretrain.main and play(parts, tmp_path, "c", "--steps", 2, "--edit-share", 1.0,
                                  "--init", "", main=pretrain.main)[1]["edit_loss"] > 0


def test_what_is_withheld(parts, tmp_path, monkeypatch):
    """5% text, 5% references, 5% both: every branch of two-way guidance is trained."""
    seen, real = [], ours.Unified.encode_edit

    def spy(self, prompts, images, *more):
        seen.extend((p is None, not len(r)) for p, r in zip(prompts, images))
        return real(self, prompts, images, *more)
    monkeypatch.setattr(ours.Unified, "encode_edit", spy)
    monkeypatch.setattr(looks_py, "draw_edits", lambda model, t, rows, *a, **k: torch.stack(
        [r[0] for r in rows]))
    play(parts, tmp_path, "a", "--steps", 30, "--edit-share", 1.0, "--batch", 20)
    n = len(seen)
    assert n == 600
    for kind in ((True, False), (False, True), (True, True)):
        assert abs(seen.count(kind) / n - 0.05) < 3 * (0.05 * 0.95 / n) ** 0.5
    seen.clear()
    play(parts, tmp_path, "b", "--steps", 3, "--edit-share", 1.0, "--edit-drop", 0.0)
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize("refs", ["vlm", "dit"])
def test_gradient_feels_references(parts, cfg, refs):
    """Another source, another gradient, though only one of the two ways is open."""
    m = learn(tiny.build(cfg, init=parts / "sft"), dict(bridge=None, dit=None))
    m.cfg = replace(m.cfg, refs=refs)

    def gradient(rows):
        m.zero_grad()
        m.velocity(m.noise(range(3)), 0.5, [(1.0, m.encode_edit(TEXTS, rows))]).square().mean(
            ).backward()
        return m.bridge.meta_queries.grad.clone(), m.dit.pos_embed.proj.weight.grad.clone()
    for a, b in zip(gradient(ROWS), gradient([[r[0].flip(1)] for r in ROWS])):
        assert a.any() and not torch.equal(a, b)


def test_training_refuses(parts, tmp_path):
    for flags, words in ((["--refs", "eyes"], "unknown --refs 'eyes'"),
                         (["--edit-share", 1.5], "--edit-share 1.5: must be a number in [0, 1]"),
                         (["--edit-drop", 0.4], "--edit-drop 0.4: must be a number in [0, 1/3]"),
                         (["--edits", tmp_path / "none"], "must be a file")):
        assert words in complaint(lambda: play(parts, tmp_path, "x", *flags))
        assert not (tmp_path / "x").exists()


def test_refs_of_a_run_are_its_checkpoints(parts, cfg, tmp_path, monkeypatch):
    play(parts, tmp_path, "a", "--steps", 1, "--refs", "dit")
    monkeypatch.setitem(PRESETS, "shapes", cfg)
    assert ours.Unified.load(tmp_path / "a").cfg.refs == "dit"
    assert ours.Unified.from_preset("shapes", tmp_path / "a").cfg.refs == "dit"
    assert ours.Unified.from_preset("shapes", tmp_path / "a", refs="vlm").cfg.refs == "vlm"


# --- sample.py ---


def draw(monkeypatch, cfg, *argv):
    monkeypatch.setitem(PRESETS, "shapes", cfg)
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    sample.main()


def test_sample_edits(parts, cfg, tmp_path, monkeypatch):
    wide = pictures((48, 96))[0]
    save(tmp_path / "in.png", wide)
    save(tmp_path / "two.png", pictures((64, 64))[0])
    mask = torch.zeros(3, 48, 96, dtype=torch.uint8)
    save(tmp_path / "mask.png", mask)
    out = tmp_path / "out.png"
    flags = ["--init", parts / "sft", "--image", tmp_path / "in.png", "--edit", "add a circle",
             "--out", out, "--n", 2, "--steps", 2, "--guidance", 2, "--image-guidance", 1.5]
    draw(monkeypatch, cfg, *flags, "--image", tmp_path / "two.png", "--edit", "remove it")
    w, h = bucket(96, 48, cfg)
    page = Image.open(out)
    assert page.width == 3 * (max(1, 128 // w) * w + 12) and page.height > 2 * h
    draw(monkeypatch, cfg, *flags, "--mask", tmp_path / "mask.png")       # nothing may change
    page = np.array(Image.open(out))[6 : 6 + h, 6:]
    cell = max(1, 128 // w) * w + 12
    zoomed = [page[:h, i * cell : i * cell + w] for i in range(3)]
    assert all(np.array_equal(zoomed[0], z) for z in zoomed[1:]) and zoomed[0].std() > 20
    draw(monkeypatch, cfg, *flags, "--trajectory", "--out", tmp_path / "path.gif")
    assert Image.open(tmp_path / "path.gif").n_frames == 3


def test_sample_refuses_edits(parts, cfg, tmp_path, monkeypatch):
    save(tmp_path / "in.png", pictures((64, 64))[0])
    save(tmp_path / "small.png", pictures((8, 8))[0])
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90))
    image, out = ["--image", tmp_path / "in.png"], tmp_path / "o.png"
    for argv, words in (
            (image, "required: prompts"), (["--edit", "x"], "an edit is an --image and an --edit"),
            ([*image, "--edit", "x", "y"], "an edit is an --image"),
            (["x", "--mask", tmp_path / "in.png"], "--mask confines an --edit"),
            (["--image", tmp_path / "bad.png", "--edit", "x"], "bad.png cannot be read"),
            (["--image", tmp_path / "no.png", "--edit", "x"], "no.png': must be a file"),
            ([*image, "--edit", "x", "--mask", tmp_path / "small.png"], "has 8 x 8 pixels")):
        words_said = complaint(draw, monkeypatch, cfg, *argv, "--init", parts / "sft", "--out", out)
        assert words in words_said and not out.exists()
    assert "cannot edit with --refs none" in complaint(
        draw, monkeypatch, replace(cfg, refs="none"), *image, "--edit", "x", "--init", "",
        "--preset", "shapes", "--out", out)
