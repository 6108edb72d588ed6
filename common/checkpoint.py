"""Checkpoints: what was trained, written as one unit, and what --init and --resume read."""

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from common.presets import Config
from common.run import beside, fail
from common.weights import dit_tensors, read_safetensors


def save_checkpoint(folder, tensors, cfg, step, optim=None, dtype=torch.float32, loras=None):
    """Atomic: model.safetensors (what was trained, and the config) and the optimiser's state."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if optim is not None:
        torch.save(dict(optim, step=step), folder / "optim.tmp")
        os.replace(folder / "optim.tmp", folder / "optim.pt")
    usual = LoraConfig().to_dict()      # of a LoRA what differs from peft's defaults, which change
    loras = {part: {k: v for k, v in c.to_dict().items() if v != usual[k]}
             for part, c in (loras or {}).items()}
    # One entry: safetensors writes several in an order of its own, and equal runs give equal files.
    about = {"checkpoint": json.dumps(dict(config=asdict(cfg), step=step, loras=loras),
                                      default=sorted)}
    save_file({k: v.detach().to(dtype).contiguous() for k, v in tensors.items()},
              folder / "model.tmp", about)
    os.replace(folder / "model.tmp", folder / "model.safetensors")


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


def save_run(ema, out, model, step, opt):
    """The averaged weights are the checkpoint, with what --init had changed, so that it stands
    alone: of a LoRA run the LoRA, merged at load. Beside it all that --resume needs."""
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
    raw = {k: p.detach() for k, p in ema.params.items()}
    save_checkpoint(out / "ckpt", on_disk(tensors | ema.mean), model.cfg, step,
                    dict(raw=raw, mean=ema.mean, opt=opt.state_dict(), extra=ema.extra),
                    loras={part: config for part, (config, _) in loras.items()})


def resume_run(ema, out, opt):
    """Put back raw weights, average and optimiser. -> the next step."""
    file = Path(out) / "ckpt" / "optim.pt"
    if not file.exists():
        fail(f"nothing to resume: {file} is missing; start without --resume in a new --out")
    try:
        saved = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, UnpicklingError) as e:
        fail(f"{file} cannot be read, it may be truncated ({str(e).splitlines()[0]})")
    if saved["raw"].keys() != ema.params.keys():
        fail(f"{file} belongs to a run that trained other weights: give the flags it had")
    ema.extra = saved.get("extra", {})                      # older ones have none
    # Once a part that does not learn had a group, an empty one.
    saved["opt"]["param_groups"] = [g for g in saved["opt"]["param_groups"] if g["params"]]
    opt.load_state_dict(saved["opt"])
    with torch.no_grad():
        for k, p in ema.params.items():
            p.copy_(saved["raw"][k])
            ema.mean[k].copy_(saved["mean"][k])
    return saved["step"]
