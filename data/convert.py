"""Peers' releases -> a checkpoint of ours, once:

    python data/convert.py deepgen model.pt out/deepgen
    python sample.py "a red cube" --init out/deepgen

    deepgen   DeepGen-1.0's file, any stage; its LoRA is merged into a copy of Qwen2.5-VL (--vlm)
    unipic2   UniPic2-Metaquery's folder; its transformer/ and vae/ are used where they are
    openuni   OpenUni-L-512's file, pretrained or finetuned
    unirl     UniRL-Zero's folder or file

Strict: what is missing or unknown is an error. Tensors keep their precision.
"""

import argparse
import os
import re
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

import model  # noqa: E402
from common.checkpoint import save_checkpoint  # noqa: E402
from common.flags import HUB, can_hold, shown, there  # noqa: E402
from common.presets import preset  # noqa: E402
from common.run import fail  # noqa: E402
from common.weights import attempt, indexed, sound  # noqa: E402

# Their prefix -> ours, the first row that fits; * is a layer's number, None is left out.
NAMES = {
    "deepgen": (
        ("meta_queries",                                "bridge.meta_queries"),
        ("connector.",                                  "bridge.connector."),
        ("projector_",                                  "bridge.projector_"),
        ("transformer.",                                "dit."),
        ("lmm.model.language_model.",                   "vlm.model.language_model."),
        ("lmm.model.visual.",                           "vlm.model.visual."),
        ("lmm.lm_head.",                                "vlm.lm_head."),
        ("lmm.model.",                                  "vlm.model.language_model."),   # older
        ("lmm.visual.",                                 "vlm.model.visual."),           # older
    ),
    "unipic2": (
        ("meta_queries",                                "bridge.meta_queries"),
        ("connector.",                                  "bridge.connector."),
        ("projector_",                                  "bridge.projector_"),
    ),
    "openuni": (
        ("meta_queries",                                "bridge.meta_queries"),
        ("connector.",                                  "bridge.connector."),
        ("projector.",                                  "bridge.projector_3."),
        ("transformer.",                                "dit."),
    ),
    "unirl": (
        ("model.t2i_queries",                           "bridge.meta_queries"),
        ("model.i2i_queries",                           "bridge.edit_queries"),
        ("model.down_projector.layers.*.norm1.",        "bridge.connector.layers.*.layer_norm1."),
        ("model.down_projector.layers.*.attn.",         "bridge.connector.layers.*.self_attn."),
        ("model.down_projector.layers.*.norm2.",        "bridge.connector.layers.*.layer_norm2."),
        # Not the usual numbers: theirs is w3(silu(w1 x) * w2 x).
        ("model.down_projector.layers.*.ffn.w1.",       "bridge.connector.layers.*.mlp.fc1."),
        ("model.down_projector.layers.*.ffn.w2.",       "bridge.connector.layers.*.mlp.gate."),
        ("model.down_projector.layers.*.ffn.w3.",       "bridge.connector.layers.*.mlp.fc2."),
        ("model.down_projector.norm_final.",            "bridge.connector.norm."),
        ("model.down_projector.output_linear.",         "bridge.projector_3."),
        ("model.dit.",                                  "dit."),
        ("model.gen_vision_tower.",                     None),      # the VAE, frozen
        ("model.embed_tokens.",                         None),      # Qwen2.5-VL, frozen before RL
        ("model.layers.",                               None),
        ("model.norm.",                                 None),
        ("visual.",                                     None),
        ("lm_head.",                                    None),
    ),
}  # fmt: skip
PRESET = dict(deepgen="deepgen", unipic2="unipic2", openuni="openuni", unirl="unirl-zero")
LORA_SCALE = 2                                     # DeepGen: alpha 128 / r 64
TABLE = "dit.pos_embed.pos_embed"                  # a buffer: may remain where the DiT was frozen


def some(names):
    """The first ten of them, and how many more."""
    names = sorted(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")


def read(path):
    """-> name -> tensor, of a file, or of a folder with one file or with shards and their index.
    Tensors stay on the disk until they are used."""
    path, index = Path(path), {}
    if path.is_dir():
        if any(path.glob("*_states.pt")):
            fail(f"{path} is DeepSpeed's folder: first `zero_to_fp32.py {path.parent} DIR -t "
                 f"{path.name} --safe_serialization` (it comes with DeepSpeed), then convert DIR")
        kinds = ("safetensors.index.json", "bin.index.json", "safetensors", "pth", "pt", "bin")
        files = next(filter(None, (sorted(path.glob(f"*.{kind}")) for kind in kinds)), [])
        if len(files) != 1:
            fail(f"{path} holds {len(files)} files of weights: give one"
                 + ", such as " * bool(files) + some(f.name for f in files))
        if files[0].suffix == ".json":
            index = indexed(files[0])
            files = [path / name for name in sorted(set(index.values()))]
    else:
        files = [path]
    tensors = {}
    for file in files:
        if not file.exists():
            fail(f"{file} is missing" + (": download it again" if index else ""))
        part = attempt(f"{file} cannot be read, it may be truncated or hold more than weights",
                       lambda: load_file(file) if file.suffix == ".safetensors" else
                       torch.load(file, "cpu", weights_only=True, mmap=True))
        part = part.get("state_dict", part) if isinstance(part, dict) else {"": part}
        if not isinstance(part, dict) or not all(
                isinstance(k, str) and torch.is_tensor(v) for k, v in part.items()):
            fail(f"{file} holds more than weights: not the release's file")
        tensors |= part
    if index.keys() - tensors.keys():
        fail(f"{path} is incomplete, download it again: its index promises "
             f"{some(index.keys() - tensors.keys())}")
    return tensors


def report(wrong, claim):
    """wrong: what -> names. One line if there are any."""
    if any(wrong.values()):
        fail(f"{claim}: " + "; ".join(
            f"{len(names)} {what}: {some(names)}" for what, names in wrong.items() if names))


def rename(name, layout):
    """-> our name; None = left out; '' = no row fits."""
    for theirs, ours in NAMES[layout]:
        m = re.match(re.escape(theirs).replace(r"\*", r"(\d+)"), name)
        if m:
            return ours and ours.replace("*", m[m.lastindex or 0]) + name[m.end():]
    return ""


def check(got, cfg, parts, path, layout, strange=()):
    """Names and shapes are those of the preset's `parts`, or one line says what is not."""
    with torch.device("meta"):                     # neither memory nor time
        made, dit = nn.ModuleDict(), model.build_dit(cfg)
        if "bridge" in parts:
            made["bridge"] = model.Bridge(cfg, dit)
        if "dit" in parts:
            made["dit"] = dit
    want = {k: tuple(v.shape) for k, v in made.state_dict().items()}
    shapes = {k: tuple(v.shape) for k, v in got.items()}
    report({"missing": want.keys() - shapes.keys(),
            "unexpected": {*strange, *(shapes.keys() - want.keys())},
            "of another shape": {f"{k} {shapes[k]}, not {want[k]}"
                                 for k in want.keys() & shapes.keys() if shapes[k] != want[k]}},
           f"{path} is not {layout}'s release for preset {cfg.preset!r}")


def merge(folder, lora, path, out):
    """The VLM of `folder` with W += alpha/r B A -> out. lora: `... .lora_A.default.weight` and so
    on by the VLM's names; path is where it comes from."""
    vlm, *others = attempt(
        f"the VLM {folder} cannot be loaded, give its folder as --vlm", lambda: [
            kind.from_pretrained(folder, **options) for kind, options in (
                (AutoModelForImageTextToText, dict(dtype="auto")), (AutoTokenizer, {}),
                (AutoImageProcessor, {}))])
    sound(folder, dict(vlm.named_parameters()))
    ends = {"lora_A.default.weight": "A", "lora_B.default.weight": "B",
            "lora_embedding_A.default": "A", "lora_embedding_B.default": "B"}
    pairs, strange = {}, set()
    layers = {n: m for n, m in vlm.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for name, tensor in lora.items():
        layer, _, end = name.partition(".lora_")
        if layer in layers and "lora_" + end in ends:
            pairs.setdefault(layer, {})[ends["lora_" + end]] = tensor
        else:
            strange.add(name)
    # Every layer of the language model has a pair; the other parts all of theirs, or none.
    def part(layer):
        return ".".join(layer.split(".")[:2])
    parts = {"model.language_model"} | set(map(part, pairs))
    missing = {n for n in layers if part(n) in parts and len(pairs.get(n, ())) < 2}
    claim = f"the LoRA of {path} is not this VLM's"
    report(dict(missing=missing, unexpected=strange), claim)
    if vlm.lm_head.weight is vlm.get_input_embeddings().weight:    # each has a LoRA of its own
        vlm.lm_head.weight = nn.Parameter(vlm.lm_head.weight.detach().clone())
    for config in (vlm.config, vlm.config.get_text_config()):
        config.tie_word_embeddings = False
    for name, pair in pairs.items():
        layer = layers[name]
        delta = LORA_SCALE * pair["B"].float() @ pair["A"].float()
        delta = delta.T if isinstance(layer, nn.Embedding) else delta
        if delta.shape != layer.weight.shape:
            fail(f"{claim}: {name} {tuple(delta.shape)}, not {tuple(layer.weight.shape)}")
        layer.weight.data = (layer.weight.data.float() + delta).to(layer.weight.dtype)
    for saved in (vlm, *others):
        saved.save_pretrained(out)


def refuse(layout, path, out, lora_from, vlm):
    """The errors that a user can make, before anything is read."""
    if not out or os.path.lexists(out):
        fail(f"out {shown(out)} exists: choose another OUT")
    try:
        can_hold(out)
    except OSError as e:
        fail(f"out {shown(out)}: {e.strerror}")
    for name, file in (("path", path), ("--lora-from", lora_from)):
        if file is not None and not there(file):
            fail(f"{name} {shown(file)} does not exist: download the release first")
    if lora_from and layout != "deepgen":
        fail("--lora-from is DeepGen's: no other release has a LoRA")
    if vlm is not None and not (vlm and there(vlm, HUB)):
        fail(f"--vlm {shown(vlm)}: must be {HUB}")


def convert(layout, path, out, lora_from=None, vlm=None):
    refuse(layout, str(path), str(out), lora_from, vlm)
    cfg, path, out = preset(PRESET[layout]), Path(path), Path(out)
    if vlm:
        cfg = replace(cfg, vlm=str(Path(vlm).resolve()) if Path(vlm).is_dir() else vlm)
    source = read(path / "conditioner" if layout == "unipic2" else path)
    names = {k: rename(k, layout) for k in source}
    tensors = sound(path, {ours: source[k] for k, ours in names.items() if ours})
    strange = {k for k, ours in names.items() if ours == ""}
    left_out = [k for k, ours in names.items() if ours is None]
    lora = {k.removeprefix("vlm."): tensors.pop(k) for k in list(tensors) if k.startswith("vlm.")}
    if layout == "unirl":
        for name in ("bridge.meta_queries", "bridge.edit_queries"):
            if name in tensors:
                tensors[name] = tensors[name].squeeze(0)           # (1,queries,d) -> (queries,d)
    parts = ["bridge", "dit"]
    if not any(k.startswith("dit.") for k in tensors.keys() - {TABLE}) and not lora:
        parts = ["bridge"]                                         # stage 1: the DiT was frozen
        tensors.pop(TABLE, None)
    elif cfg.mmdit and TABLE not in tensors and layout == "deepgen" and not strange:
        print(f"{path} lacks transformer.pos_embed.pos_embed, which is computed")
        tensors[TABLE] = model.MMDiT(**cfg.mmdit | dict(num_layers=1)).pos_embed.pos_embed
    check(tensors, cfg, parts, path, layout, strange)
    if layout == "unipic2":
        dit = {f"dit.{k}": v for k, v in read(path / "transformer").items()}
        check(sound(path / "transformer", dit), cfg, ["dit"], path / "transformer", layout)
        if not (path / "vae" / "config.json").exists():
            fail(f"{path / 'vae'} holds no VAE: download the whole release")
        cfg = replace(cfg, dit=str((path / "transformer").resolve()),
                      vae=str((path / "vae").resolve()))

    if lora_from and (lora or parts == ["bridge"]):
        fail(f"{path} needs no --lora-from: " + ("it has a LoRA" if lora else "it is of stage 1"))
    if lora_from:
        lora = {rename(k, layout).removeprefix("vlm."): v
                for k, v in sound(lora_from, read(lora_from)).items() if k.startswith("lmm.")}
    if lora_from and not lora:
        fail(f"{lora_from} holds no LoRA of the VLM (lmm. ... lora_A): give DeepGen-1.0's SFT file")
    if layout == "deepgen" and "dit" in parts and not lora:
        fail(f"{path} lacks the VLM's LoRA, as files saved in RL do: add --lora-from SFT_FILE")

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=out.name + ".") as tmp:     # all, or nothing
        new = Path(tmp) / "new"
        if lora:
            merge(cfg.vlm, lora, lora_from or path, new / "vlm")
            cfg = replace(cfg, vlm=str((out / "vlm").resolve()))
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors.values()))
        save_checkpoint(new, tensors, cfg, 0, dtype=dtype)
        os.replace(new, out)
    for part in parts:
        n = sum(t.numel() for k, t in tensors.items() if k.startswith(part))
        print(f"{part}: {n / 1e6:,.1f}M numbers as {dtype}")
    if left_out:
        print(f"left out, for the preset's own VLM and VAE: {some(left_out)}")
    print(f"{out}: dit {cfg.dit}, vae {cfg.vae}, vlm {cfg.vlm}")


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = fail
    p.add_argument("layout", choices=NAMES)
    p.add_argument("path")
    p.add_argument("out")
    p.add_argument("--lora-from", help="deepgen: the file of SFT, whose LoRA RL did not save")
    p.add_argument("--vlm", help="folder or Hub id of the VLM, if not the preset's")
    convert(**vars(p.parse_args()))


if __name__ == "__main__":
    main()
