"""The output files while they are written: each tensor at its place, by any number of processes."""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from hqqtensor.streaming.plan import Plan, Shard, Unit, make_shard
from hqqtensor.whole_file import close_unchanged

_COPIED = 16 * 2**20  # bytes at a time


def side_file(side: Path, unit: Unit, key: str) -> Path:
    """Where a part lies whose dtype is not the planned one, until its file is laid out again."""
    return side / f"{unit.number:06}-{[part.key for part in unit.parts].index(key)}"


def create(folder: Path, shard: Shard) -> None:
    """The file of ``shard`` with its header and its full size, of which the file system need not have any yet."""
    with open(folder / shard.name, "wb") as file:
        file.truncate(shard.nbytes)
        file.write(shard.header)
        file.flush()
        os.fsync(file.fileno())


def is_whole(folder: Path, shard: Shard) -> bool:
    """Whether the file is there with its size and its header."""
    path = folder / shard.name
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size == shard.nbytes and file.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        return False


class ShardWriter:
    """Writes tensors to their places in the files of ``folder``; those of another dtype than planned, to ``side``."""

    def __init__(self, folder: Path, side: Path, plan: Plan) -> None:
        self.folder, self.side, self.plan = folder, side, plan
        self.handles: dict[int, int] = {}
        self.unsynced: set[int] = set()

    def close(self) -> None:
        """Close the files. What is to last was synced before, so that an error here says nothing."""
        while self.handles:
            close_unchanged(self.handles.popitem()[1])

    def write(self, shard: int, key: str, value: Tensor, first_row: int = 0) -> None:
        """Write ``value``, the rows of the tensor ``key`` from ``first_row`` on; it is the last user of its memory."""
        begin = self.plan.shards[shard].begins[key]
        value = value.contiguous()
        if first_row:
            begin += first_row * (value.nbytes // value.shape[0])
        self.unsynced.add(self._handle(shard))
        _write_at(self._handle(shard), _bytes_of(value), begin)

    def write_beside(self, unit: Unit, key: str, value: Tensor) -> None:
        """Write a whole part of another dtype than the planned one; on disk when this returns."""
        self.side.mkdir(exist_ok=True)
        path = side_file(self.side, unit, key)
        with open(path.with_suffix(".part"), "wb") as file:
            file.write(_bytes_of(value.contiguous()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".part"), path)

    def sync(self) -> None:
        """Return when all that was written is on disk."""
        while self.unsynced:
            os.fdatasync(self.unsynced.pop())

    def _handle(self, shard: int) -> int:
        if shard not in self.handles:
            self.handles[shard] = os.open(self.folder / self.plan.shards[shard].name, os.O_WRONLY)
        return self.handles[shard]


def lay_out_again(folder: Path, side: Path, plan: Plan) -> list[Shard]:
    """Move the parts of files in which the dtype of a scale was not the planned one; the shards as they are then.

    A file is replaced in one step, so that this can be repeated after a kill.
    """
    present = {int(path.name[:6]) for path in side.iterdir() if not path.suffix} if side.is_dir() else set()
    shards = []
    for shard in plan.shards:
        other = present & {unit.number for unit in shard.units}
        new = make_shard(shard.name, shard.units, plan.metadata, other) if other else shard
        if other and not is_whole(folder, new):
            _rewrite(folder, side, shard, new, other)
        shards.append(new)
    return shards


def _rewrite(folder: Path, side: Path, old: Shard, new: Shard, other: set[int]) -> None:
    target = folder / f"{new.name}.part"
    with open(target, "wb") as out, open(folder / old.name, "rb") as source:
        out.truncate(new.nbytes)
        out.write(new.header)
        for unit in new.units:
            for part in unit.parts:
                out.seek(new.begins[part.key])
                if unit.number in other and part.is_open:
                    with open(side_file(side, unit, part.key), "rb") as file:
                        shutil.copyfileobj(file, out, _COPIED)
                    continue
                source.seek(old.begins[part.key])
                left = part.nbytes
                while left:
                    left -= out.write(source.read(min(left, _COPIED)))
        out.flush()
        os.fsync(out.fileno())
    os.replace(target, folder / new.name)


def _bytes_of(value: Tensor) -> memoryview:
    return value.detach().reshape(-1).view(torch.uint8).numpy().data


def _write_at(handle: int, data: memoryview, begin: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done : done + _COPIED], begin + done)
