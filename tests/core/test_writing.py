"""Files are written atomically, and never through symlinks."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from robustkit.core.errors import RunError, UsageError
from robustkit.core.writing import DRAFT, refuse_link, remove_drafts, replacing, subfolder, write


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_bytes(b"the user's own")
    return path


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_under_the_files_name_is_replaced(link: object, tmp_path: Path, victim: Path) -> None:
    link(victim, tmp_path / "report.json")
    write(tmp_path / "report.json", b"new")
    assert victim.read_bytes() == b"the user's own"
    assert (tmp_path / "report.json").read_bytes() == b"new"
    assert not (tmp_path / "report.json").is_symlink()


def test_a_link_with_the_same_content_is_replaced_too(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "a").symlink_to(victim)
    write(tmp_path / "a", victim.read_bytes())
    assert not (tmp_path / "a").is_symlink()


def test_temporary_files_have_unpredictable_names(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a") as file:
            (name,) = (one.name for one in tmp_path.iterdir() if one.name != "a")
            assert DRAFT.fullmatch(name)
            names.add(name)
            file.write(b"1")
    assert len(names) == 3
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_a_draft_is_not_opened_through_a_link(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustkit.core.writing.secrets.token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f".robustkit-{'0' * 16}.part").symlink_to(victim)
    with pytest.raises(RunError, match="cannot write"):
        write(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"the user's own"


def test_an_error_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        cast(Any, file).write("no bytes")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a", b"old")]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.EDQUOT, "the disk is full; make room"),
        (errno.EROFS, "Read-only file system; choose another folder"),
        (errno.EACCES, "Permission denied; choose another folder"),
        (errno.EIO, "Input/output error; run the same command again"),
    ],
)
def test_a_disk_that_refuses_is_one_sentence(number: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=words), replacing(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout"])
def test_devices_are_not_replaced(path: str) -> None:
    with pytest.raises(RunError, match="not a regular file"):
        write(Path(path), b"")


@pytest.mark.parametrize("path", [".", "..", "/"])
def test_folders_are_not_replaced(path: str) -> None:
    with pytest.raises(RunError, match="it is a folder"):
        write(Path(path), b"new")


def test_a_fifo_is_not_replaced_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with pytest.raises(RunError, match="not a regular file"):
        write(tmp_path / "a", b"")
    with pytest.raises(UsageError, match="not a regular file"):
        refuse_link(tmp_path / "a")


def test_a_file_that_has_its_content_already_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path / "a", b"same")
    before = (tmp_path / "a").stat().st_ino
    write(tmp_path / "a", b"same")
    assert (tmp_path / "a").stat().st_ino == before


def test_folders_that_are_links_are_not_written_in(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "samples").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"samples is a link.*delete it"):
        subfolder(tmp_path, "samples")


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".robustkit-0123456789abcdef.part", ".mine.part", "a.part"):
        (tmp_path / name).touch()
    remove_drafts(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == [".mine.part", "a.part"]
