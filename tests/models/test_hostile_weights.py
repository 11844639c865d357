"""Malicious weight files: no code runs, nothing is imported, no more memory is allocated than the file holds."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import _weights_only_unpickler, serialization

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.models.weights import inert_pickle
from robustkit.models.weights.files import read_weights

START = b"\x80\x02"
# An empty tuple, twice itself forty times over: 2^40 leaves to hash in 200 bytes.
LEAVES = b")" + 40 * b"q\x00h\x00\x86"
SYSTEM = b"X\x05\x00\x00\x00touch\x85R"


def number(value: int) -> bytes:
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(
    size: int, stride: int = 1, offset: int = 0, numel: int = 4, key: str = "0", old: bool = False
) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel)
    storage += (b"N" if old else b"") + b"tQ"
    ends = number(size) + b"\x85" + number(stride) + b"\x85\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + ends + b"tR"


def entry(value: bytes) -> bytes:
    return b"}" + text("w") + value + b"s"


def in_zip(body: bytes, method: int = zipfile.ZIP_STORED, storage: bytes = bytes(16), copies: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("a/data.pkl", START + body + b".")
        archive.writestr("a/data/0", storage)
        archive.writestr("a/version", "3\n")
        for copy in range(copies):
            # Under another name, the same bytes.
            info = zipfile.ZipInfo(f"a/data/x{copy}")
            same = archive.getinfo("a/data/0")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(info, field, getattr(same, field))
            archive.filelist.append(info)
    return file.getvalue()


def in_stream(body: bytes) -> bytes:
    """As torch.save wrote until 2020."""
    parts = serialization.MAGIC_NUMBER, serialization.PROTOCOL_VERSION, {"little_endian": True}
    return b"".join(pickle.dumps(part, 2) for part in parts) + START + body + b"." + pickle.dumps([], 2)


def in_tar(kind: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="latin1") as archive:
        archive.addfile(tarfile.TarInfo("\x80\x02"))
        member = tarfile.TarInfo("storages")
        member.type, member.linkname = kind, "/dev/zero"
        archive.addfile(member)
    return file.getvalue()


NAMES = [
    *("os\nsystem", "posix\nsystem", "torch.serialization\nos.system", "torch\nserialization.os.system"),
    *("webbrowser\nopen", "torch.hub\n_load_local", "torch.jit\nload", "pickle\nloads", "antigravity\nx"),
    *("builtins\ngetattr", "__builtin__\neval", "functools\npartial", "operator\nattrgetter", "numpy\nload"),
    *("copy_reg\n_reconstructor", "torch.utils.cpp_extension\nload", "multiprocessing.util\nspawnv_passfds"),
    *("torch\nSize.__class__", "collections\nOrderedDict.__init__.__globals__", "os\nsystemStorage"),
]
CALLS = {
    "reduce": b"c%b\n" + SYSTEM,
    "inst": b"(" + text("touch") + b"i%b\n",
    "obj": b"(c%b\n" + text("touch") + b"o",
    "newobj": b"c%b\n" + text("touch") + b"\x85\x81",
    "newobj_ex": b"c%b\n" + text("touch") + b"\x85}\x92",
    "build": b"c%b\n" + text("touch") + b"\x85\x81" + entry(b"N") + b"b",
    "subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(c%b\nN" + text("touch") + b"\x85NtR",
}
MODULE = b"(" + text("module") + b"c%b\n" + text("x.py") + text("import os") + b"tQ"


@pytest.fixture(scope="module")
def events():
    """What Python's audit says while a file is read; an audit hook stays for ever, so one serves all."""
    seen: list[str] | None = None

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if seen is not None and (
            event.split(".")[0] in ("os", "subprocess", "socket", "import", "exec", "compile", "tempfile", "pty")
            or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))
        ):
            seen.append(f"{event} {arguments}")

    def during(path: Path) -> list[str]:
        nonlocal seen
        seen = []
        try:
            read_weights(path)
        except UsageError:
            pass
        finally:
            found, seen = seen, None
        return found

    sys.addaudithook(hook)
    return during


def test_no_function_that_a_file_names_is_called(tmp_path, events):
    path = tmp_path / "w.pt"
    for form in (in_zip, in_stream):  # what torch itself imports, it imports here
        path.write_bytes(form(b"N"))
        read_weights(path)
    for how, call in {**CALLS, "module": MODULE}.items():
        for name in NAMES:
            for form in (in_zip, in_stream):
                path.write_bytes(form(call.replace(b"%b", name.encode())))
                assert events(path) == [], (how, name, form)


def test_only_functions_that_weights_only_allows_are_called():
    called = {name: value for name, value in inert_pickle._REAL.items() if value in inert_pickle._CALLABLE}
    assert called.keys() <= _weights_only_unpickler._get_allowed_globals().keys()
    own = inert_pickle._ordered, inert_pickle._size, inert_pickle._without_type
    assert all(value in own or value.__module__ == "torch._utils" for value in called.values())


HOSTILE = {
    "bytearray": in_stream(b"\x96" + struct.pack("<Q", 2**38)),
    "bytearray in zip": in_zip(b"\x96" + struct.pack("<Q", 2**38)),
    "bytes": in_stream(b"\x8e" + struct.pack("<Q", 2**38)),
    "storage": in_zip(b"ctorch.storage\nUntypedStorage\n" + number(2**38) + b"\x85R"),
    "negative": in_zip(entry(tensor(-4))),
    "negative stride": in_zip(entry(tensor(4, -1))),
    "negative offset": in_zip(entry(tensor(4, offset=-4))),
    "beyond": in_zip(entry(tensor(4, offset=1))),
    "repeated": in_zip(entry(tensor(2**40, 0))),
    "too long": in_stream(entry(tensor(2**40, old=True))),
    "negative storage": in_stream(entry(tensor(0, numel=-4, old=True))),
    "another file": in_zip(entry(tensor(4, key="../../etc/passwd"))),
    "iterated": in_zip(b"ctorch\nSize\n" + tensor(2**33, 0) + b"\x85R"),
    "iterated pairs": in_zip(b"ccollections\nOrderedDict\n" + tensor(2**33, 0) + b"\x85R"),
    "added": in_zip(tensor(2**33, 0) + b"(K\x01\x90"),
    "key": in_zip(b"}" + LEAVES + b"K\x01s"),
    "item of a set": in_zip(b"\x8f(" + LEAVES + b"\x90"),
    "frozen set": in_zip(b"(" + LEAVES + b"\x91"),
    "key of a stand-in": in_zip(b"ca\nB\n)R" + LEAVES + b"K\x01s"),
    "key of a pair": in_zip(b"ccollections\nOrderedDict\n](](" + LEAVES + b"K\x01ee\x85R"),
    "names": in_stream(b"".join(b"cm%d\nn\n0" % one for one in range(10_001)) + b"N"),
    "name": in_zip(b"c" + 10**5 * b"m" + b"\nn\n"),
    "key in a key": in_zip(b"})" + 20_000 * b"\x85" + b"K\x01s"),
    "extension": in_zip(b"\x82\x01"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_more_memory_is_allocated_than_the_file_holds(tmp_path, name):
    (tmp_path / "w.pt").write_bytes(HOSTILE[name])
    with pytest.raises(UsageError, match="truncated or damaged"):
        read_weights(tmp_path / "w.pt")


def test_archives_of_other_formats_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    for content, sentence in (
        (in_zip(entry(tensor(4)), zipfile.ZIP_DEFLATED, bytes(10**7)), r"has [\d,]+ bytes and unpacks to 10,000"),
        (in_zip(entry(tensor(4)), storage=bytes(10**6), copies=9), r"has 1,\S+ bytes and unpacks to 10,\S+"),
        (in_tar(tarfile.FIFOTYPE), "is a tar archive"),
        (in_tar(tarfile.SYMTYPE), "is a tar archive"),
        (in_tar(tarfile.CHRTYPE), "is a tar archive"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=sentence):
            read_weights(path)


def test_deeply_nested_and_oddly_named_entries_are_ignored(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(in_zip(b"}" + 20_000 * (text("") + b"}") + 20_000 * b"s"))
    assert read_weights(path).sets == {}
    torch.save({10**5000: 1, (1, 2): 2}, path)
    assert read_weights(path).content == "a dict of 2 entries without names"


def test_integer_tensors_are_refused_as_weights(tmp_path):
    state = load_model("robustkit:digits-cnn").net.state_dict()
    for kind in (torch.int8, torch.complex64, torch.bool):
        torch.save({name: value.to(kind) for name, value in state.items()}, tmp_path / "w.pt")
        with pytest.raises(UsageError, match=rf"in {str(kind)[6:]}, where \S+ has floating-point numbers"):
            load_model(f"robustkit:digits-cnn@{tmp_path}/w.pt")
    torch.save({name: value.to_sparse() for name, value in state.items()}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"made by torch\._utils\._rebuild_sparse_tensor, \S+ is not loaded"):
        load_model(f"robustkit:digits-cnn@{tmp_path}/w.pt")


def test_plain_files_are_read_by_weights_only(tmp_path, monkeypatch):
    state = load_model("robustkit:digits-cnn").net.state_dict()
    asked = collections.Counter[bool]()
    load = torch.load

    def counted(*args, **options):
        asked[options["weights_only"]] += not serialization._serialization_tls.skip_data
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", counted)
    for new in (True, False):
        torch.save({"net": state, "epoch": 3}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
        read_weights(tmp_path / "w.pt")
    assert +asked == {True: 2}
    torch.save({"net": state, "epoch": {3}}, tmp_path / "w.pt")
    read_weights(tmp_path / "w.pt")
    assert asked[False] == 1
