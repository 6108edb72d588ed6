"""--track: the rows and pictures of a run in the user's own Weights & Biases or TensorBoard."""

import atexit
import os
import re
from importlib.util import find_spec

from common.run import fail, first_line

TRACKERS = ("wandb", "tensorboard")


def check_track(name):
    """The user's error where a tracker is not installed: before anything is loaded."""
    if name and not find_spec(name):
        fail(f"--track {name} needs {name}: pip install {name}")


class Tracker:
    """Says to one of TRACKERS what log.jsonl and samples/ hold."""

    def __init__(self, name, out, config, start=0):
        """out: the run's folder, a Path, whose name the run bears there; one that is resumed goes
        on. config: its flags, {name: value}; start: rows of later steps will come again.
        SystemExit in one line where `name` is not installed."""
        self.writer = self.run = None
        try:
            if name == "wandb":
                import wandb
                self.wandb = wandb
            elif name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
            else:
                fail(f"unknown --track {name!r}; there are: {', '.join(TRACKERS)}")
        except ImportError as e:
            fail(f"--track {name} needs {name}: pip install {name} ({first_line(e)})")
        if name == "wandb":
            # The same folder is the same run there.
            own = re.sub(r"[^\w-]", "-", os.path.basename(out.resolve()))
            file = out / "wandb.id"
            if not file.exists():
                file.write_text(f"{own[:50]}-{os.urandom(4).hex()}")
            self.run = wandb.init(project="nanoumm", name=own, id=file.read_text().strip(),
                                  resume="allow", dir=str(out), config=config)
        else:
            self.writer = SummaryWriter(
                str(out / "tensorboard"), purge_step=start + 1 if start else None)
            self.writer.add_text("flags", "\n".join(f"    {k} {v}" for k, v in config.items()))
            atexit.register(self.writer.close)       # or what was said last is lost

    def row(self, row):
        """A row of log.jsonl, {name: number}, one of which is its `step`."""
        if self.run:
            self.run.log(row, step=row["step"])
            return
        for name, value in row.items():
            if isinstance(value, (int, float)) and name != "step":
                self.writer.add_scalar(name, value, row["step"])

    def picture(self, name, file, step):
        """The PNG of a look."""
        if self.run:
            self.run.log({name: self.wandb.Image(str(file))}, step=step)
            return
        import numpy as np
        from PIL import Image
        with Image.open(file) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()
