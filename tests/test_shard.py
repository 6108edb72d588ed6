"""--shard changes where things lie, and nothing else: the rows of one process and of sharded ranks
are equal, and each can go on with what another has saved."""

import shutil

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file
from test_reflect import teach
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from common.run import setup
from common.sana import SanaDiT
from common.shard import share_out, whole
from test_edit import SANA


FIVE = ["--steps", 5]
FLAGS = [*FIVE, "--eval-every", 2, "--batch", 4]
ANCHORED = ["--beta", 0.1, "--updates", 2, "--final-bench"]
RL = {"grpo": ("grpo", ANCHORED), "grpo, LoRA": ("grpo", ["--lora-rank", 2, *ANCHORED]),
      "grpo, DiT alone": ("grpo", ["--train", "dit", "--ema", 0]),
      "cycle_edit": ("cycle_edit", ANCHORED),
      "reflect": ("reflect", ["--redraw", 4, *ANCHORED]),
      "cot": ("reflect", ["--task", "cot", *ANCHORED]),
      "cot, LoRAs": ("reflect", ["--task", "cot", "--lora-rank", 2, "--vlm-lora-rank", 2])}
CASES = {"pretrain": ("pretrain", []), "sft": ("sft", []),
         "sft, LoRA, micro": ("sft", ["--lora-rank", 2, "--micro", 1, "--checkpoint"]),
         "sft, bridge, no average": ("sft", ["--train", "bridge", "--ema", 0])}


@pytest.fixture(scope="module")
def photos(parts):
    return ranks.photos_of(parts)


@pytest.fixture(scope="module")
def talker(parts, tmp_path_factory):
    return teach(parts, tmp_path_factory.mktemp("shard") / "talker")


def run(photos, out, name, world, *flags, near=0):
    """A script's main in so many processes, `near` on a node -> its rows"""
    return ranks.rows(out, lambda: ranks.play(photos, out, name, *flags), world, near)


def numbers(rows):
    """What a row says of learning; statistics of ratios are means over ranks, not over rows"""
    told = "loss", "grad_norm", "reward_blue", "kept", "score", "accuracy", "redrawn"
    return [{k: v for k, v in row.items() if k.endswith(told)} for row in rows]


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
    one = run(photos, tmp_path / "one", name, 1, *FLAGS, *flags)
    for world in (2, 4) if case == "sft" else (2,):
        out = tmp_path / f"{world}"
        near(numbers(run(photos, out, name, world, *FLAGS, *flags, "--shard")), numbers(one))
        a, b = weights(tmp_path / "one"), weights(out)
        assert a.keys() == b.keys()
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-3


@pytest.mark.parametrize("name, flags", [("sft", FLAGS), ("grpo", [*FIVE, *ANCHORED])])
def test_nodes_have_all_parts_each(photos, tmp_path, name, flags):
    """HSDP: two nodes of two; what they have saved a single process goes on with."""
    more = ["--init", photos / "sft"] if name == "grpo" else []
    one = run(photos, tmp_path / "one", name, 1, *flags, *more)
    four = run(photos, tmp_path / "four", name, 4, *flags, *more, "--shard", near=2)
    near(numbers(four), numbers(one))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "four")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-3
    six = run(photos, tmp_path / "four", name, 1, *flags, *more, "--resume", "--change", "shard",
              "--no-shard", "--steps", 6)
    assert len(six) == len(four) + 1


@pytest.mark.parametrize("case", RL)
def test_rows_of_reinforcement_learning(parts, talker, tmp_path, case):
    """One of four prompts has a reward that is constant: a rank of four has nothing to learn from.
    First pictures are redrawn where a rank's model says no."""
    name, flags = RL[case]
    folder = talker if case == "reflect" else parts
    flags = ["--init", folder / "sft", *FIVE, *flags]
    known = []
    for world in (1, 2, 4) if case in ("grpo", "reflect") else (1, 2):
        shard = ["--shard"] if world > 1 else []
        out = tmp_path / f"{world}"
        known.append(numbers(run(folder, out, name, world, *flags, *shard)))
        near(known[-1], known[0])
    assert known[0][1]["grad_norm"] > 1e-3 and known[0][1].get("redrawn", 1) > 0


def test_what_cannot_be_shared_is_refused(parts, tmp_path):
    def words():
        with pytest.raises(SystemExit, match="stays whole"):
            ranks.play(parts, tmp_path / "x", "reflect", "--train", "lm", "--shard")
    ranks.together(1, words, tmp_path / "said")
    with pytest.raises(SystemExit, match="torchrun"):
        tiny.play(parts, tmp_path / "x", "--shard")
    assert not (tmp_path / "x").exists()


def test_a_rank_without_references(tmp_path):
    """It has no gradient of SANA's weights for them; the sum over ranks is the other's."""
    def work():
        rank, _, device = setup()
        dit = SanaDiT(**SANA)
        tiny.randomise(dit)
        model = torch.nn.ModuleDict(dict(dit=dit, bridge=torch.nn.Identity()))
        share_out(model, device)
        x, refs = torch.ones(2, 4, 16, 16), [[torch.ones(4, 16, 16)]] * 2
        v = dit(x, torch.full((2,), 0.5), torch.ones(2, 5, 32), refs=None if rank else refs)
        v.square().sum().backward()
        grads = {name: p.grad.full_tensor() for name, p in dit.named_parameters()}
        assert all(grad.isfinite().all() for grad in grads.values())
        assert any(grad.abs().max() > 0 for name, grad in grads.items() if "ref_" in name)
    ranks.together(2, work, tmp_path / "said")


def test_what_is_saved_is_copied_on_one_rank(tmp_path):
    """A host has no room for as many copies as it has GPUs."""
    def held():
        rank, _, _ = setup()
        part = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])
        got = whole(dict(part=part, more=[torch.ones(2)], step=3))
        assert got["step"] == 3 and part.to_local().tolist() == [[0, 1], [2, 3]][rank]
        assert [got["part"], *got["more"]] == [None, None] if rank else (
            got["part"].tolist() == [0, 1, 2, 3] and got["more"][0].tolist() == [1, 1])
    ranks.together(2, held, tmp_path / "said")


def test_going_on_with_what_others_have_saved(photos, tmp_path):
    """Saved by 4 sharded ranks, gone on with by 1 process, 2 sharded ranks, 4 plain ones: alike."""
    half, known = tmp_path / "half", []
    run(photos, half, "sft", 4, *FLAGS, "--shard", "--steps", 2)
    for world, flags in ((1, []), (2, ["--shard"]), (4, ["--no-shard"])):
        out = tmp_path / f"{world}"
        shutil.copytree(half, out)
        known.append(numbers(run(photos, out, "sft", world, *FLAGS, *flags, "--resume")))
        near(known[-1], known[0])
