"""--shard changes where things lie, and nothing else: the rows of one process and of sharded ranks
are equal, and each can go on with what another has saved."""

import shutil

import pytest
import ranks
import tiny
from safetensors.torch import load_file

FLAGS = ["--steps", 4, "--eval-every", 2, "--batch", 4]
CASES = {"pretrain": ("pretrain", []), "sft": ("sft", []),
         "sft, LoRA, micro": ("sft", ["--lora-rank", 2, "--micro", 1, "--checkpoint"]),
         "sft, bridge, no average": ("sft", ["--train", "bridge", "--ema", 0])}


@pytest.fixture(scope="module")
def photos(parts):
    return ranks.photos_of(parts)


def run(photos, out, name, world, *flags):
    """A script's main in so many processes -> its rows"""
    return tiny.two_ranks(photos, out, name, *FLAGS, *flags, file=ranks.__file__, world=world)


def numbers(rows):
    """What a row says of learning"""
    return [{k: v for k, v in row.items() if k.endswith(("loss", "grad_norm"))} for row in rows]


def near(a, b, tolerance=1e-4):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys()
        assert all(abs(x[k] - y[k]) <= tolerance * max(1, abs(x[k])) for k in x), (x, y)


def weights(out):
    return load_file(out / "ckpt/model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_one_process(photos, tmp_path, case):
    name, flags = CASES[case]
    one = run(photos, tmp_path / "one", name, 1, *flags)
    for world in (2, 4) if case == "sft" else (2,):
        out = tmp_path / f"{world}"
        near(numbers(run(photos, out, name, world, *flags, "--shard")), numbers(one))
        a, b = weights(tmp_path / "one"), weights(out)
        assert a.keys() == b.keys()
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-3


def test_going_on_with_what_others_have_saved(photos, tmp_path):
    """Saved by 2 sharded ranks, gone on with by 1 process, 4 sharded ranks, 2 plain ones: alike."""
    half, known = tmp_path / "half", []
    run(photos, half, "sft", 2, "--shard", "--steps", 2)
    for world, flags in ((1, []), (4, ["--shard"]), (2, [])):
        out = tmp_path / f"{world}"
        shutil.copytree(half, out)
        known.append(numbers(run(photos, out, "sft", world, *flags, "--resume", "--change",
                                 "steps,shard")))
        near(known[-1], known[0])
