"""The headers of a tar file, read one by one with every length checked. Imports no torch.

The standard library's `tarfile` trusts lengths: a negative one makes it loop for ever, and it reads headers of any
length into memory. Here each member must begin after the last one and end inside the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 512
# The longest extended header (names, times) that is read.
_MAX_EXTENDED = 1 << 20
_FILE = (b"0", b"\0", b"7")
# Links, devices, folders and pipes: no bytes follow their headers, whatever length they give.
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK, _SPARSE = b"x", b"g", b"L", b"K", b"S"


class TarError(ValueError):
    """A tar file is damaged, cut off, or of a kind that is not read."""


class Header(NamedTuple):
    """An ordinary file in a tar file: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


def headers(file: BinaryIO, length: int) -> Iterator[Header]:
    """Yield the ordinary files of a tar file of that many bytes; links, folders and the like are skipped.

    Raises:
        TarError: a header is damaged, a member does not lie inside the file, or one is sparse.
    """
    offset, extended = 0, dict[str, str]()
    while True:
        block = _read(file, offset, _BLOCK)
        if block == bytes(_BLOCK):
            return
        _check_sum(block)
        kind, start = block[156:157], offset + _BLOCK
        size = 0 if kind in _EMPTY else _number(block[124:136])
        if kind not in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            if "size" in extended and kind not in _EMPTY:
                size = _decimal(extended["size"])
            name = extended.get("path") or _name(block)
            if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in extended):
                raise TarError(f"{name} is a sparse file, which is not read")
            _check_size(start, size, length)
            if kind in _FILE:
                yield Header(name, start, size)
            extended = {}
        else:
            if size > _MAX_EXTENDED:
                raise TarError(f"a header has {size:,} bytes, more than {_MAX_EXTENDED:,}")
            _check_size(start, size, length)
            content = _read(file, start, size)
            if kind == _PAX:
                extended |= _records(content)
            elif kind == _LONG_NAME:
                extended["path"] = _text(content)
        offset = start + -(-size // _BLOCK) * _BLOCK


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise TarError("it is cut off or damaged")
    return content


def _check_sum(block: bytes) -> None:
    """Refuse a header with a wrong checksum; old programs sum the bytes as signed numbers."""
    rest = block[:148] + b" " * 8 + block[156:]
    sums = sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest)
    try:
        known = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        known = -1
    if known not in sums:
        raise TarError("it is cut off or damaged")


def _number(field: bytes) -> int:
    """Return a number in octal digits, or where the first bit is set in bytes, as GNU tar writes large ones."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) + (1 << (8 * len(field) - 1) if field[0] == 0x80 else 0)
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarError("a length is no number") from None


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarError(f"a length is {text[:20]!r}, which is no whole number from 0 up")
    return int(text)


def _check_size(start: int, size: int, length: int) -> None:
    if size < 0:
        raise TarError(f"a member has a length of {size} bytes")
    if start + size > length:
        raise TarError("it is cut off or damaged")


def _name(block: bytes) -> str:
    """Return the name in a header; POSIX keeps the front of a long one apart, GNU keeps times there."""
    name, prefix = _text(block[:100]), block[345:500]
    return f"{_text(prefix)}/{name}" if block[257:263] == b"ustar\0" and prefix[:1] != b"\0" else name


def _records(content: bytes) -> dict[str, str]:
    """Return the records `LENGTH KEY=VALUE` of an extended header."""
    records = {}
    while content:
        digits, space, _ = content[:24].partition(b" ")
        length = _decimal(digits.decode("latin-1")) if space else 0
        key, sign, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not sign or not len(digits) + 1 < length <= len(content):
            raise TarError("an extended header is damaged")
        records[key.decode(errors="replace")] = value.decode(errors="surrogateescape")
        content = content[length:]
    return records


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")
