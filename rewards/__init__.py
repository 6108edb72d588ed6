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

from importlib import import_module

from common.run import from_file

REWARDS = {                       # name -> the module where the function of that name stands
    "geneval": "rewards.geneval", "geneval_strict": "rewards.geneval", "ocr": "rewards.ocr",
    "clip": "rewards.clip", "clip_direction": "rewards.clip", "clip_image": "rewards.clip",
    "pickscore": "rewards.clip", "aesthetic": "rewards.clip", "hpsv2": "rewards.clip",
    "preference": "rewards.judge", "judge": "rewards.judge", "edit": "rewards.edit",
    "edit_judge": "rewards.judge", "edit_model": "rewards.edit",
    "jpeg_compressibility": "rewards.jpeg", "jpeg_incompressibility": "rewards.jpeg",
}


def find(name):
    """A built-in reward's name, or "file.py:function" -> the function; or ValueError."""
    if name.rpartition(":")[0].endswith(".py"):
        return from_file(name)
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; valid: {', '.join(REWARDS)}, or "
                         "my_file.py:function")
    where = REWARDS[name]
    return where if callable(where) else getattr(import_module(where), name)
