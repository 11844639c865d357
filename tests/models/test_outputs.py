"""Which tensor of a net's output is the logits; nets with one number per image."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from robustkit import as_classifier, evaluate, load_model
from robustkit.core.errors import UsageError
from robustkit.models.outputs import LogitsReader

LOGITS = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
FEATURES = LOGITS.repeat(1, 4)
Named = collections.namedtuple("Named", "features out")
Inception = collections.namedtuple("Inception", "logits aux_logits")


@dataclasses.dataclass(slots=True)
class Slots:
    loss: float
    scores: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Plain:
    def __init__(self) -> None:
        self.h, self.prediction = FEATURES, LOGITS


class ModelOutput(collections.OrderedDict[str, Any]):
    """As transformers': a mapping that is a dataclass, too."""


CLEAR = {
    "features first": (FEATURES, LOGITS),
    "features last": [LOGITS, FEATURES],
    "none": (None, LOGITS),
    "a known key": {"features": FEATURES, "out": LOGITS},
    "a known key among as long ones": {"a": 2 * LOGITS, "Scores": LOGITS},
    "logits beside another known key": {"out": 2 * LOGITS, "logits": LOGITS},
    "inception": Inception(LOGITS, 2 * LOGITS),
    "named": Named(FEATURES, LOGITS),
    "slots": Slots(0.5, LOGITS, (FEATURES, FEATURES)),
    "attributes": Plain(),
    "transformers": ModelOutput(loss=LOGITS.sum(), logits=LOGITS, hidden_states=(FEATURES, FEATURES)),
    "nested": ({"features": FEATURES}, [LOGITS]),
    "shape": {"embedding": FEATURES, "classes": LOGITS, "map": LOGITS[..., None, None].expand(5, 3, 2, 2)},
    "confidence": (LOGITS, LOGITS[:, 0]),
    "more axes": LOGITS[:, :, None, None],
}


@pytest.mark.parametrize("name", CLEAR)
def test_the_logits_are_found_if_they_are_unambiguous(name):
    torch.testing.assert_close(LogitsReader(classes=3).read(CLEAR[name], 5), LOGITS, rtol=0, atol=0)


@pytest.mark.parametrize(
    "output",
    [
        (LOGITS, 2 * LOGITS),
        {"out": LOGITS, "scores": 2 * LOGITS},
        {"out": FEATURES, "a": LOGITS},
        {"a": FEATURES, "b": FEATURES[:, :6]},
        (FEATURES, LOGITS[:, 0]),
    ],
)
def test_ambiguous_outputs_name_all_candidates(output):
    sentence = r"returned '\w+' \(5, \d+\), '\w+' \(5,.*\) for 5 images.*not clear which.*output="
    with pytest.raises(UsageError, match=sentence) as caught:
        LogitsReader("m", classes=3).read(output, 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("output", "choice"),
    [
        ((FEATURES, 2 * LOGITS, LOGITS), "2"),
        (Named(2 * LOGITS, LOGITS), "1"),
        (Named(2 * LOGITS, LOGITS), "out"),
        ({0: 2 * LOGITS, 1: LOGITS}, "1"),
        ({"out": 2 * LOGITS, "a.b": LOGITS}, "a.b"),
        ((2 * LOGITS, {"x": FEATURES, "y": LOGITS}), "1.y"),
        ((2 * LOGITS, {"x": FEATURES, "y": LOGITS}), "1"),
    ],
)
def test_the_chosen_output_is_used(output, choice):
    torch.testing.assert_close(LogitsReader(output=choice, classes=3).read(output, 5), LOGITS, rtol=0, atol=0)


def test_impossible_choices_are_refused():
    with pytest.raises(UsageError, match=r"no tensor 'out' but '0' \(5, 12\), '1' \(5, 3\): write output="):
        LogitsReader(output="out").read((FEATURES, LOGITS), 5)
    with pytest.raises(UsageError, match="returns one tensor, so there is nothing to choose: leave output=1 out"):
        LogitsReader(output="1").read(LOGITS, 5)
    with pytest.raises(UsageError, match=r"returned 'out' \(5, 3, 2\).*for 5 images"):
        LogitsReader().read({"out": LOGITS[..., None].expand(5, 3, 2), "features": FEATURES, "more": FEATURES}, 5)


def test_the_output_is_chosen_at_the_first_pass():
    reader = LogitsReader(classes=3)
    reader.read((FEATURES, LOGITS), 5)
    torch.testing.assert_close(reader.read((LOGITS, 2 * LOGITS), 5), 2 * LOGITS)
    with pytest.raises(UsageError, match="returned 12 logits per image, and 3 in another pass"):
        reader.read((LOGITS, FEATURES), 5)
    torch.testing.assert_close(reader.read(LOGITS, 5), LOGITS)  # nets that return more in training
    with pytest.raises(UsageError, match=r"no '1' for 5 images but 'a' \(5, 3\)"):
        reader.read({"a": LOGITS}, 5)


def test_squeezed_logits_of_one_image_are_read():
    torch.testing.assert_close(LogitsReader().read(LOGITS[0], 1), LOGITS[:1])
    torch.testing.assert_close(LogitsReader(binary="logit").read(torch.tensor(3.0), 1), torch.tensor([[0.0, 3.0]]))


CODE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        z = (x.flatten(1) - 0.5).sum(1, keepdim=True)
        two = torch.cat((-z / 2, z / 2), 1)
        return {"column": z, "flat": z.squeeze(), "p": z.sigmoid(), "two": two, "both": (two.repeat(1, 6), two),
                "pair": (two, 2 * two)}[self.what]


def build(what="two"):
    return Net(what)
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    return f"{tmp_path}/net.py:build"


@pytest.mark.parametrize("binary", ["sigmoid", True])
def test_ways_to_read_a_binary_model_are_known_by_name(binary: object) -> None:
    with pytest.raises(UsageError, match=f"no way to read a binary model: '{binary}'"):
        as_classifier(torch.nn.Flatten(), binary=binary)  # type: ignore[arg-type]


@pytest.mark.parametrize("query", ["what=column&binary=logit", "what=flat&binary=logit", "what=both"])
def test_verdicts_and_margins_are_those_of_the_same_net_with_two_logits(net, query):
    """The margin of z is |z|; a step of eps on every pixel takes it down by eps times their number."""
    x = torch.full((3, 1, 3, 4), 0.5) + torch.tensor([0.01, 0.03, -0.03]).view(3, 1, 1, 1)
    y = torch.tensor([1, 1, 0])
    report = evaluate(load_model(f"{net}?{query}"), x, y, "linf:0.02", suite="fgsm")
    assert [verdict.robust for verdict in report.verdicts] == [False, True, True]
    np.testing.assert_allclose([abs(v.margin) for v in report.verdicts], [0.12, 0.12, 0.12], atol=1e-5)


def test_probabilities_of_one_class(net):
    model = load_model(f"{net}?what=p&binary=probability")
    x = torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert model.num_classes == 2
    torch.testing.assert_close(
        model(x), (x.flatten(1) - 0.5).sum(1, keepdim=True).mul(torch.tensor([-1.0, 1.0])).sigmoid()
    )
    with pytest.raises(UsageError, match="is no probability: write binary=logit"):
        load_model(f"{net}?what=column&binary=probability")(x)


def test_the_choice_is_part_of_the_fingerprint(net):
    strings = [f"{net}?what=pair", f"{net}?what=pair&output=1", f"{net}?what=pair&output=0"]
    assert len({load_model(string).fingerprint for string in strings}) == 3
    assert load_model(strings[1]).string == strings[1]
    x = torch.rand(5, 1, 3, 4)
    torch.testing.assert_close(load_model(strings[1])(x), 2 * load_model(strings[2])(x))
    again = as_classifier(lambda x: (x.flatten(1)[:, :2], x.flatten(1)[:, 2:4]), output=1)
    torch.testing.assert_close(again(x), x.flatten(1)[:, 2:4])


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("what=column", r"returned shape \(5, 1\) for 5 images: write \?binary=logit .*, \?binary=probability"),
        ("what=flat", r"returned shape \(5,\) for 5 images: write \?binary=logit"),
        (
            "what=two&binary=logit",
            r"shape \(5, 2\) for 5 images, not one number per image: leave binary=logit out",
        ),
        ("what=pair", r"'0' \(5, 2\), '1' \(5, 2\) for 5 images.*write output=0 in the query"),
    ],
)
def test_errors_name_the_field_to_set(net, query, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_model(f"{net}?{query}")(torch.rand(5, 1, 3, 4))


def test_impossible_fields_are_refused(net):
    with pytest.raises(UsageError, match="Did you mean 'logit'"):
        load_model(f"{net}?binary=logits")
    with pytest.raises(UsageError, match="output= is empty"):
        load_model(f"{net}?output=")
    with pytest.raises(UsageError, match=r"as_classifier\(model, binary='logit'\)"):
        as_classifier(lambda x: x.mean((1, 2, 3)))(torch.rand(5, 1, 3, 4))
    with pytest.raises(UsageError, match="is loaded already"):
        as_classifier(load_model(net), output=1)


def test_binary_for_a_net_without_one_number_per_image_is_refused() -> None:
    with pytest.raises(UsageError, match=r"none with one number per image: leave binary=logit out\.$"):
        LogitsReader(binary="logit").read((FEATURES, LOGITS), 5)
