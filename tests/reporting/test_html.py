"""The page and the card: complete, small, escaped, self-contained, for ordinary and extreme runs."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reports import FLAG, make_examples, make_report

from robustkit.core.flags import Flag, passed, unmeasured
from robustkit.registry import parse_suite
from robustkit.reporting import costs, sentences
from robustkit.reporting.charts import classes, histogram, svg
from robustkit.reporting.charts.card import card
from robustkit.reporting.charts.thumbnails import enlargement, picture
from robustkit.reporting.html import render, trust
from robustkit.reporting.html.command import command, suite
from robustkit.reporting.html.evaluation import page
from robustkit.reporting.names import stage_names
from robustkit.runs.evaluation_record import Report
from robustkit.runs.report_parts import Audit, Cost, Draws, Rate
from robustkit.runs.spec import dumps

VOID = {"meta", "br", "img"}
LONG = "./" + "folder/" * 30 + "x" * 120 + ".py:build@" + "w" * 90 + ".pt?mean=0.5,0.5,0.5&size=224"
CASES = {
    "usual": (make_report(), (3, 32, 32)),
    "none fooled": (make_report(fooled=0, wrong=0), (3, 32, 32)),
    "all fooled": (make_report(40, 36, flags=(FLAG,)), (3, 32, 32)),
    "single, fooled": (make_report(1, 1, wrong=0, attacks=("pgd",)), (3, 32, 32)),
    "single, robust": (make_report(1, 0, wrong=0, attacks=("pgd",)), (3, 32, 32)),
    "single, wrong": (make_report(1, 0, wrong=1, attacks=("pgd",)), (3, 32, 32)),
    "10,000 large images": (make_report(10000, 4000, wrong=900, classes=100), (3, 224, 224)),
    "1,000 classes": (make_report(5000, 2000, wrong=900, classes=1000), (3, 96, 60)),
    "grey digits": (make_report(), (1, 8, 8)),
    "five channels": (make_report(), (5, 6, 8)),
    "long strings": (make_report(model=LONG, data="/" + "d" * 300 + ".npz"), (3, 32, 32)),
    "twelve attacks": (make_report(90, 60, attacks=tuple(f"autoattack:apgd-{i}" for i in range(12))), (3, 32, 32)),
    "eps 0": (make_report(fooled=0, threat="linf:0"), (3, 32, 32)),
}


class Tree(HTMLParser):
    """Checks that tags are balanced; keeps attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.tags if name == tag]
        return [attrs for attrs in found if kind is None or kind in (attrs.get("class") or "").split()]


def read(report: Report, shape: tuple[int, ...] = (3, 32, 32)) -> Tree:
    return Tree(page(report, make_examples(report, shape)))


@pytest.mark.parametrize("case", CASES)
def test_every_page_is_valid_and_self_contained(case: str) -> None:
    report, shape = CASES[case]
    text = page(report, make_examples(report, shape))
    assert len(text.encode()) < 2_000_000
    tree = Tree(text)
    assert "script" not in {tag for tag, _ in tree.tags}
    assert "link" not in {tag for tag, _ in tree.tags}
    outside = text.replace("url(#hatch)", "").replace("url(#dots)", "")
    assert "url(" not in outside
    assert "@import" not in outside
    assert not re.search(r"https?://", outside)
    for _, attrs in tree.tags:
        assert (attrs.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attrs.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
    assert "nan" not in re.findall(r'(?:x|y|x1|x2|width|height)="([^"]*)"', text)
    assert not re.search(r'="[^"]*(nan|inf)[%"]', text)


@pytest.mark.parametrize("case", CASES)
def test_every_card_has_the_same_size(case: str) -> None:
    report, _ = CASES[case]
    image = Image.open(io.BytesIO(card(report)))
    assert image.size == (1200, 630)
    pixels = np.asarray(image.convert("L"))
    edges = np.concatenate(
        [pixels[:, :8].ravel(), pixels[:, -8:].ravel(), pixels[:8].ravel(), pixels[-8:].ravel()]
    )
    assert (edges == 255).all()  # nothing is cut off


def test_the_same_report_gives_the_same_bytes() -> None:
    report = make_report(flags=(FLAG,))
    assert card(report) == card(report)
    assert page(report, make_examples(report)) == page(report, make_examples(report))


def test_the_page_has_the_numbers_of_the_report() -> None:
    text = read(make_report()).text
    assert "24 of 40 images stay correctly classified under every attack of this run." in text
    assert "Robust accuracy 60.0 % , 95 % interval 44.6 – 73.7 %." in text
    assert "90.0 % (95 % interval 76.9 – 96.0 %)" in text
    assert "no pixel value changes by more than 8/255" in text
    assert "after pgd 75.0 % (59.8 – 85.8)" in text
    assert "after autoattack:square 60.0 % (44.6 – 73.7)" in text
    assert "n = 12, eps = 8/255 = 0.03137" in text
    assert "this run used 133 passes per image" in text
    assert "<title>60.0 % robust accuracy: robustkit:digits-cnn</title>" in page(make_report(), None)


def test_the_order_of_the_sections() -> None:
    text = page(make_report(flags=(FLAG,)), make_examples(make_report()))
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        "Can this number be trusted?",
        "Robust accuracy after each attack",
        "Accuracy per class",
        "Margins and distances",
        "Fooled images",
        "Cost of each stage",
        "How to reproduce",
    ]


def test_the_verdict_of_one_image() -> None:
    assert sentences.verdict(CASES["single, fooled"][0]) == "The one image is fooled by pgd."
    assert sentences.verdict(CASES["single, wrong"][0]) == "The one image is misclassified without an attack."
    assert sentences.verdict(CASES["single, robust"][0]).startswith("The one image stays correctly classified")


def test_a_run_without_examples_has_every_other_section() -> None:
    tree = Tree(page(make_report(), None))
    assert not tree.all("img")
    assert "This run folder has no examples.npz" in tree.text
    assert "Cost of each stage" in tree.text
    assert "No attack fooled the model on any image" in read(CASES["none fooled"][0]).text


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        ((), "The checks raised no flag."),
        (("info",), "The checks raised no warning, 1 note."),
        (
            ("info", "warning", "warning"),
            "Read the flags before quoting this number: the checks raised 2 warnings, 1 note.",
        ),
        (("warning", "error"), "Do not quote this number: the checks raised 1 error, 1 warning."),
    ],
)
def test_flags_are_summarised_before_the_charts(levels: tuple[str, ...], sentence: str) -> None:
    flags = tuple(Flag(f"flag-{i}", level, None, "it is so", "do this") for i, level in enumerate(levels))
    text = read(make_report(flags=flags)).text
    assert sentence in text
    assert text.index(sentence) < text.index("Robust accuracy after each attack")


def test_a_flag_shows_code_level_value_and_remedy() -> None:
    tree = read(make_report(flags=(FLAG,)))
    assert tree.all("article", "warning")
    for part in (
        FLAG.code,
        "▲ warning",
        "7 the gradient is zero for some images.",
        "Run an attack without gradients.",
    ):
        assert part in tree.text


def test_the_page_lists_every_check_and_its_result() -> None:
    ok = passed("not-converged", 2, "of 32 images fall late")
    why = unmeasured("attack-not-alive", "nothing could be planted", "go by the rest")
    report = replace(
        make_report(flags=(FLAG,)), passed=(why, ok, passed("zero-gradient", 0, "is hidden by its flag"))
    )
    report = Report.from_json(json.loads(dumps(report.to_json())))
    assert report.passed == [why, ok, passed("zero-gradient", 0, "is hidden by its flag")]
    found = trust.rows(report)
    assert len(found) == len(trust.CLAIMS) - 1
    assert found[0] == ("Twice the steps find little more", ok)
    assert [flag.level for _, flag in found] == ["ok"] + ["not measured"] * (len(found) - 1)
    text = read(report).text
    for part in (
        "Twice the steps find little more ✓ ok 2 of 32 images fall late.",
        "The attack finds planted adversarial images ○ not measured Nothing could be planted. Go by the rest.",
        "AutoAttack finds little more ○ not measured AutoAttack was not run on any robust image. Add --audit 50.",
        "Nothing is optimised at test time ○ not measured This run did not record it.",
    ):
        assert text.index(FLAG.code) < text.index(part) < text.index("Robust accuracy after each attack")
    assert "is hidden by its flag" not in text
    audited = report.with_audit(Audit.of(range(5), [], 24, 40, Cost(1, 1, 1)))
    assert ("ok", 0) in {(flag.level, flag.value) for _, flag in trust.rows(audited) if "of 5" in flag.meaning}


def test_three_accuracies_of_a_randomised_model_are_on_the_page() -> None:
    draws = Draws(Rate.of(30, 40), 0.7, Rate.of(24, 40), 0.25)
    text = read(replace(make_report(), draws=draws)).text
    for part in ("by one draw 75.0 %", "mean over draws 70.0 %", "by the majority of draws 60.0 %"):
        assert part in text
    assert "0.25 of accuracy, 25.0 %, would be lost" in text


def test_stages_of_one_name_are_distinguished_by_a_field() -> None:
    report = make_report(attacks=("pgd", "square", "pgd"))
    assert stage_names(report) == ["clean", "pgd #1", "square", "pgd #2"]
    suite = [{**record, "steps": steps} for record, steps in zip(report.spec.suite, (1, 9, 5), strict=True)]
    report = replace(report, spec=replace(report.spec, suite=suite))
    assert stage_names(report) == ["clean", "pgd(steps=1)", "square", "pgd(steps=5)"]
    assert stage_names(Report.from_json(json.loads(dumps(report.to_json())))) == stage_names(report)
    assert "after pgd(steps=5)" in read(report).text


def test_markup_in_names_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
    flag = Flag(evil, "warning", 1, evil, evil)
    report = make_report(model=evil, data=evil, flags=(flag,), attacks=(evil,))
    text = page(report, make_examples(report, classes=(evil,) * 11))
    tree = Tree(text)
    assert "<script" not in text
    assert all((attrs["src"] or "").startswith("data:") for attrs in tree.all("img"))
    assert evil in "".join(tree.words)
    assert len(card(report)) > 1000
    assert len(card(make_report(model="$\\frac{$", data="$x_{"))) > 1000


def test_many_classes_show_the_least_robust() -> None:
    report, shape = CASES["1,000 classes"]
    tree = read(report, shape)
    assert "The 20 least robust of 1000 classes" in tree.text
    rows, count = classes.rows(report, [])
    assert (len(rows), count) == (20, 1000)
    assert {row.robust.value for row in rows} == {0.4}  # of 5 images each, most classes keep 2 and some 3
    few_classes, _ = classes.rows(make_report(), ["zero", "one"])
    assert [row.name for row in few_classes[:3]] == ["zero", "one", "class 2"]
    assert (few_classes[0].robust.n, few_classes[0].clean.value, few_classes[0].robust.value) == (4, 0.75, 0.5)


def test_margin_bars_count_every_image_once_and_separate_right_from_wrong() -> None:
    report = make_report(400, 150, wrong=40)
    chart, beyond = histogram.margins(report)
    heights: dict[str, float] = {}
    for x, height, kind in re.findall(
        r'<rect x="([\d.-]+)%" y="[\d.-]+" width="[\d.]+%" height="([\d.]+)" class="(\w+)"', chart
    ):
        heights[kind] = heights.get(kind, 0.0) + float(height)
        mark = float(re.search(r'<line x1="([\d.]+)%"[^>]*class="mark"', chart)[1])
        assert (float(x) >= mark) == (kind == "robust")
    per_image = sum(heights.values()) / 400
    assert {kind: round(total / per_image) for kind, total in heights.items()} == {
        "robust": 210,
        "fooled": 150,
        "clean": 40,
    }
    assert 0 < beyond <= 8


def test_shares_of_cost_add_up() -> None:
    report = make_report()
    rows = costs.rows(report)
    assert sum(row.share_passes for row in rows) == pytest.approx(1)
    assert sum(row.share_seconds for row in rows) == pytest.approx(1)
    assert [row.entering for row in rows] == [40, 36, 30]
    assert rows[0].fooled_per_1000 is None
    assert rows[1].fooled_per_1000 == pytest.approx(1000 * 6 / (36 * 80))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("robustkit:cifar-resnet20@/work/models/at.safetensors?size=8", "robustkit:cifar-resnet20@at.safetensors"),
        ("./my_net.py:build@w.pt", "my_net.py:build@w.pt"),
        ("runs/train-3f9c/#2", "train-3f9c/#2"),
        ("timm:resnet50.a1_in1k", "timm:resnet50.a1_in1k"),
        ("a/net.py:f@w.pt?size=8&defense=jpeg:75+bit-depth:4", "net.py:f@w.pt?defense=jpeg:75+bit-depth:4"),
    ],
)
def test_model_names_have_no_folders(text: str, name: str) -> None:
    assert sentences.model_name(make_report(model=text)) == name


def test_the_printed_command_reproduces_the_run_id() -> None:
    text = "pgd(steps=7,loss=ce,random_start=false),autoattack:apgd-t(steps=9),foolbox:L2DeepFoolAttack(steps=5)"
    records = [entry.spec for entry in parse_suite(text, "l2")]
    assert [entry.spec for entry in parse_suite(suite(records), "l2")] == records
    report = make_report(model="./a net.py:build", data="/d/x.npz")
    assert command(report) == (
        "robustkit evaluate './a net.py:build' --data /d/x.npz --limit 40 --threat linf:8/255 --suite "
        "'pgd(steps=40,step_size=0.1,random_start=true),"
        "autoattack:square(steps=40,step_size=0.1,random_start=true)' --seed 0 --precision fp32"
    )
    assert command(make_report(model="python:Net", data="python:arrays")).startswith(
        'evaluate(model, images, labels, "'
    )


@pytest.mark.parametrize(
    ("largest", "factor"), [(8 / 255, 15.0), (0.5, 1.0), (1.0, 0.5), (0.3, 1.6), (0.0, 1.0), (1e-4, 5000.0)]
)
def test_the_enlargement_factor_keeps_the_difference_in_range(largest: float, factor: float) -> None:
    assert enlargement(largest) == pytest.approx(factor)
    assert largest * enlargement(largest) <= 0.5 + 1e-9


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    image = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    uri = picture(image)
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert drawn.shape == (96, 96)
    assert (drawn[::12, ::12] == np.rint(255 * image[0])).all()
    assert (drawn[11::12, 11::12] == drawn[::12, ::12]).all()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 3, [-2, 0, 2]), (0, 40, [0, 10, 20, 30, 40]), (0, 8 / 255, None)],
)
def test_ticks_are_round(low: float, high: float, expected: list[float] | None) -> None:
    found = svg.ticks(low, high)
    assert found == expected or (expected is None and all(low <= tick <= high for tick in found))
    assert 2 <= len(found) <= 8


def test_the_style_covers_light_dark_narrow_and_print() -> None:
    css = (Path(render.__file__).parent / "page.css").read_text()
    for media in ("prefers-color-scheme: dark", "max-width: 600px", "@media print"):
        assert media in css


def test_every_template_extends_the_base() -> None:
    names = {file.name: file.read_text() for file in Path(render.__file__).parent.glob("*.html")}
    for shared in ("base.html", "parts.html"):
        del names[shared]
    for name, text in names.items():
        assert text.startswith('{% extends "base.html" %}'), name
        assert not re.search("<html|<style|<footer|How to reproduce", text), name
