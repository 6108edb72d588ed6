"""Checkpoints: what was trained, written as one unit, and what --init and --resume read."""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError
from shutil import copyfile, rmtree
from zipfile import BadZipFile, ZipFile

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from common.presets import Config
from common.run import beside, fail, first_line, replacing
from common.weights import dit_tensors, read_safetensors


CHECKPOINT = "ckpt/optim.pt"              # all that --resume needs; beside it the weights to use


def save_checkpoint(folder, tensors, cfg, step, dtype=torch.float32, loras=None, score=None):
    """model.safetensors: what was trained, and what it is, in one piece. score: on what is held
    out, if that was drawn."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    usual = LoraConfig().to_dict()      # of a LoRA what differs from peft's defaults, which change
    loras = {part: {k: v for k, v in c.to_dict().items() if v != usual[k]}
             for part, c in (loras or {}).items()}
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in tensors.items()}
    # One entry: safetensors writes several in an order of its own, and equal runs give equal files.
    about = dict(config=asdict(cfg), step=step, loras=loras, score=score)
    with replacing(folder / "model.safetensors") as fresh:
        save_file(tensors, fresh, {"checkpoint": json.dumps(about, default=sorted)})


def saved_about(folder):
    """-> what save_checkpoint says of a folder's weights, {} where there are none of ours"""
    file = Path(folder) / "model.safetensors"
    return json.loads(read_safetensors(file, names_only=True)[1].get("checkpoint", "{}")
                      ) if file.exists() else {}


def has_checkpoint(out):
    return (Path(out) / CHECKPOINT).exists()


def checkpoint_file(path):
    """model.safetensors of a checkpoint's folder or a run's, or None."""
    return next((f for f in (Path(path) / "model.safetensors",
                             Path(path) / "ckpt" / "model.safetensors") if f.exists()), None)


def read_about(path):
    """-> config of a checkpoint of ours, {} of what else --init takes"""
    path = beside(path)
    file = checkpoint_file(path)
    if file is None and not any((path / f"{n}config.json").exists() for n in ("", "adapter_")):
        fail(f"no checkpoint at {path}: there is no model.safetensors, nor ckpt/model.safetensors, "
             "nor a diffusers transformer's or a peft LoRA's folder")
    if file is None:
        return {}
    about = described(file, read_safetensors(file, names_only=True)[1])["config"]
    known = {f.name for f in fields(Config)}         # older checkpoints have other names, too
    return {k: v for k, v in about.items() if k in known}


def described(file, metadata):
    """-> what save_checkpoint says of a checkpoint: config, loras; older files say it in parts."""
    if "checkpoint" in metadata:
        return json.loads(metadata["checkpoint"])
    if "config" not in metadata:
        fail(f"{file} is not a checkpoint of ours: it names no preset")
    return {k: json.loads(metadata.get(k, "{}")) for k in ("config", "loras")}


def read_init(path, cfg, dit):
    """-> tensors, {part: LoraConfig}. path: see Unified.from_preset"""
    path = beside(path)
    if file := checkpoint_file(path):
        tensors, metadata = read_safetensors(file)
        return tensors, {part: LoraConfig(**config)
                         for part, config in described(file, metadata)["loras"].items()}
    if not (path / "adapter_config.json").exists():
        return {f"dit.{k}": v for k, v in dit_tensors(str(path), cfg, dit).items()}, {}
    file, config = path / "adapter_model.safetensors", LoraConfig.from_pretrained(path)
    if config.peft_type != "LORA" or not file.exists():
        fail(f"{path} is no LoRA: it needs peft_type LORA, and adapter_model.safetensors")
    return {"dit." + k.removeprefix("base_model.model."): v
            for k, v in read_safetensors(file)[0].items()}, {"dit": config}


class Ema:
    """An average of the weights that learn: noisy updates, steady evaluation and checkpoints."""

    def __init__(self, params, decay):
        self.params, self.decay = params, decay                  # name -> parameter
        self.extra = {}              # a fork's own state, of tensors and numbers: saved and resumed
        self.mean = {k: p.detach().clone() for k, p in params.items()}

    @torch.no_grad()
    def update(self, step):
        d = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.mean.values()), list(self.params.values()), 1 - d)

    @contextmanager
    def applied(self):
        """The model computes with the average; afterwards with its own weights again."""
        raw = {k: p.detach().clone() for k, p in self.params.items()}

        def put(weights):
            for k, p in self.params.items():
                p.copy_(weights[k])
        with torch.no_grad():
            put(self.mean)
            try:
                yield
            finally:
                put(raw)


class Trained:
    """What learns: its optimiser, its average, and how a run of it is saved and gone on with."""

    def __init__(self, args, params, opt, save):
        """params: {name: parameter}; save(ema, folder, step, score) writes the weights."""
        self.params, self.opt, self.save_weights = params, opt, save
        self.ema = Ema(params, args.ema)
        self.start = resume_run(self.ema, args, opt)     # updates that are done

    def save(self, out, step, score=None):
        """A checkpoint, first all that --resume needs, in one file: a run goes on from that,
        whatever else was written. score: on what is held out, if it was drawn."""
        folder = Path(out) / "ckpt"
        folder.mkdir(parents=True, exist_ok=True)
        raw = {k: p.detach() for k, p in self.params.items()}
        with replacing(Path(out) / CHECKPOINT) as fresh:
            torch.save(dict(raw=raw, mean=self.ema.mean, opt=self.opt.state_dict(),
                            extra=self.ema.extra, step=step), fresh)
        self.save_weights(self.ema, folder, step, score)


def save_weights(model, ema, folder, step, score=None):
    """The averaged weights, with what --init had changed, so that they stand alone: of a LoRA run
    the LoRA, merged at load."""
    def on_disk(tensors):                                  # without peft's wrapping
        return {k.replace(".base_layer", "").replace(".default", ""): v
                for k, v in tensors.items()}
    parts = model.trained | {k.split(".")[0] for k in ema.params if "lora_" not in k}
    tied = {p.data_ptr(): k for k, p in ema.params.items()}   # a weight may have two names
    tensors = {k: ema.mean[tied[v.data_ptr()]].clone() if v.data_ptr() in tied else v
               for k, v in model.state_dict().items()
               if k.split(".")[0] in parts and "lora_" not in k}
    # A LoRA that learns, or that came with --init to a part which is otherwise the preset's
    loras = {part: (config, mine) for part, (config, mine) in model.adapters.items()
             if not mine or part not in model.trained}
    for part, (_, mine) in loras.items():
        tensors |= {f"{part}.{k}": v for k, v in mine.items()}
    save_checkpoint(folder, on_disk(tensors | ema.mean), model.cfg, step, score=score,
                    loras={part: config for part, (config, _) in loras.items()})


def keep_beside(out, step, keep):
    """The weights just saved stay beside those to come: as ckpt/best while none scores higher on
    what is held out, and the last `keep` of them as ckpt/step_00020."""
    folder = Path(out) / "ckpt"

    def link(name):
        (folder / name).mkdir(exist_ok=True)
        with replacing(folder / name / "model.safetensors") as fresh:
            fresh.unlink()
            try:
                os.link(folder / "model.safetensors", fresh)     # no second copy
            except OSError:                              # not every disk can
                copyfile(folder / "model.safetensors", fresh)
    score, best = (saved_about(place).get("score") for place in (folder, folder / "best"))
    if score is not None and (best is None or score > best):
        link("best")
    if keep:
        link(f"step_{step:05d}")
        for old in sorted(folder.glob("step_*"))[:-keep]:
            rmtree(old)


def resume_run(ema, args, opt):
    """Put back raw weights, average and optimiser, where --resume finds them. -> the next step"""
    file = Path(args.out) / CHECKPOINT
    if not args.resume or not file.exists():             # see check_out
        return 0
    try:
        with ZipFile(file) as records:                   # torch writes checksums, and reads none
            if damaged := records.testzip():
                raise BadZipFile(f"{damaged} is not what was written")
        saved = torch.load(file, weights_only=True, map_location="cpu")
        raw, mean, step = saved["raw"], saved["mean"], saved["step"]
        # Once a part that does not learn had a group, an empty one.
        groups = [g for g in saved["opt"]["param_groups"] if g["params"]]
    except (OSError, EOFError, RuntimeError, UnpicklingError, BadZipFile, ValueError, TypeError,
            LookupError, AttributeError) as e:
        fail(f"{file} cannot be read, it may be truncated ({first_line(e)}): start anew in another "
             "--out")
    if {k: v.shape for k, v in raw.items()} != {k: v.shape for k, v in ema.params.items()}:
        fail(f"{file} belongs to a run that trained other weights: give the flags it had")
    try:
        opt.load_state_dict(saved["opt"] | dict(param_groups=groups))
    except ValueError as e:
        fail(f"{file} belongs to a run that trained otherwise ({first_line(e)})")
    ema.extra = saved.get("extra", {})                      # older ones have none
    with torch.no_grad():
        for k, p in ema.params.items():
            p.copy_(raw[k])
            ema.mean[k].copy_(mean[k])
    return step
