"""The folder OUT_DIR.unfinished: all of a model that is being written, until one rename puts it into its place.

    run.json            what the run is
    journal, claims     what is finished, and who works on what (``claims``)
    new/                the model
    side/               tensors whose dtype was not the planned one (``shards``)
    old/                the model that is replaced, between two renames
    calibration/        what a calibration has finished (``calibrated``)

Whenever a process is killed, ``settle`` or the same command goes on from what lies there.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from hqqtensor.run_record import NAME, ResumeError, begin, check_same, is_begun
from hqqtensor.serialization.files import DEFAULT_NAME, index_path
from hqqtensor.serialization.publish import index_text
from hqqtensor.serialization.scratch import work_prefix
from hqqtensor.streaming.claims import CLAIMS, JOURNAL, Claims
from hqqtensor.streaming.plan import Plan, Shard
from hqqtensor.streaming.shards import create, is_whole, lay_out_again
from hqqtensor.whole_file import PART, sync_to_disk

ENDING = ".unfinished"
_CALIBRATION = "calibration"
_OURS = {NAME, f"{NAME}{PART}", JOURNAL, CLAIMS, "new", "side", "old", _CALIBRATION}


class Busy(ResumeError):
    """Another process is at work on the same output."""


class Gone(ResumeError):
    """Another process has finished the run while this one came to it."""


def folder_of(out: Path) -> Path:
    """Where ``out`` is written."""
    return out.with_name(f"{out.name}{ENDING}")


class RunFolder:
    """The folder of one run for this process, which joins it; closed by ``close``.

    alone: whether no other process may be at work on it. patience: seconds after which a process that holds up others
    counts as hung. ResumeError where the folder holds another run, or something else; Busy where others are at work and
    may not be.
    """

    def __init__(self, out: Path, plan: Plan, alone: bool, patience: float) -> None:
        self.out, self.path, self.plan, self.patience = out, folder_of(out), plan, patience
        if self.path.exists() and not set(os.listdir(self.path)) <= _OURS:
            if is_begun(self.path):
                check_same(self.path, plan.run)
            raise ResumeError(f"{self.path} is not empty and holds no interrupted run; remove it")
        self.path.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(self.path, plan.run["plan"] + plan.run["model"])
        try:
            with self.claims.setting_up(patience):
                self._join(alone)
        except BaseException:
            self.claims.close()
            raise

    @property
    def new(self) -> Path:
        """The folder of the model."""
        return self.path / "new"

    @property
    def side(self) -> Path:
        """The folder of what does not fit the plan."""
        return self.path / "side"

    @property
    def calibration(self) -> Path:
        """The folder of the calibration."""
        return self.path / _CALIBRATION

    @property
    def holds_work(self) -> bool:
        """Whether something is finished that a later run can go on with."""
        return bool(self.claims.done(len(self.plan.batches))) or is_begun(self.calibration)

    def close(self) -> None:
        """Leave the run to others, or to a later command."""
        self.claims.close()

    def _join(self, alone: bool) -> None:
        if not self.claims.is_in(self.path):
            raise Gone(f"{self.path} was removed by another process")
        if not self.claims.join(alone):
            how = "was started without --workers-join" if not alone else "--workers-join lets several work together"
            raise Busy(f"another process is writing {self.out}; {how}")
        if is_begun(self.path):
            check_same(self.path, self.plan.run)
        self.was_begun = is_begun(self.path)
        self.new.mkdir(exist_ok=True)
        for place, shard in enumerate(self.plan.shards):
            if not is_whole(self.new, shard) and not self._is_laid_out_again(shard):
                self.claims.forget(batch.number for batch in self.plan.batches if batch.shard == place)
                create(self.new, shard)
        if not self.was_begun:
            begin(self.path, self.plan.run)

    def _is_laid_out_again(self, shard: Shard) -> bool:
        """Whether the file has been finished with another dtype than planned, which happens after the last batch."""
        everything = len(self.claims.done(len(self.plan.batches))) == len(self.plan.batches)
        return everything and (self.new / shard.name).is_file() and self.side.is_dir()

    def finish(self, complete: Callable[[Path], None]) -> None:
        """Put the model into its place: index, what ``complete`` adds, one rename; then remove the folder.

        Only for the process that has claimed the end. The model that was there is removed once the new one is.
        """
        shards = lay_out_again(self.new, self.side, self.plan)
        if len(shards) > 1:
            keys = [[part.key for unit in shard.units for part in unit.parts] for shard in shards]
            nbytes = sum(shard.nbytes - len(shard.header) for shard in shards)
            index = index_text([shard.name for shard in shards], keys, nbytes)
            index_path(self.new / DEFAULT_NAME).write_text(index)
        complete(self.new)
        for path in self.new.iterdir():
            sync_to_disk(path)
        sync_to_disk(self.new)
        with self.claims.setting_up(self.patience):
            self._replace()
            _remove(self.path, self.out)

    def _replace(self) -> None:
        old = self.path / "old"
        if self.out.exists():
            self.out.rename(old)
        try:
            self.new.rename(self.out)
        except BaseException:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
            raise
        sync_to_disk(self.out.parent)

    def remove(self) -> None:
        """Remove the folder, for a run that cannot go on."""
        _remove(self.path, self.out)


def _remove(folder: Path, out: Path) -> None:
    """Remove the folder of a run in one step: what a kill leaves of it has a name under which it is only removed."""
    aside = out.with_name(f"{work_prefix(out)}{secrets.token_hex(4)}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def settle(out: Path) -> str:
    """Put in order what a process that was killed at the end of its run left; what was done, in words, or nothing.

    new     old     out
    there   -       any     not finished: the same command goes on
    there   there   -       stopped between the two renames: put the old model back
    there   there   there   the same, and someone has written to ``out`` since: leave both models alone
    -       any     there   finished: remove the folder
    """
    folder = folder_of(out)
    new, old = folder / "new", folder / "old"
    if not (folder / JOURNAL).is_file() or (new.exists() and not old.exists()):
        return ""
    with contextlib.suppress(OSError):
        claims = Claims(folder, "")
        try:
            if not claims.finish():  # its process is alive
                return ""
            if old.exists() and not out.exists():
                old.rename(out)
                return "put the model that was here back after an interrupted run"
            if old.exists() and new.exists():
                return f"the model that an interrupted run was to replace is in {old}"
            if out.exists():
                _remove(folder, out)
        finally:
            claims.close()
    return ""
