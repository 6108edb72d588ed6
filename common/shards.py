"""Shards: tar archives of records, in WebDataset's layout; how a stream is shuffled."""

import re
import tarfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from common.read import PICTURES, regular
from common.run import fail, one_line

MOST_RECORD = 2**28       # bytes of a record
MOST_WAITING = 2**30      # bytes of the records that wait to be drawn from


@dataclass
class Member:
    """A file of a shard, which is read when it is wanted: what waits to be drawn takes no memory,
    and a rank reads its own share alone."""

    shard: Path
    start: int
    size: int

    def read(self):
        with open(self.shard, "rb") as f:
            f.seek(self.start)
            raw = f.read(self.size)
        if len(raw) < self.size:
            raise ValueError(f"{self.shard} is cut or broken behind byte {self.start:,}")
        return raw


MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")        # a record's key, and the member's ending


def members(file, unreadable):
    """A shard -> its records (where, {ending: Member}, folder): neighbours whose names differ
    behind the first dot. The file is opened as a file, whatever its name, and only the headers of
    its members are read; compressed it could unpack to any size."""
    key, raw, size, any_yet = None, {}, 0, False
    try:
        with open(regular(file), "rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0:                              # would lead back, for ever
                    raise ValueError(f"{member.name!r} has {member.size} bytes")
                found = MEMBER.fullmatch(member.name)
                if not found or re.match("__[^/]*__($|/)", member.name):
                    continue
                if not member.isreg() or member.issparse():
                    continue
                if found[1] != key:
                    if raw:
                        yield f"{file}, {key}", raw, file.parent
                    key, raw, size, any_yet = found[1], {}, 0, True
                ending = found[2].lower()
                if ending.rpartition(".")[2] not in PICTURES | {"txt", "json"}:
                    continue
                size += member.size
                if size > MOST_RECORD or ending in raw:
                    unreadable(f"{file}, {member.name}", "more bytes than a record may have" if
                               size > MOST_RECORD else "there is another of this name")
                else:
                    raw[ending] = Member(file, member.offset_data, member.size)
            if raw:
                yield f"{file}, {key}", raw, file.parent
            f.seek(tar.offset)                       # where tarfile saw an end: is it one?
            if any(f.read(tarfile.BLOCKSIZE)):
                raise ValueError(f"is cut or broken at byte {tar.offset:,}")
        if not any_yet:
            raise ValueError("holds no records")
    except OSError as e:         # of the disk: this rank's order would part from the others'
        fail(f"{file} cannot be read on ({one_line(e)}): --resume goes on once it can")
    except Exception as e:                           # of an archive: whatever tarfile may do
        unreadable(f"{file}", e)


def bytes_in(raw):
    if isinstance(raw, (dict, list)):
        return sum(map(bytes_in, raw.values() if isinstance(raw, dict) else raw))
    return len(raw) if isinstance(raw, (bytes, str)) else 0


def shuffled(records, rng, most=2000, least=100):
    """Records in random order, as far as a buffer of `most` of them allows, or MOST_WAITING; it
    fills by two in, one out, as webdataset's does."""
    records, buffer, size = iter(records), [], 0
    for item in records:
        buffer.append(item)
        size += bytes_in(item[1])
        if len(buffer) < most and size < MOST_WAITING:
            buffer += islice(records, 1)
            size += bytes_in(buffer[-1][1]) * (buffer[-1] is not item)
        if len(buffer) >= least or size >= MOST_WAITING:
            item = taken(buffer, rng)
            size -= bytes_in(item[1])
            yield item
    while buffer:
        yield taken(buffer, rng)


def taken(buffer, rng):
    """-> one of a list, at random; it is no longer there."""
    k = rng.randint(0, len(buffer) - 1)
    buffer[k], buffer[-1] = buffer[-1], buffer[k]
    return buffer.pop()
