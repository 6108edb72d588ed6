"""Checkpoints: what was trained, written as one unit, and what --init and --resume read."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from functools import partial
from math import isfinite
from pathlib import Path
from shutil import copyfile, rmtree
from zipfile import BadZipFile, ZipFile

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from common.lora import DIFFUSERS, PEFT, lora_config, lora_files, read_lora
from common.presets import Config
from common.run import beside, fail, learning, replacing
from common.shard import gathered, is_sharded, like, local, whole
from common.stop import this_rank
from common.weights import (attempt, crc, dit_tensors, download, on_the_hub, owned,
                            read_safetensors, sound)


CHECKPOINT = "ckpt/optim.pt"              # all that --resume needs; beside it the weights to use


def save_checkpoint(folder, tensors, cfg, step, dtype=torch.float32, loras=None, score=None):
    """model.safetensors: what was trained, and what it is, in one piece. score: on what is held
    out, if that was drawn."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    usual = LoraConfig().to_dict()      # of a LoRA what differs from peft's defaults, which change
    loras = {part: {k: v for k, v in c.to_dict().items() if v != usual[k]}
             for part, c in (loras or {}).items()}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
    # One entry: safetensors writes several in an order of its own, and equal runs give equal files.
    about = dict(config=asdict(cfg), step=step, loras=loras, score=score, crc=crc(tensors))
    with replacing(folder / "model.safetensors") as fresh:
        save_file(tensors, fresh, {"checkpoint": json.dumps(about, default=sorted)})


def saved_about(folder):
    """-> what save_checkpoint says of a folder's weights, {} where there are none of ours"""
    file = Path(folder) / "model.safetensors"
    return json.loads(read_safetensors(file, names_only=True)[1].get("checkpoint", "{}")
                      ) if file.exists() else {}


def has_checkpoint(out):
    return (Path(out) / CHECKPOINT).exists()


# What --init may be on the Hub: a LoRA, a transformer, or a checkpoint of ours.
INIT = (PEFT, "adapter_config.json", DIFFUSERS, "model.safetensors", "ckpt/model.safetensors",
        "config.json", "diffusion_pytorch_model*.safetensors",
        "diffusion_pytorch_model.safetensors.index.json")
RENAMED = ("ask_text", "judge_text")     # fields that Config once had, under these names


def init_folder(name):
    """--init, a folder or owner/repo[/subfolder] on the Hub -> the Path of its files"""
    path = download(str(name), INIT) if on_the_hub(name) else beside(name)
    if os.path.isfile(path):
        fail(f"{name} is a file: give the folder that it lies in")
    if not os.path.isdir(path):
        fail(f"no checkpoint at {name}: there is no such folder")
    return path


def checkpoint_file(path):
    """model.safetensors of a checkpoint's folder or a run's, or None."""
    return next((f for f in (Path(path) / "model.safetensors",
                             Path(path) / "ckpt" / "model.safetensors") if f.exists()), None)


def read_about(name):
    """-> config of a checkpoint of ours, {} of what else --init takes"""
    path = init_folder(name)
    file = checkpoint_file(path)
    if file is None and not lora_files(path) and not (path / "config.json").exists():
        fail(f"no checkpoint at {name}: there is no model.safetensors, nor ckpt/model.safetensors, "
             "nor a diffusers transformer's or a LoRA's folder")
    if file is None:
        return {}
    return described(file, read_safetensors(file, names_only=True)[1])["config"]


def read_step(name):
    """-> the step at which a checkpoint of ours was written; None of what else --init takes"""
    file = checkpoint_file(init_folder(name))
    return file and described(file, read_safetensors(file, names_only=True)[1]).get("step")


def described(file, metadata):
    """-> what save_checkpoint says of a checkpoint: config, step, loras, crc; older files, of which
    some have no crc and no loras, say it in parts."""
    if not {"checkpoint", "config"} & metadata.keys():
        fail(f"{file} is not a checkpoint of ours: it names no preset")
    try:
        about = json.loads(metadata["checkpoint"]) if "checkpoint" in metadata else {
            k: json.loads(v) for k, v in metadata.items() if k in ("config", "step", "loras")}
    except (ValueError, RecursionError) as e:
        fail(f"{file} is damaged: what it says of its config is no JSON ({e})")
    if not isinstance(about, dict) or not all(
            isinstance(about.setdefault(k, {}), dict) for k in ("config", "loras")):
        fail(f"{file} is damaged: what it says of its config is no JSON object")
    known = {f.name: f.type for f in fields(Config)}
    config = {k: v for k, v in about["config"].items() if k not in RENAMED}
    if newer := [k for k in config if k not in known]:
        fail(f"{file} was written by a newer version, whose config has {', '.join(newer)}: "
             "update this one")
    if wrong := [k for k, v in config.items() if not is_a(known[k], v)]:
        fail(f"{file} is damaged: its config's {wrong[0]} is {config[wrong[0]]!r:.80}")
    if strange := about["loras"].keys() - {"dit", "vlm"}:
        fail(f"{file} is damaged: it has a LoRA of {min(strange)!r}")
    return about | dict(config=config)


def is_a(kind, value):
    """Is a value, as JSON gives it, one of a field of Config?"""
    if kind is tuple:
        return isinstance(value, list) and all(type(v) in (int, str) for v in value)
    if kind is float:
        return type(value) in (int, float) and isfinite(value)
    return type(value) is kind if isinstance(kind, type) else isinstance(value, kind)


def read_init(name, cfg, dit):
    """-> tensors in fp32, {part: LoraConfig}. name: see Unified.from_preset"""
    path = init_folder(name)
    if file := checkpoint_file(path):
        tensors, metadata = read_safetensors(file)
        about = described(file, metadata)
        if "crc" in about and about["crc"] != crc(tensors):
            fail(f"{file} is damaged: its checksum differs; copy it again")
        return owned(sound(file, tensors)), {
            part: lora_config(config, f"{file}, its LoRA of the {part}")
            for part, config in about["loras"].items()}
    if not lora_files(path):
        return {f"dit.{k}": v for k, v in dit_tensors(str(path), cfg, dit).items()}, {}
    tensors, config = read_lora(path)
    return {f"dit.{k}": v for k, v in owned(tensors).items()}, {"dit": config}


class Ema:
    """An average of the weights that learn: noisy updates, steady evaluation and checkpoints."""

    def __init__(self, params, decay):
        self.params, self.decay = params, decay                  # name -> parameter
        self.extra = {}              # a fork's own state, of tensors and numbers: saved and resumed
        # Without a decay the average is the weights themselves, and no copy of them
        self.mean = {k: p.detach().clone() if decay else p.detach() for k, p in params.items()}

    def update(self, step):
        self.follow(min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def follow(self, d):
        """It keeps the share d of itself."""
        if d:
            mean, now = ([*map(local, x.values())] for x in (self.mean, self.params))
            torch._foreach_lerp_(mean, now, 1 - d)

    @contextmanager
    def applied(self):
        """The model computes with the average; afterwards with its own weights again."""
        if not self.decay:
            yield
            return
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

    def __init__(self, args, model, opt, save):
        """save(ema, folder, step, score) -> a function that writes the weights as they are now;
        every rank calls the first, and one of them the second."""
        self.params = learning(model)
        self.model, self.opt, self.save_weights = model, opt, save
        self.ema = Ema(self.params, args.ema)
        self.data = {}               # what is learned from, {name: Batches}
        self.start, self.position = resume_run(self.ema, args, opt)  # updates done, place in data
        self.writer, self.writing = ThreadPoolExecutor(1), None

    def ready(self):
        """Before each iteration, on every rank"""
        if self.writing and self.writing.done():
            self.written()

    @contextmanager
    def averaged(self):
        """For rank 0 alone: the model computes with the average, all of it. Every rank enters; one
        that has no part of it does nothing."""
        idle = this_rank() and not is_sharded(self.model)
        with nullcontext() if idle else self.ema.applied(), gathered(self.model):
            yield

    def save(self, out, step, score=None, keep=0):
        """A checkpoint, first all that --resume needs, in one file: a run goes on from that,
        whatever else was written. It is of this moment, and written while training goes on. score:
        on what is held out, if it was drawn; keep: see keep_beside. Every rank calls it, since what
        is sharded is put together; rank 0 writes."""
        self.written()
        folder = Path(out) / "ckpt"
        raw = {k: p.detach() for k, p in self.params.items()}
        opt = {k: self.opt.state.get(p, {}) for k, p in self.params.items()}
        state = whole(dict(raw=raw, mean=self.ema.mean, opt=opt, extra=self.ema.extra))
        state |= dict(step=step, data=dict(self.position))
        write_weights = self.save_weights(self.ema, folder, step, score)

        def write():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(Path(out) / CHECKPOINT) as fresh:
                torch.save(state, fresh)
            write_weights()
            keep_beside(out, step, keep)
        if this_rank() == 0:
            self.writing = self.writer.submit(write)

    def written(self):
        """Waits until the last checkpoint is on the disk; one that could not be ends the run."""
        if self.writing:
            self.writing.result()
        self.writing = None


def save_weights(model, ema, folder, step, score=None):
    """The averaged weights, with what --init had changed, so that they stand alone: of a LoRA run
    the LoRA, merged at load. -> a function that writes them, as they are now"""
    def on_disk(tensors):                                  # without peft's wrapping
        return {k.replace(".base_layer", "").replace(".default", ""): v
                for k, v in tensors.items()}
    parts = model.trained | {k.split(".")[0] for k in ema.params if "lora_" not in k}
    learned = {id(p): k for k, p in ema.params.items()}       # a weight may have two names
    tensors = {k: ema.mean[learned[id(v)]].clone() if id(v) in learned else v
               for k, v in model.state_dict(keep_vars=True).items()
               if k not in ema.mean and k.split(".")[0] in parts and "lora_" not in k}
    # A LoRA that learns, or that came with --init to a part which is otherwise the preset's
    loras = {part: (config, mine) for part, (config, mine) in model.adapters.items()
             if not mine or part not in model.trained}
    for part, (_, mine) in loras.items():
        tensors |= {f"{part}.{k}": v for k, v in mine.items()}
    tensors = on_disk(whole(tensors | ema.mean))
    return partial(save_checkpoint, folder, tensors, model.cfg, step, score=score,
                   loras={part: config for part, (config, _) in loras.items()})


def keep_beside(out, step, keep):
    """The weights just saved stay beside those to come: as ckpt/best while none scores higher on
    what is held out, and the last `keep` of them as ckpt/step_00020. None: neither, for weights
    that are more than one file"""
    if keep is None:
        return
    folder = Path(out) / "ckpt"

    def link(name):
        (folder / name).mkdir(exist_ok=True)
        with replacing(folder / name / "model.safetensors") as fresh:
            fresh.unlink()                                       # its name alone is wanted
            try:
                os.link(folder / "model.safetensors", fresh)     # no second copy
            except OSError:                              # not every disk can
                copyfile(folder / "model.safetensors", fresh)
    score, best = (saved_about(place).get("score") for place in (folder, folder / "best"))
    if score is not None and (best is None or score > best):
        link("best")
    if keep:
        link(f"step_{step:05d}")
        ours = [old for old in folder.glob("step_*") if old.name[5:].isdecimal()]
        for old in sorted(ours, key=lambda old: int(old.name[5:]))[:-keep]:
            rmtree(old)


def resume_run(ema, args, opt):
    """Put back raw weights, average and optimiser, where --resume finds them. -> the next step, and
    the place in the data, see all_positions"""
    file = Path(args.out) / CHECKPOINT
    if not args.resume or not file.exists():             # see check_out
        return 0, {}

    def read():
        with ZipFile(file) as records:                   # torch writes checksums, and reads none
            if damaged := records.testzip():
                raise BadZipFile(f"{damaged} is not what was written")
        saved = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        return (saved["raw"], saved["mean"], saved["opt"], saved.get("extra", {}), saved["step"],
                saved.get("data"))                       # older files lack `extra` and `data`
    raw, mean, state, extra, step, position = attempt(
        f"{file} cannot be read, it may be truncated, so start anew in another --out", read)
    if {k: v.shape for k, v in raw.items()} != {k: v.shape for k, v in ema.params.items()}:
        fail(f"{file} belongs to a run that trained other weights: give the flags it had")
    attempt(f"{file} belongs to a run that trained otherwise",
            lambda: opt.load_state_dict(as_optimiser(state, opt, ema.params)))
    if position is None:
        print(f"{file} is an older version's and says nothing of its place in the data, which so "
              "begins anew", file=sys.stderr)
    ema.extra = extra
    with torch.no_grad():
        for k, p in ema.params.items():
            ema.mean[k].copy_(like(mean[k], p))
            p.copy_(like(raw[k], p))                     # last: without a decay it is the mean, too
    return step, position or {}


def as_optimiser(state, opt, params):
    """An optimiser's state by weights' names -> as `opt` numbers them: sharded it has other groups
    than whole. Older checkpoints have their numbers."""
    if "param_groups" in state:          # once a part that does not learn had a group, an empty one
        groups = [g for g in state["param_groups"] if g["params"]]
        return state | dict(param_groups=groups)
    names = {id(p): k for k, p in params.items()}
    order = [p for group in opt.param_groups for p in group["params"]]
    if state.keys() != params.keys():
        raise ValueError("its optimiser has other weights")
    known = {i: {k: like(v, p) if v.shape == p.shape else v for k, v in state[names[id(p)]].items()}
             for i, p in enumerate(order)}
    return dict(state={i: its for i, its in known.items() if its},
                param_groups=opt.state_dict()["param_groups"])
