"""The tables of a run's database, and the conditions for rows that no run writes."""

from __future__ import annotations

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE chunks (
    stage INTEGER NOT NULL, chunk INTEGER NOT NULL,
    forwards INTEGER NOT NULL, backwards INTEGER NOT NULL, seconds REAL NOT NULL,
    flags TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (stage, chunk)
);
CREATE TABLE verdicts (
    stage INTEGER NOT NULL, chunk INTEGER NOT NULL, position INTEGER NOT NULL,
    label INTEGER NOT NULL, prediction INTEGER NOT NULL, margin REAL NOT NULL, fooled INTEGER NOT NULL,
    image TEXT NOT NULL, adversarial BLOB, "right" REAL, once INTEGER, struck INTEGER,
    PRIMARY KEY (stage, position)
);
CREATE INDEX rows_of_chunk ON verdicts (stage, chunk);
"""
# Only a run that looks for minimum norms has this table.
DISTANCES = """
CREATE TABLE distances (
    stage INTEGER NOT NULL, position INTEGER NOT NULL, distance REAL NOT NULL, PRIMARY KEY (stage, position)
)
"""
# The endings of the files that SQLite has for one ledger, its own and those of a transaction.
FILES = ("", "-wal", "-shm", "-journal")
COLUMNS = 'position, label, prediction, margin, fooled, image, adversarial, "right", once, struck'
# Conditions for rows of each table that no run writes: values of another type, or out of range.
IMPOSSIBLE = {
    "chunks": "typeof(stage) || typeof(chunk) || typeof(forwards) || typeof(backwards) <> "
    "'integerintegerintegerinteger' OR stage NOT BETWEEN 0 AND :stages OR min(forwards, backwards) < 0 "
    "OR typeof(seconds) <> 'real' OR seconds < 0",
    "verdicts": "typeof(position) || typeof(label) || typeof(prediction) <> 'integerintegerinteger' "
    "OR position NOT BETWEEN 0 AND :last OR label < 0 OR prediction < -1 OR typeof(margin) <> 'real' "
    "OR fooled NOT IN (0, 1) OR length(image) NOT IN (0, 64) OR image GLOB '*[^0-9a-f]*' "
    "OR adversarial IS NOT NULL AND (typeof(adversarial) <> 'blob' OR length(adversarial) <> :size) "
    'OR "right" NOT BETWEEN 0 AND 1 OR once NOT IN (0, 1) OR struck NOT IN (0, 1)',
    "distances": "typeof(position) <> 'integer' OR position NOT BETWEEN 0 AND :last "
    "OR typeof(distance) <> 'real' OR distance < 0",
}
