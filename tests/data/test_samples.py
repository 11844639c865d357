"""Samples: reading, the head, the fingerprint, the box; and samples from arrays in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from robustkit.core.errors import UsageError
from robustkit.data import Samples, from_arrays

B, C, H, W = 5, 3, 7, 9
LABELS = np.array([0, 2, 1, 2, 0])


def floats() -> np.ndarray[Any, Any]:
    return np.random.RandomState(1).random_sample((B, C, H, W)).astype(np.float32)


def pixels() -> np.ndarray[Any, Any]:
    return np.random.RandomState(2).randint(0, 256, (B, H, W, C)).astype(np.uint8)


def read(samples: Samples) -> torch.Tensor:
    return samples.images(range(len(samples)))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_are_taken_as_they_are(kind: Any) -> None:
    given = floats().astype(kind)
    x = read(from_arrays(given, LABELS))
    assert x.dtype == torch.float32
    assert np.array_equal(x.numpy(), given.astype(np.float32))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_taken_as_they_are(kind: torch.dtype) -> None:
    given = torch.from_numpy(floats()).to(kind).requires_grad_()
    x = read(from_arrays(given, torch.from_numpy(LABELS)))
    assert torch.equal(x, given.detach().float())
    assert not x.requires_grad


def test_pixels_of_either_layout_are_read() -> None:
    last = pixels()
    first = last.transpose(0, 3, 1, 2)
    expected = torch.from_numpy(first.astype(np.float32)) / 255
    for given in (last, first, torch.from_numpy(first.copy())):
        x = read(from_arrays(given, LABELS.tolist()))
        assert torch.equal(x, expected)
        assert x.is_contiguous()


def test_reading_gives_fresh_memory() -> None:
    given = floats()
    samples = from_arrays(given, LABELS)
    samples.images([0]).zero_()
    assert np.array_equal(given, floats())
    assert torch.equal(samples.images([0])[0], torch.from_numpy(given[0]))


@pytest.mark.parametrize("wanted", [[], range(0), np.array([], dtype=np.int32)])
def test_reading_nothing_keeps_the_shape(wanted: Any) -> None:
    assert from_arrays(floats(), LABELS).images(wanted).shape == (0, C, H, W)


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_is_named(position: int) -> None:
    with pytest.raises(UsageError, match=f"python:arrays: there is no position {position}; write .* 0 to 4"):
        from_arrays(floats(), LABELS).images([0, position])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.nan, "holds NaN or infinite values"),
        (np.inf, "holds NaN or infinite values"),
        (-0.25, "has values from -0.25 to 0"),
        (255, "has values from 0 to 255"),
        (np.nextafter(np.float32(1), np.float32(2)), r"has values from 0 to 1\.00000012, outside .* rounding"),
    ],
)
def test_an_image_outside_the_box_is_named(value: float, found: str) -> None:
    given = np.zeros((B, C, H, W), np.float32)
    given[3, 2, 6, 8] = value
    samples = from_arrays(given, LABELS)
    samples.images([0, 1, 2, 4])
    with pytest.raises(UsageError, match=f"the image at position 3 {found}.*; (write values in|clip them, as)"):
        samples.images([4, 3, 0])


def test_head_is_the_first_n() -> None:
    samples = from_arrays(floats(), LABELS)
    head = samples.head(2)
    assert len(head) == 2
    assert head.name == samples.name
    assert head.labels.tolist() == [0, 2]
    assert torch.equal(read(head), read(samples)[:2])
    assert samples.head(None) is samples
    assert samples.head(B).fingerprint == samples.fingerprint
    with pytest.raises(UsageError, match="there is no position 2"):
        head.images([2])


@pytest.mark.parametrize("n", [0, -1, 6])
def test_a_wrong_head_names_the_correct_form(n: int) -> None:
    with pytest.raises(UsageError, match=f"cannot take {n} of 5 samples; write 1 to 5"):
        from_arrays(floats(), LABELS).head(n)


def test_fingerprint_is_of_the_selected_content() -> None:
    given = pixels()
    whole = from_arrays(given, LABELS)
    assert whole.fingerprint == from_arrays(given.copy(), LABELS, name="another").fingerprint
    head = whole.head(3).fingerprint
    given[4, 0, 0, 0] ^= 1
    assert from_arrays(given, LABELS).fingerprint != whole.fingerprint
    assert from_arrays(given, LABELS).head(3).fingerprint == head
    given[2, 6, 8, 2] ^= 1
    assert from_arrays(given, LABELS).head(3).fingerprint != head
    assert from_arrays(pixels(), np.roll(LABELS, 1)).fingerprint != whole.fingerprint
    assert from_arrays(given.reshape(B, W, H, C), LABELS).fingerprint != from_arrays(given, LABELS).fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (floats().astype(np.int64), LABELS, r"the images x are int64; write uint8 in \[0, 255\], or floats"),
        (floats() > 0, LABELS, "the images x are bool; write uint8"),
        (floats().astype(np.complex64), LABELS, "the images x are complex64; write uint8"),
        (floats()[:, 0], LABELS, r"have shape \(5, 7, 9\); a channel axis is missing; write four axes"),
        (floats()[0, 0], LABELS, r"have shape \(7, 9\); write four axes"),
        (floats()[:0], LABELS[:0], r"have shape \(0, 3, 7, 9\), which holds no pixel"),
        (floats()[..., :0], LABELS, r"have shape \(5, 3, 7, 0\), which holds no pixel"),
        (
            floats().transpose(0, 2, 3, 1),
            LABELS,
            r"the float32 images x have shape \(5, 7, 9, 3\), which read as \(N, C, H, W\) means 7 channels "
            r"of 9 x 3 pixels; write robustkit\.data\.from_arrays\(x, y, layout='NHWC'\), or .*'NCHW'\) if that",
        ),
        (floats(), LABELS[:4], "5 images x but 4 labels y; write one label per image"),
        (floats(), LABELS + 0.5, r"the label at position 0 is 0\.5; write whole numbers from 0 up"),
        (floats(), [0.0, np.nan, 0, 0, 0], "the label at position 1 is nan; write whole numbers"),
        (floats(), [0, 2**40, 0, 0, 0], r"the label at position 1 is 1\.09951e\+12; write classes below"),
        (
            floats(),
            np.array([0, 2**63, 0, 0, 0], np.uint64),
            "the label at position 1 is 9.*; write classes below",
        ),
        (floats(), [0, None, 0, 0, 0], "the labels y are object; write integers"),
        (floats(), [[0], [1, 2], [0], [0], [0]], "the labels y are rows of unequal lengths"),
        (floats(), np.zeros((B, 4)), r"have shape \(5, 4\), but row 0 is not one-hot; write one integer"),
        (floats(), np.zeros((B, 2, 2)), r"have shape \(5, 2, 2\)"),
        (floats(), 3, r"the labels y have shape \(\); write one integer per image, shape \(5,\)"),
        (floats(), LABELS - 1, "the label at position 0 is -1; write classes from 0 up"),
    ],
)
def test_wrong_arrays_say_what_to_write(images: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^mine: .*{sentence}"):
        from_arrays(images, labels, name="mine")


@pytest.mark.parametrize(
    "labels",
    [
        LABELS.tolist(),
        [torch.tensor(int(label)) for label in LABELS],
        LABELS.astype(np.uint8),
        LABELS.astype(object),
        LABELS.astype(float),
        LABELS[:, None],
        np.eye(3)[LABELS],
        torch.nn.functional.one_hot(torch.from_numpy(LABELS)),
        torch.from_numpy(LABELS).to(torch.bfloat16),
        torch.from_numpy(LABELS).int()[:, None],
    ],
)
def test_labels_come_in_many_forms(labels: Any) -> None:
    found = from_arrays(floats(), labels)
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == LABELS.tolist()
    assert found.classes is None


def test_names_are_numbered_as_they_sort_or_as_classes_says() -> None:
    names = ["ape", "cow", "bee", "cow", "ape"]
    found = from_arrays(floats(), names)
    assert (found.labels.tolist(), found.classes) == (LABELS.tolist(), ("ape", "bee", "cow"))
    assert from_arrays(floats(), np.array(names), classes=("cow", "ape", "bee")).labels.tolist() == [1, 0, 2, 0, 1]
    with pytest.raises(UsageError, match="the label at position 1 is 'cow', which is none of the 2 class names"):
        from_arrays(floats(), names, classes=("ape", "bee"))


@pytest.mark.parametrize(
    ("shape", "kind", "layout", "channels"),
    [
        ((2, 13, 8, 8), np.float32, None, 13),
        ((2, 200, 9, 9), np.float32, None, 200),
        ((2, 8, 8, 13), np.uint8, "NHWC", 13),
        ((2, 13, 8, 8), np.uint8, None, 13),
        ((2, 9, 9, 200), np.float32, "nhwc", 200),
        ((2, 13, 8, 9), np.float32, "NCHW", 13),
        ((2, 5, 7, 9), np.float32, None, 5),
        ((2, 32, 24, 3), np.float32, None, 3),
        ((2, 28, 28, 1), np.float64, None, 1),
        ((2, 3, 3, 8), np.float32, None, 3),
    ],
)
def test_images_of_many_bands(shape: tuple[int, ...], kind: type, layout: str | None, channels: int) -> None:
    assert from_arrays(np.zeros(shape, kind), [0, 1], layout=layout).images([0]).shape[1] == channels


@pytest.mark.parametrize("shape", [(2, 9, 12, 3), (2, 8, 8, 1), (2, 3, 9, 12), (2, 1, 8, 8)])
def test_the_layout_of_bytes_follows_from_their_shape(shape: tuple[int, ...]) -> None:
    pixels = (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)
    channels_last = shape[3] < 8
    right = torch.from_numpy(pixels.transpose(0, 3, 1, 2) if channels_last else pixels) / 255
    for images in (pixels, torch.from_numpy(pixels)):
        assert torch.equal(from_arrays(images, [0, 1]).images([0, 1]), right)


@pytest.mark.parametrize("shape", [(2, 8, 8, 13), (2, 8, 8, 8), (2, 13, 8, 9), (2, 20, 9, 1)])
def test_an_ambiguous_channel_order_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"layout='NHWC'\), or .*layout='NCHW'\) if that is meant"):
        from_arrays(np.zeros(shape, np.float32), [0, 1])
    with pytest.raises(UsageError, match="no layout 'CHWN'"):
        from_arrays(np.zeros(shape, np.float32), [0, 1], layout="CHWN")
