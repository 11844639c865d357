"""Model strings and the fields of their queries."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.core.errors import UsageError
from robustkit.models.options import Options
from robustkit.models.strings import FILE, FOLDER, MODULE, SOURCE, ModelString


@pytest.mark.parametrize(
    ("text", "arch", "weights", "options", "kind"),
    [
        ("robustkit:digits-cnn", "robustkit:digits-cnn", None, {}, SOURCE),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k", None, {}, SOURCE),
        ("torchvision:resnet50@w.pt", "torchvision:resnet50", "w.pt", {}, SOURCE),
        ("a.b:Net@m.pt?size=8", "a.b:Net", "m.pt", {"size": "8"}, MODULE),
        ("./net.py:build@w.pt", "./net.py:build", "w.pt", {}, FILE),
        ("./@lib/net.py:build@w.pt", "./@lib/net.py:build", "w.pt", {}, FILE),
        ("m:f@runs/a@b.pt", "m:f", "runs/a@b.pt", {}, MODULE),
        ("m:f@what?.pt?mean=0.5", "m:f", "what?.pt", {"mean": "0.5"}, MODULE),
        ("m:f@w?a=1.pt?b=2", "m:f", "w?a=1.pt", {"b": "2"}, MODULE),
        ("m:f?text=a%20b%3F&n=3", "m:f", None, {"text": "a b?", "n": "3"}, MODULE),
        ("m:f?defense=a:1+b:2,3&n=4", "m:f", None, {"defense": "a:1+b:2,3", "n": "4"}, MODULE),
        ("runs/train-3f9c/#2", "runs/train-3f9c/#2", None, {}, FOLDER),
        ("  robustkit:wrn-28-10 ", "robustkit:wrn-28-10", None, {}, SOURCE),
    ],
)
def test_model_strings_parse(text, arch, weights, options, kind):
    spec = ModelString.parse(text)
    assert (spec.arch, spec.weights, spec.options, spec.kind) == (arch, weights, options, kind)
    assert ModelString.parse(str(spec)) == spec


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])) | st.text("ab:@?=&%/. 1"))
def test_parsed_strings_round_trip(text):
    try:
        spec = ModelString.parse(text)
    except UsageError:
        return
    assert ModelString.parse(str(spec)) == spec


@given(st.dictionaries(st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True).filter(str.isidentifier), st.text()))
def test_any_field_value_round_trips(options):
    spec = ModelString("m:f", "w.pt", options)
    assert ModelString.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no net"),
        ("timm:", "names no net: write timm:NAME"),
        ("robustkit:digits-cnn@", "no weights file after '@'"),
        ("./n.py:build?width=8@w.pt", "write @w.pt in front of the '?'"),
        ("m:f?a=1&a=2", "has the field 'a' twice"),
        ("m:f?a=1&b c=2", "has a field named 'b c'"),
    ],
)
def test_malformed_model_strings_are_refused(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        ModelString.parse(text)


def test_field_values_have_types():
    options = Options.read(ModelString.parse("m:f?mean=0.5&std=1,2,3&size=8,9&depth=3&p=1e-1&on=true&how=nan"))
    assert options == Options(
        mean=(0.5,),
        std=(1.0, 2.0, 3.0),
        size=(8, 9),
        keywords={"depth": 3, "p": 0.1, "on": True, "how": "nan"},
    )
    options = Options.read(ModelString.parse("timm:resnet18?num_classes=7&pretrained=false"))
    assert options == Options(num_classes=7, pretrained=False)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("mean=0.5,x", "numbers separated by commas.*'0.5,x'"),
        ("mean=nan", "numbers separated by commas"),
        ("std=0.5,0,1", "divides by 0"),
        ("size=0", "size=0 is no image size"),
        ("size=1,2,3", "size=HEIGHT,WIDTH"),
        ("num_classes=1", "num_classes=1 is not possible.*at least 2"),
        ("num_classes=ten", "num_classes=ten"),
        ("in_channels=0", "in_channels=0"),
        ("pretrained=no", "neither true nor false"),
        ("num_clases=3", "Did you mean 'num_classes'"),
    ],
)
def test_invalid_field_values_are_refused(query, sentence):
    with pytest.raises(UsageError, match=sentence):
        Options.read(ModelString.parse(f"robustkit:digits-cnn?{query}"))


def test_the_catalog_imports_no_torch():
    code = "import sys, robustkit.models.zoo.catalog, robustkit.models.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
