"""Rewards of edits: the classroom's strict checker, and a judge that learns (UniPic2's
Skywork-EditReward): a VLM reads source, edited image and instruction; of the state after the last
token a linear layer makes a score. labs/edit_reward.py trains it.
"""

import copy
import math
import os
from functools import cache
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.read import arrays
from common.run import fail, has_bf16, writing
from common.weights import pretrained, read_safetensors
from data.shapes.edits import check_edit
from rewards.judge import turns
from rewards.shared import MODELS, able, processor, sources, to_device


def edit(images, rows):
    """The strict checker of the known world: success x preservation in [0,1]; no edit earns 0."""
    R, which = torch.full((len(rows),), math.nan), able("edit", rows)
    for i, x in zip(which, arrays(images[which])):
        v = check_edit(x, rows[i])
        R[i] = v["success"] * v["preservation"]
    return R


class EditReward(torch.nn.Module):
    """name: a VLM's folder, or owner/repo on the Hub; with head.safetensors one that save wrote.
    Skywork has published neither template nor head, only "regression loss": these are ours."""

    def __init__(self, name):
        super().__init__()
        # Eager attention on a CPU: the fused kernel's backward is 3 times slower there.
        self.vlm = pretrained(AutoModelForImageTextToText, name, dtype=torch.float32,
                              attn_implementation="sdpa" if torch.cuda.is_available() else "eager")
        self.feed = processor(AutoProcessor, name)
        self.feed.tokenizer.padding_side = "left"                # each row's last token is its last
        self.head = torch.nn.Linear(self.vlm.config.get_text_config().hidden_size, 1)
        for p in self.head.parameters():
            torch.nn.init.zeros_(p)                              # on every rank the same
        if (file := Path(name) / "head.safetensors").exists():
            self.head.load_state_dict(read_safetensors(file)[0])

    def forward(self, olds, news, instructions):
        """Lists of N uint8 (H,W,3) images, N strings -> scores (N,) fp32"""
        x = turns(self.feed, list(zip(zip(olds, news), instructions)))
        device = self.head.weight.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16()):
            states = self.vlm.model(**x.to(device), use_cache=False).last_hidden_state
        return self.head(states[:, -1].float())[:, 0]                            # (N,)

    def save(self, folder):
        """A folder of the VLM, a LoRA merged, as transformers has it, and head.safetensors."""
        folder, new = Path(folder), Path(f"{folder}.tmp")
        new.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        vlm = copy.deepcopy(self.vlm)
        for name, layer in list(vlm.named_modules()):
            if isinstance(layer, LoraLayer):
                layer.merge()
                vlm.set_submodule(name, layer.get_base_layer())
        with writing(folder):
            vlm.save_pretrained(new)
            self.feed.save_pretrained(new)
            save_file(dict(self.head.state_dict()), new / "head.safetensors")
            for f in new.iterdir():
                os.replace(f, folder / f.name)
            new.rmdir()


@cache
def edit_reward(folder):
    if not (Path(folder) / "head.safetensors").exists():
        fail(f"no edit reward model at {folder}: python labs/edit_reward.py trains one")
    return to_device(EditReward(folder))


@torch.no_grad()
def edit_model(images, rows):
    """The score of EditReward, about [0,1], from MODELS["edit_model"]."""
    R, which = torch.full((len(rows),), math.nan), able("edit_model", rows)
    for some in (which[a : a + 32] for a in range(0, len(which), 32)):
        R[some] = edit_reward(MODELS["edit_model"])(
            sources(rows, some), list(arrays(images[some])),
            [rows[i]["instruction"] for i in some]).cpu()
    return R
