"""Modules that a model's code imports from its own folder count as its code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from robustkit.models import load_model
from robustkit.registry.imports import own_imports, own_imports_of_module

NET = """
import torch, os
from helper import width
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width()))
"""


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def no_helper_stays() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("helper", "parts")]:
        del sys.modules[name]


def test_imports_are_followed_inside_the_folder_only(tmp_path: Path) -> None:
    write(
        tmp_path,
        net="import os, torch, helper\nfrom parts.deep import thing\n",
        helper="def f():\n    from late import x\n    import importlib\n    importlib.import_module('named')\n",
        parts____init__="",
        parts__deep="from . import sister\nfrom .other.more import *\nimport net\n",
        parts__sister="import helper",
        parts__other__more="syntax error here",
        late="",
        named="",
        stranger="",
    )
    (tmp_path / "parts" / "__init__.py").touch()
    found = own_imports(tmp_path / "net.py", tmp_path)
    assert set(found) == {
        *("helper", "late", "named", "parts", "parts.deep", "parts.sister", "parts.other.more"),
    }


def test_own_packages_are_followed_and_installed_ones_are_not(tmp_path: Path) -> None:
    write(
        tmp_path, pkg__net="from . import a\nimport other\nfrom pkg.b import c\n", pkg__a="", pkg__b="", other=""
    )
    (tmp_path / "pkg" / "__init__.py").touch()
    found = own_imports_of_module("pkg.net", tmp_path / "pkg" / "net.py")
    assert set(found) == {"pkg", "pkg.a", "pkg.b"}
    write(tmp_path, site_packages__net="import other", site_packages__other="")
    (tmp_path / "site_packages").rename(tmp_path / "site-packages")
    assert own_imports_of_module("net", tmp_path / "site-packages" / "net.py") == {}


def test_a_changed_helper_changes_the_fingerprint_and_is_reloaded(tmp_path: Path) -> None:
    write(tmp_path, net=NET, helper="from later import w\ndef width():\n    return w\n", later="w = 4")
    string = f"{tmp_path}/net.py:build"
    first = load_model(string)
    assert load_model(string).fingerprint == first.fingerprint
    write(tmp_path, later="w = 5  # changed")
    second = load_model(string)
    assert second.fingerprint != first.fingerprint
    assert second.net[1].out_features == 5
    write(tmp_path, unrelated="import torch")
    assert load_model(string).fingerprint == second.fingerprint


def test_helpers_of_one_name_in_two_folders_are_separate(tmp_path: Path) -> None:
    for number in (4, 6):
        write(tmp_path / str(number), net=NET, helper=f"def width():\n    return {number}\n")
        net = load_model(f"{tmp_path}/{number}/net.py:build").net
        assert net[1].out_features == number
