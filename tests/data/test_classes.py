"""Which class of the model a class of the data is: by file, by names, by ImageNet's ids; and what is doubtful."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robustkit.core.errors import UsageError
from robustkit.data import Samples, from_arrays, load_data
from robustkit.data.classes import match_classes, read_order, relabelled


def samples(*names: str) -> Samples:
    """One image of each class, which is numbered as it sorts."""
    return from_arrays(np.zeros((len(names), 3, 7, 9), np.float32), list(names))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "dog\ncat\n\nape\n"),
        ("a.csv", "name,index\ncat,1\ndog,0\nape,2\n"),
        ("a.csv", "0,dog\n1,cat\n2,ape\n"),
        ("a.json", json.dumps(["dog", "cat", "ape"])),
        ("a.json", json.dumps({"cat": 1, "ape": 2, "dog": 0})),
        ("a.json", json.dumps({"0": "dog", "1": "cat", "2": ["n02", "ape"]})),
    ],
)
def test_the_order_of_classes_is_read_from_a_file(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    order = read_order(str(tmp_path / name))
    assert [order.numbers[name] for name in ("dog", "cat", "ape")] == [0, 1, 2]


def test_the_order_of_classes_may_be_written_out_or_imagenets() -> None:
    assert read_order("dog,cat, ape").names == ("dog", "cat", "ape")


def test_imagenets_own_list_has_the_id_first(tmp_path: Path) -> None:
    (tmp_path / "LOC.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    assert read_order(str(tmp_path / "LOC.txt")).names == ("n01440764", "n01443537")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "names no class; write the model"),
        (b"cat\ndog\ncat\n", "has the class 'cat' twice; write each class once"),
        (b'{"cat": -1}', "gives the class 'cat' the number -1; write one from 0 to"),
        (b'{"cat": 999999999999}', "gives the class 'cat' the number 999999999999; write one from 0 to"),
        (b'{"cat": 1.5}', "is no list of classes; write one name per line"),
        (b"[" * 100_000, "is no list of classes; write one name per line"),
        (b"\xff\xfe", "is no list of classes; write one name per line"),
    ],
)
def test_a_file_that_is_no_list_of_classes(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        read_order(str(tmp_path / "names"))


def test_an_order_that_is_not_there_or_lacks_a_class(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"classes=nowhere cannot be read \(No such file.*; write a file"):
        read_order("nowhere")
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((2, 7, 9, 3), np.uint8), y=["cat", "dog"])
    assert load_data(f"{path}?classes=dog,cow,cat").labels.tolist() == [2, 0]
    assert load_data(f"{path}?classes=dog,cow,cat").name == f"{path}?classes=dog,cow,cat"
    with pytest.raises(UsageError, match="has the class 'cat', which is not among the 2 names of classes="):
        load_data(f"{path}?classes=dog,cow")
    with pytest.raises(UsageError, match="has the field 'classes' without a value"):
        load_data(f"{path}?classes=")


def test_class_names_of_the_model_decide() -> None:
    found = match_classes(samples("Cat_Fish", "dog"), 4, ("dog", "ape", "cat fish", "cow"))
    assert found.labels.tolist() == [2, 0]
    assert not found.flags
    assert found.notes == ("the 2 classes of the data are matched by name to the model's 4",)
    assert match_classes(found, 4, ("dog", "ape", "cat fish", "cow")) is found


def test_ids_of_imagenet_are_known_to_models_of_its_classes() -> None:
    # Tench, English springer and parachute, as in Imagenette.
    data = samples("n01440764", "n02102040", "n03888257")
    assert match_classes(data, 1000, None).labels.tolist() == [0, 217, 701]
    assert match_classes(data, 3, None) is data or not match_classes(data, 3, None).flags
    assert match_classes(data, 1000, tuple(map(str, range(1000)))).labels.tolist() == [0, 217, 701]


@pytest.mark.parametrize(
    ("names", "count", "known", "codes"),
    [
        (("ape", "bee"), 2, None, []),
        (("ape", "bee"), None, None, []),
        (("ape", "bee"), 10, None, ["class-count"]),
        (("ape", "bee"), 2, ("cow", "dog"), ["class-names"]),
        (tuple(str(number) for number in range(1, 11)), 10, None, ["class-order"]),
        (tuple(f"class{number}" for number in range(11)), 11, None, ["class-order"]),
        (tuple(f"class{number:02d}" for number in range(11)), 11, None, []),
        (("1", "10"), 10, None, ["class-count"]),
        (("-1", "0", "1"), 3, None, []),
    ],
)
def test_doubtful_labels_are_flagged(
    names: tuple[str, ...], count: int | None, known: tuple[str, ...] | None, codes: list[str]
) -> None:
    found = match_classes(samples(*names), count, known)
    assert [flag.code for flag in found.flags] == codes
    assert found.labels.tolist() == [sorted(names).index(name) for name in names]


def test_class_numbers_given_by_the_user_raise_no_flag() -> None:
    assert not match_classes(replace(samples("ape", "bee"), by_name=False), 10, None).flags
    assert not match_classes(replace(samples("10", "9"), fixed=True), 10, None).flags


@pytest.mark.parametrize(
    ("classes", "flagged"),
    [
        # Two of ten: their places in the list are not the model's numbers.
        ("cat,dog", True),
        ("a,b,c,cat,e,dog,g,h,i,j", False),
        ('["cat", "dog"]', True),
        ('{"cat": 3, "dog": 5}', False),
        ("cat,3\ndog,5", False),
        # Counted from 1.
        ('{"cat": 4, "dog": 10}', True),
        # A comment is no class.
        ("# of a model\na\nb\nc\ncat\ne\ndog\ng\nh\ni\nj", True),
    ],
)
def test_a_list_of_other_length_than_the_model_has_classes_is_flagged(
    classes: str, flagged: bool, tmp_path: Path
) -> None:
    if "\n" in classes or classes[0] in "[{":
        (tmp_path / "names").write_text(classes)
        classes = str(tmp_path / "names")
    found = match_classes(relabelled(samples("cat", "dog"), read_order(classes)), 10, None)
    assert [flag.code for flag in found.label_flags] == ["class-count"] * flagged
