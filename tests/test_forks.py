"""docs/forking.md: every diff applies to this repository, is short, and its commands run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from data.shapes.prepare import write_shard

MOST = 40                                                        # lines that a fork adds
SECTIONS = {part.partition("\n")[0]: part for part in
            (ROOT / "docs/forking.md").read_text().split("\n## ")[1:]}
FORKS = {name: (re.findall(r"```diff\n(.*?)\n```", part, re.S),
                re.findall(r"```bash\n(.*?)\n```", part, re.S)) for name, part in SECTIONS.items()}


@pytest.fixture
def copy(tmp_path):
    """The scripts, with links to the classroom's weights."""
    for pattern in ("*.py", "benchmarks/*.py", "common/*.py", "common/*.html", "rewards/*.py",
                    "data/shapes/*.py"):
        for file in ROOT.glob(pattern):
            place = tmp_path / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    for folder in ("vae", "vlm", "clip", "dit", "sft", "prompts"):
        (tmp_path / "data/shapes" / folder).symlink_to(ROOT / "data/shapes" / folder)
    (tmp_path / "data/shapes/train").mkdir()
    return tmp_path


def test_there_are_four():
    assert [name for name, (diffs, _) in FORKS.items() if diffs] == [
        "A reward", "A kernel", "A loss", "A DiT"]


@pytest.mark.parametrize("name", [name for name, (diffs, _) in FORKS.items() if diffs])
def test_a_fork_applies_and_runs(copy, name, monkeypatch):
    (diff,), (commands,) = FORKS[name]
    added = [line for line in diff.splitlines() if line.startswith("+") and line[:3] != "+++"]
    assert 0 < len(added) <= MOST
    subprocess.run(["git", "apply", "-"], input=diff + "\n", text=True, cwd=copy, check=True)
    if "sft.py" in commands:
        monkeypatch.setattr("data.shapes.prepare.PER_SHARD", 40)
        write_shard(copy / "data/shapes/train/00000.tar", "a fork")
    for command in commands.splitlines():
        python, *rest = shlex.split(command)
        done = subprocess.run([sys.executable, *rest], cwd=copy, capture_output=True, text=True,
                              env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert python == "python" and done.returncode == 0, done.stderr[-2000:]
    runs = [Path(copy) / out for out in re.findall("--out (\\S+)", commands)]
    for out in runs:
        rows = [json.loads(line) for line in open(out / "log.jsonl")]
        assert rows[-1]["step"] == 2 and (out / "ckpt/model.safetensors").exists()
        # Groups that all agree, on which machines may differ at four images, teach nothing.
        norms = [row["grad_norm"] for row in rows if row["step"] and row.get("kept")]
        norms += [row["grad_norm"] for row in rows if row["step"] and "kept" not in row]
        assert norms and all(norm > 0 for norm in norms)
    if name == "A reward":
        assert all(0 < row["reward_redness"] < 1 for row in map(
            json.loads, open(runs[0] / "log.jsonl")) if row["step"])
