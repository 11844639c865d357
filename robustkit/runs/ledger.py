"""The run's database: one row per verdict, one transaction per chunk, so that any kill loses one chunk.

SQLite with a write-ahead log while the run is open; `seal` turns it into one plain file. Every chunk carries
a sha256 over its own row and its verdicts' rows: a changed byte is found when the ledger is opened or verified.
"""

from __future__ import annotations

import hashlib
import sqlite3
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from robustkit.core.errors import RunError, UsageError
from robustkit.core.flags import Flag
from robustkit.core.schema import checked, parse
from robustkit.core.writing import refuse_link
from robustkit.runs.ledger_schema import COLUMNS, DISTANCES, FILES, IMPOSSIBLE, SCHEMA
from robustkit.runs.spec import dumps


@dataclass(frozen=True)
class Verdict:
    """One judged image in one stage. Stage 0 is the clean pass, stage s > 0 the suite's attack s - 1.

    `image` is the sha256 of the clean image's float32 bytes; `adversarial` the float32 bytes of the fooling
    one. `margin` is the label's logit minus the largest other. Of a random model both are means over draws, and
    three more values are stored: the share of fresh draws that were correct (`right`), whether the first draw was
    (`once`), and whether any single draw during the attack was wrong (`struck`). In runs for minimum norms
    `distance` is that of the fooling image. The names of the fields are part of the digests in stored ledgers.
    """

    position: int
    label: int
    prediction: int
    margin: float
    fooled: bool
    image: str
    adversarial: bytes | None = None
    right: float | None = None
    once: int | None = None
    struck: int | None = None
    distance: float | None = None


_NAMES = [field.name for field in fields(Verdict)]


@dataclass(frozen=True)
class Chunk:
    """A piece of work that the ledger stores atomically."""

    stage: int
    chunk: int
    forwards: int
    backwards: int
    seconds: float
    verdicts: Sequence[Verdict] = ()
    flags: Sequence[Flag] = ()

    @property
    def digest(self) -> str:
        """The sha256 over everything in it."""
        head = dumps([self.stage, self.chunk, self.forwards, self.backwards, self.seconds, self.flags])
        total = hashlib.sha256(head.encode())
        for verdict in self.verdicts:
            row = {name: getattr(verdict, name) for name in _NAMES}
            if verdict.distance is None:
                del row["distance"]
            total.update(dumps({**row, "adversarial": None}).encode())
            total.update(verdict.adversarial or b"-")
        return total.hexdigest()


class Ledger:
    """The open ledger of one run. Use as a context manager."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._db = connection
        self._name = name

    @classmethod
    def open(cls, path: Path | None, run_id: str) -> Ledger:
        """Open or create the ledger at `path` (None: in memory) for writing.

        Raises:
            UsageError: if the file is damaged or belongs to another run.
            RunError: if the disk is full or cannot be written.
        """
        name = str(path or "in memory")
        if path is not None:
            refuse_link(*(path.with_name(path.name + ending) for ending in FILES))
        with _explained(name):
            # A driver of workers writes in a thread of its own, and waits for it before it uses the ledger itself.
            db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            ledger = cls(db, name)
            ledger._refuse_other_tables()
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            if not db.execute("SELECT name FROM sqlite_master").fetchall():
                with ledger._transaction():
                    for statement in filter(str.strip, SCHEMA.split(";")):
                        db.execute(statement)
                    db.execute("INSERT INTO meta VALUES ('run_id', ?)", [run_id])
            ledger._check(run_id)
        return ledger

    @classmethod
    def is_unattacked(cls, path: Path) -> bool:
        """Return whether a ledger holds nothing but a clean pass, or is absent; UsageError if it is damaged."""
        if not path.is_file() or not path.stat().st_size:
            return True
        refuse_link(*(path.with_name(path.name + ending) for ending in FILES))
        with _explained(str(path)), closing(sqlite3.connect(path)) as db:
            cls(db, str(path))._refuse_other_tables()
            if not db.execute("SELECT name FROM sqlite_master WHERE name = 'chunks'").fetchall():
                return True
            return not db.execute("SELECT 1 FROM chunks WHERE stage > 0 LIMIT 1").fetchall()

    @classmethod
    def read(cls, path: Path, run_id: str) -> Ledger:
        """Open a sealed ledger for reading; UsageError if it is absent, damaged or of another run."""
        if not path.is_file():
            raise UsageError(f"{path} is missing; the run cannot be checked without its ledger.")
        with _explained(str(path)):
            db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            ledger = cls(db, str(path))
            ledger._refuse_other_tables()
            ledger._check(run_id)
        return ledger

    def require(self, images: int, size: int, stages: int) -> None:
        """Refuse rows that no run with this many images writes.

        Args:
            images: how many the run has.
            size: of each adversarial, in bytes.
            stages: the highest number of a stage.

        Raises:
            UsageError: a row has an unknown stage or image, or a value that no run writes.
        """
        limits = {"last": images - 1, "size": size, "stages": stages}
        with _explained(self._name):
            for table, condition in IMPOSSIBLE.items():
                if table == "distances" and not self._measured:
                    continue
                row = self._db.execute(f"SELECT rowid FROM {table} WHERE {condition} LIMIT 1", limits).fetchone()
                if row is not None:
                    raise _damaged(self._name, f"row {row[0]} of its {table} is of no run of {images} images")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def write(self, *chunks: Chunk) -> None:
        """Store chunks, all of them whole or none at all; RunError if the disk is full."""
        with _explained(self._name), self._transaction():
            for chunk in chunks:
                self._insert(chunk)

    def _insert(self, chunk: Chunk) -> None:
        self._db.execute(
            "INSERT INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                chunk.stage,
                chunk.chunk,
                chunk.forwards,
                chunk.backwards,
                chunk.seconds,
                dumps(list(chunk.flags)),
                chunk.digest,
            ],
        )
        self._db.executemany(
            f"INSERT INTO verdicts (stage, chunk, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                [
                    chunk.stage,
                    chunk.chunk,
                    v.position,
                    v.label,
                    v.prediction,
                    v.margin,
                    v.fooled,
                    v.image,
                    v.adversarial,
                    v.right,
                    v.once,
                    v.struck,
                ]
                for v in chunk.verdicts
            ),
        )
        distances = [(chunk.stage, v.position, v.distance) for v in chunk.verdicts if v.distance is not None]
        if distances:
            if not self._measured:
                self._db.execute(DISTANCES)
            self._db.executemany("INSERT INTO distances VALUES (?, ?, ?)", distances)

    @property
    def _measured(self) -> bool:
        """Whether it has distances."""
        return bool(self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'distances'").fetchall())

    def chunks(self) -> Iterator[Chunk]:
        """Yield every chunk in the order of stages, with its verdicts; UsageError at a damaged one."""
        with _explained(self._name):
            columns, tables = COLUMNS, "verdicts"
            if self._measured:
                columns, tables = f"{COLUMNS}, distance", "verdicts LEFT JOIN distances USING (stage, position)"
            heads = self._db.execute(
                "SELECT stage, chunk, forwards, backwards, seconds, flags, digest FROM chunks "
                "ORDER BY stage, chunk"
            ).fetchall()
            for stage, number, forwards, backwards, seconds, flags, digest in heads:
                rows = self._db.execute(
                    f"SELECT {columns} FROM {tables} WHERE stage = ? AND chunk = ? ORDER BY verdicts.rowid",
                    [stage, number],
                )
                verdicts = [replace(Verdict(*row), fooled=bool(row[4])) for row in rows]
                chunk = Chunk(
                    stage,
                    number,
                    forwards,
                    backwards,
                    seconds,
                    verdicts,
                    checked(Sequence[Flag], parse(flags, self._name), self._name),
                )
                if chunk.digest != digest:
                    raise _damaged(self._name, f"chunk {number} of stage {stage} does not match its sha256")
                yield chunk

    def check_chunks(self) -> None:
        """Raise UsageError at a chunk that does not match its sha256."""
        for _ in self.chunks():
            pass

    def fooled(self) -> Iterator[tuple[int, int, int]]:
        """Yield position, label and prediction of every fooling image, by position."""
        query = "SELECT position, label, prediction FROM verdicts WHERE adversarial IS NOT NULL ORDER BY position"
        with _explained(self._name):
            yield from self._db.execute(query)

    def adversarials(self) -> Iterator[bytes]:
        """Yield the float32 bytes of every fooling image, in the same order."""
        query = "SELECT rowid FROM verdicts WHERE adversarial IS NOT NULL ORDER BY position"
        with _explained(self._name):
            # One by one: to sort the images themselves SQLite would copy them all.
            for row in array("q", (row for (row,) in self._db.execute(query))):
                yield from self._db.execute("SELECT adversarial FROM verdicts WHERE rowid = ?", [row]).fetchone()

    def crafted(self, stage: int) -> Iterator[tuple[int, bool, bytes]]:
        """Yield position, whether the surrogates were fooled, and float32 bytes of a stage's images, in order."""
        query = (
            "SELECT position, fooled, adversarial FROM verdicts "
            "WHERE stage = ? AND adversarial IS NOT NULL ORDER BY position"
        )
        with _explained(self._name):
            for position, fooled, image in self._db.execute(query, [stage]):
                yield position, bool(fooled), image

    def image(self, stage: int, position: int) -> bytes:
        """Return the float32 bytes of one of a stage's images."""
        query = "SELECT adversarial FROM verdicts WHERE stage = ? AND position = ?"
        with _explained(self._name):
            (image,) = self._db.execute(query, [stage, position]).fetchone()
        return bytes(image)

    def predictions(self, stage: int) -> list[tuple[int, int]]:
        """Return position and prediction of every row of a stage, in order."""
        query = "SELECT position, prediction FROM verdicts WHERE stage = ? ORDER BY position"
        with _explained(self._name):
            return self._db.execute(query, [stage]).fetchall()

    def cost(self, stage: int) -> tuple[int, int, float]:
        """Return the forwards, backwards and seconds of a stage so far."""
        query = "SELECT total(forwards), total(backwards), total(seconds) FROM chunks WHERE stage = ?"
        with _explained(self._name):
            forwards, backwards, seconds = self._db.execute(query, [stage]).fetchone()
        return int(forwards), int(backwards), float(seconds)

    def note(self, key: str, value: str) -> str:
        """Store a text under a key unless the key has one already; return the stored one."""
        with _explained(self._name):
            self._db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", [key, value])
            (kept,) = self._db.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchone()
        return str(kept)

    def read_note(self, key: str) -> str | None:
        """Return the text stored under a key, None if there is none."""
        with _explained(self._name):
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchone()
        return None if row is None else str(row[0])

    def write_note(self, key: str, value: str) -> None:
        """Store a text under a key, replacing any other."""
        with _explained(self._name):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [key, value])

    def count(self) -> int:
        """Return how many chunks there are."""
        with _explained(self._name):
            (chunks,) = self._db.execute("SELECT count(*) FROM chunks").fetchone()
        return int(chunks)

    def seal(self) -> None:
        """Merge the write-ahead log, so that the ledger is one file that no longer changes."""
        with _explained(self._name):
            self._db.execute("PRAGMA journal_mode = DELETE")

    def _refuse_other_tables(self) -> None:
        """Raise UsageError for objects that no ledger has: an added view or trigger may compute for ever."""
        known = {_written(statement) for statement in [*SCHEMA.split(";"), DISTANCES]}
        for name, statement in self._db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
            if _written(statement) not in known:
                raise _damaged(self._name, f"its {name!r} is not that of a ledger")

    def _check(self, run_id: str) -> None:
        (health,) = self._db.execute("PRAGMA integrity_check").fetchone()
        if health != "ok":
            raise _damaged(self._name, health.splitlines()[-1])
        row = self._db.execute("SELECT value FROM meta WHERE key = 'run_id'").fetchone()
        if row is None or row[0] != run_id:
            raise UsageError(
                f"{self._name} belongs to run {row[0] if row else 'unknown'}, not {run_id}; "
                "give another --out folder."
            )
        (loose,) = self._db.execute(
            "SELECT count(*) FROM verdicts v WHERE NOT EXISTS "
            "(SELECT 1 FROM chunks c WHERE c.stage = v.stage AND c.chunk = v.chunk)"
        ).fetchone()
        if loose:
            raise _damaged(self._name, f"{loose} verdicts belong to no chunk")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _written(statement: str) -> str:
    return " ".join(statement.split())


def _damaged(name: str, how: str) -> UsageError:
    return UsageError(f"{name} is damaged: {how}; restore it from a copy, or start again with --overwrite.")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Convert SQLite's errors into errors of one sentence."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "I/O" in str(error):
            raise RunError(
                f"cannot write {name}: {error}; make room and run the same command again to resume."
            ) from error
        if "readonly" in str(error) or "unable to open" in str(error):
            raise UsageError(f"cannot write {name}: {error}; choose another --out folder.") from error
        raise _damaged(name, str(error)) from error
    except (sqlite3.DatabaseError, TypeError, UnicodeDecodeError) as error:
        raise _damaged(name, str(error)) from error
