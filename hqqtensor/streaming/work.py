"""One process's work on a plan: a thread reads, this one quantizes, another writes."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hqqtensor.serialization.layout import flatten
from hqqtensor.serialization.save import GUARD
from hqqtensor.streaming.folder import RunFolder
from hqqtensor.streaming.pipe import Pipe, Stopped
from hqqtensor.streaming.plan import Batch, Unit
from hqqtensor.streaming.shards import ShardWriter
from hqqtensor.streaming.source import Source
from hqqtensor.streaming.template import OTHER
from hqqtensor.tensor import HQQTensor
from hqqtensor.weight_error import WeightError

AHEAD_BYTES = 32 * 2**20
"""Dense weights that are read ahead of the solver, and quantized ones that wait for the disk, each; or one of more."""

_POLL = 0.2  # seconds between two looks at what other processes have done

Progress = Callable[[int, int, str], None]


class Hung(RuntimeError):
    """Another process has a batch and does not get on with it."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a unit, or the whole, and what follows from its place: whether it ends its unit, and its batch."""

    batch: Batch
    unit: Unit
    first_row: int
    rows: int | None
    ends_unit: bool
    ends_batch: bool

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        target = self.unit.target
        return target.nbytes_read if self.rows is None else target.nbytes_read * self.rows // target.shape[0]


@dataclass(frozen=True, eq=False)
class Result:
    """What is to be written of a piece: tensors by name in the file; beside: those of another dtype than planned."""

    piece: Piece
    tensors: dict[str, Tensor]
    beside: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(t.nbytes for some in (self.tensors, self.beside) for t in some.values())


class Worker:
    """Works on the batches of ``folder`` that no other process has, until all of them are finished.

    quantized: weights that a calibration has quantized, by the id of the plan's; they are only written. error: is told
    of each weight that is quantized here.
    """

    def __init__(
        self, folder: RunFolder, source: Source, progress: Progress | None = None,
        quantized: Mapping[int, nn.Parameter] | None = None, error: WeightError | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.source, self.progress, self.error = folder, source, progress, error
        self.quantized = quantized or {}
        self.claims, self.batches = folder.claims, folder.plan.batches
        self.weights = [sum(map(self._weights_of, batch.units)) for batch in self.batches]
        self.weights_before = sum(unit.weights for batch in self.batches for unit in batch.units) - sum(self.weights)
        self.in_hand: dict[int, int] = {}

    def run(self, patience: float) -> None:
        """Return once every batch is finished, by whomever.

        Hung, naming the process, where another one has a batch and nothing was written for ``patience`` seconds.
        """
        seen, since = set(self.in_hand), time.monotonic()
        self._report("")
        while True:
            self._work_on_free_batches()
            done = self.claims.done(len(self.batches))
            if len(done) == len(self.batches):
                return
            if done != seen:
                seen, since = done, time.monotonic()
                self._report("by other processes")
            left = next(batch for batch in self.batches if batch.number not in done)
            if time.monotonic() - since > patience and (holder := self.claims.holder(left.number)) is not None:
                raise Hung(
                    f"process {holder} has had {left.units[0].name} and more for {patience:.0f} s without finishing; "
                    "end it, and give the command again"
                )
            time.sleep(_POLL)

    def _work_on_free_batches(self) -> None:
        dense: Pipe[tuple[Piece, Tensor]] = Pipe(AHEAD_BYTES)
        results: Pipe[Result] = Pipe(AHEAD_BYTES)
        pieces = self._free_pieces(dense)
        first = next(pieces, None)
        if first is None:
            return
        threads = [
            threading.Thread(target=self._read, args=(first, pieces, dense), name="reader", daemon=True),
            threading.Thread(target=self._write, args=(results,), name="writer", daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            self._quantize(dense, results)
            results.end()
            threads[1].join()
            results.reserve(0)  # raises where the writer stopped
        except Stopped:
            raise self.writers_error from None
        finally:
            dense.stop()
            results.end()
            for thread in threads:
                thread.join(timeout=10)

    def _free_pieces(self, dense: Pipe[tuple[Piece, Tensor]]) -> Iterator[Piece]:
        """The pieces of batches that are claimed, one after the other, as they are asked for.

        A batch is claimed when the solver is about to need it: other processes are to get their share.
        """
        for batch in self.batches:
            dense.wait_until_few(2)
            number = batch.number
            if self.claims.is_done(number) or not self.claims.claim(number) or self.claims.is_done(number):
                continue
            for unit in batch.units:
                ends_batch = unit is batch.units[-1]
                if unit.rows is None or self._calibrated(unit) is not None:
                    yield Piece(batch, unit, 0, None, True, ends_batch)
                    continue
                count = unit.target.shape[0]
                for first in range(0, count, unit.rows):
                    rows = min(unit.rows, count - first)
                    is_last = first + rows == count
                    yield Piece(batch, unit, first, rows, is_last, is_last and ends_batch)

    def _read(self, first: Piece, pieces: Iterator[Piece], dense: Pipe[tuple[Piece, Tensor]]) -> None:
        try:
            piece: Piece | None = first
            while piece is not None:
                dense.reserve(piece.nbytes)
                weight = self._calibrated(piece.unit)
                if weight is None:
                    weight = piece.unit.target.read(self.source, piece.first_row, piece.rows)
                dense.send((piece, weight), piece.nbytes)
                del weight
                piece = next(pieces, None)
            dense.end()
        except Stopped:
            pass
        except BaseException as error:
            dense.end(error)

    def _quantize(self, dense: Pipe[tuple[Piece, Tensor]], results: Pipe[Result]) -> None:
        as_a_whole: set[int] = set()
        while (received := dense.receive()) is not None:
            piece, weight = received
            unit = piece.unit
            del received
            if unit.number not in as_a_whole:
                result = self._result(piece, weight)
                if result.beside and piece.rows is not None:
                    # One scale that does not fit decides for all rows, those that are written already too.
                    as_a_whole.add(unit.number)
            if unit.number in as_a_whole and piece.ends_unit:
                del weight
                whole = Piece(piece.batch, unit, 0, None, True, piece.ends_batch)
                result = self._result(whole, unit.target.read(self.source))
            if unit.number not in as_a_whole or piece.ends_unit:
                results.reserve(result.nbytes)
                results.send(result, result.nbytes)
                del result
            weight = None  # type: ignore[assignment]
            if piece.ends_unit and (count := self._weights_of(unit)):
                self.in_hand[piece.batch.number] = self.in_hand.get(piece.batch.number, 0) + count
                self._report(unit.name)

    def _result(self, piece: Piece, weight: Tensor) -> Result:
        unit, choice = piece.unit, piece.unit.choice
        if choice is None:
            return Result(piece, {unit.name: weight}, {})
        try:
            quantized = weight if isinstance(weight, HQQTensor) else choice.quantize(weight)
            tensors, entry = flatten(unit.name, quantized)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{unit.name}: {str(error).removeprefix('weight: ')}") from None
        if self.error is not None and quantized is not weight:
            self.error.add(weight, quantized)
        beside: dict[str, Tensor] = {}
        for part in unit.parts:
            if part.key == unit.name:
                if piece.first_row == 0:
                    tensors[part.key] = GUARD
                continue
            value = tensors[part.key]
            shape = part.shape if piece.rows is None else (piece.rows, *part.shape[1:])
            if part.is_open and value.dtype == OTHER:
                beside[part.key] = tensors.pop(part.key)
            elif value.dtype != part.dtype or value.shape != shape:
                raise RuntimeError(
                    f"{part.key} became {value.dtype} {list(value.shape)}, planned {part.dtype} {list(shape)}"
                )
        if piece.rows is None and entry != unit.entry:
            raise RuntimeError(f"{unit.name}: stored as {entry}, planned {unit.entry}")
        return Result(piece, tensors, beside)

    def _write(self, results: Pipe[Result]) -> None:
        writer = ShardWriter(self.folder.new, self.folder.side, self.folder.plan)
        try:
            while (result := results.receive()) is not None:
                piece = result.piece
                for key, value in result.tensors.items():
                    writer.write(piece.batch.shard, key, value, piece.first_row)
                for key, value in result.beside.items():
                    writer.write_beside(piece.unit, key, value)
                del result
                if piece.ends_batch:
                    writer.sync()
                    self.claims.set_done(piece.batch.number)
        except BaseException as error:
            self.writers_error = error
            results.stop()
        finally:
            writer.close()

    def _report(self, name: str) -> None:
        if self.progress is None:
            return
        done = self.claims.done(len(self.batches))
        for number in done & self.in_hand.keys():
            del self.in_hand[number]
        finished = self.weights_before + sum(self.weights[number] for number in done)
        self.progress(finished + sum(self.in_hand.values()), self.weights_before + sum(self.weights), name)

    def _calibrated(self, unit: Unit) -> Tensor | None:
        """The unit's weight where a calibration has quantized it."""
        return None if unit.choice is None else self.quantized.get(id(unit.choice.weight))

    def _weights_of(self, unit: Unit) -> int:
        """Elements that are quantized here."""
        return 0 if self._calibrated(unit) is not None else unit.weights
