"""Where a run is in its data: threads change nothing, ranks share out every record of a pass, and a
run goes on, on any number of ranks, with what it has not yet learned from."""

import io
import json
import tarfile
from collections import Counter
from itertools import count

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common.data as data_py
from common.data import pairs
from common.presets import Config
from common.shards import members

CFG, N = Config(mmdit=tiny.MMDIT), 47
SIZES = [(16, 16), (16, 24), (24, 16), (16, 16), (40, 16)]       # of buckets, four


def picture(i):
    file = io.BytesIO()
    Image.fromarray(np.full((*SIZES[i % 5], 3), i, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module", params=["folder", "shards"])
def folder(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    if request.param == "folder":
        for i in range(N):
            (home / f"{i}.png").write_bytes(picture(i))
        (home / "metadata.jsonl").write_text("".join(json.dumps(
            dict(file_name=f"{i}.png", prompt=f"{i}")) + "\n" for i in range(N)))
        return home
    for shard in range(5):
        with tarfile.open(home / f"{shard}.tar", "w") as tar:
            for i in range(shard, N, 5):
                for ending, raw in (("png", picture(i)), ("txt", f"{i}".encode())):
                    about = tarfile.TarInfo(f"{i}.{ending}")
                    about.size = len(raw)
                    tar.addfile(about, io.BytesIO(raw))
    return home


def ranks_of(folder, world, position=None, n=2, **more):
    return [pairs(folder, CFG, n, 0, rank, world, position, **more) for rank in range(world)]


def learned(streams, steps):
    """So many batches of each rank -> prompts, in order"""
    return [prompt for _ in range(steps) for stream in streams for prompt in next(stream)[1]]


def place_of(streams, monkeypatch):
    """The position of all ranks, as if each were a process of its own"""
    monkeypatch.setattr(data_py, "all_gather", lambda mine: [
        dict(t2i=stream.position) for stream in streams])
    place = data_py.all_positions(dict(t2i=streams[0]))["t2i"]
    return json.loads(json.dumps(place))                 # as plain as what a checkpoint holds


def test_threads_change_nothing(folder):
    plain, *others = ([next(stream) for stream in ranks_of(folder, 1, workers=k) for _ in range(70)]
                      for k in (0, 1, 3))
    for batches in others:
        assert all(torch.equal(x, y) and p == q for (x, p), (y, q) in zip(plain, batches))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_record_once_a_pass(folder, world):
    """Of the records of two passes each is met twice, but for those that wait for company."""
    streams, seen = ranks_of(folder, world, workers=1), Counter()
    for stream in streams:
        for k in count():
            _, prompts = next(stream)
            if stream.position["done"][0] == 2:          # this batch is of the third pass
                break
            seen.update(prompts)
    assert set(seen) == {f"{i}" for i in range(N)} and max(seen.values()) == 2
    assert 2 * N - sum(seen.values()) <= world * (4 + 2)


@pytest.mark.parametrize("steps", [1, 7, 11, 23, 40])
def test_going_on(folder, steps, monkeypatch):
    """On as many ranks: the very batches. On others: what is left of the pass, each record once."""
    streams = ranks_of(folder, 2)
    before = learned(streams, steps)
    place = place_of(streams, monkeypatch)
    after = learned(streams, 30)
    assert learned(ranks_of(folder, 2, place, workers=2), 30) == after
    for world in (1, 3, 4):
        new = ranks_of(folder, world, place)
        said = Counter(before + learned(new, 60 // world))
        assert max(said.values()) - min(said.values()) <= 2
        assert sum(said.values()) == len(before) + 2 * world * (60 // world)


def test_going_on_again(folder, monkeypatch):
    """On fewer ranks and at once on others: what was learned before both is not learned again."""
    four = ranks_of(folder, 4)
    said = Counter(learned(four, 30))
    place = place_of(four, monkeypatch)
    for world, steps in ((1, 3), (3, 2), (2, 20)):
        streams = ranks_of(folder, world, place)
        said.update(learned(streams, steps))
        place = place_of(streams, monkeypatch)
    assert max(said.values()) - min(said.values()) <= 2


def test_what_was_read_before_counts_as_read(tmp_path, monkeypatch, capsys):
    """A few broken shards are a small share of all, also after a restart that passes them by."""
    for shard in range(40):
        with tarfile.open(tmp_path / f"{shard:02}.tar", "w") as tar:
            for i in range(50):
                for ending, raw in (("png", picture(0)), ("txt", b"x")):
                    about = tarfile.TarInfo(f"{i}.{ending}")
                    about.size = len(raw)
                    tar.addfile(about, io.BytesIO(raw))
    for shard in (3, 14, 25):
        file = tmp_path / f"{shard:02}.tar"
        file.write_bytes(file.read_bytes()[:5000])
    streams = ranks_of(tmp_path, 1, n=8)
    learned(streams, 260)                                # more than a pass
    place = place_of(streams, monkeypatch)
    assert learned(ranks_of(tmp_path, 1, place, n=8), 5) == learned(streams, 5)


def test_a_shard_that_the_disk_does_not_give(tmp_path, monkeypatch):
    """Its records are not broken: left out on one rank, they would shift what all others read."""
    def gone(tar):
        raise OSError(5, "Input/output error")
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    monkeypatch.setattr("tarfile.TarFile.next", gone)
    with pytest.raises(SystemExit, match="cannot be read on .*Input/output error"):
        list(members(tmp_path / "0.tar", lambda where, e: pytest.fail(where)))


def test_fewer_pictures_than_ranks(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(0))
        (tmp_path / f"{i}.txt").write_text(f"{i}")
    for stream in ranks_of(tmp_path, 8, n=1):
        assert len(next(stream)[1]) == 1


def test_one_size_on_any_ranks(tmp_path, monkeypatch):
    """Where all are of one size, another number of ranks goes on with the same batches."""
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(picture(5 * i))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(
        dict(file_name=f"{i}.png", prompt=f"{i}")) + "\n" for i in range(N)))

    def batches(streams, steps):
        return [{prompt for stream in streams for prompt in next(stream)[1]} for _ in range(steps)]
    whole = batches(ranks_of(tmp_path, 1, n=12), 20)
    four = ranks_of(tmp_path, 4, n=3)
    assert batches(four, 7) == whole[:7]
    place = place_of(four, monkeypatch)
    for world in (1, 2, 3, 4):
        assert batches(ranks_of(tmp_path, world, place, n=12 // world), 13) == whole[7:]
