"""Rewards by name.

A reward is a function f(images, rows) -> (N,) floats, higher is better, NaN where it cannot score.
images: uint8 (N,3,H,W) on the CPU; rows: N dicts, each image's row of the prompt file, to which
training adds `group`, the number of its group. Yours is one flag away:

    # my_file.py
    def redness(images, rows):
        return images[:, 0].float().mean((1, 2)) / 255

    python grpo.py --reward my_file.py:redness        # mixed: geneval:0.8,my_file.py:redness:0.2

One that takes a third argument called `judge` gets the run's vision-language judge: judge.ask_all.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

REWARDS = {                       # name -> the module where the function of that name stands
    "geneval": "rewards.geneval", "geneval_strict": "rewards.geneval", "ocr": "rewards.ocr",
    "clip": "rewards.clip", "clip_direction": "rewards.clip", "clip_image": "rewards.clip",
    "pickscore": "rewards.clip", "aesthetic": "rewards.clip", "hpsv2": "rewards.clip",
    "preference": "rewards.judge", "judge": "rewards.judge", "edit": "rewards.edit",
    "edit_judge": "rewards.judge", "edit_model": "rewards.edit",
    "jpeg_compressibility": "rewards.jpeg", "jpeg_incompressibility": "rewards.jpeg",
}


@cache
def load_file(path):
    """A Python file -> its module."""
    spec = spec_from_file_location(Path(path).stem, path)
    module = module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module


def find(name):
    """A built-in reward's name, or "file.py:function" -> the function; or ValueError."""
    file, _, function = name.rpartition(":")
    if file.endswith(".py"):
        if not Path(file).is_file():
            raise ValueError(f"reward {name!r}: there is no file {file}")
        try:
            module = load_file(str(Path(file).resolve()))
        except Exception as e:                       # whatever a user's file may do wrong
            raise ValueError(f"reward {name!r}: {file} cannot be loaded, {type(e).__name__}: {e}")
        if not callable(getattr(module, function, None)):
            raise ValueError(f"reward {name!r}: {file} has no function {function!r}")
        return getattr(module, function)
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; valid: {', '.join(REWARDS)}, or "
                         "my_file.py:function")
    where = REWARDS[name]
    return where if callable(where) else getattr(import_module(where), name)
