"""Defenses in front of a model: what each does to an image, and what the strings, runs and checks make of it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Small
from PIL import Image
from torch import nn

from robustkit import UsageError, evaluate, load_model, verify
from robustkit.cli import run
from robustkit.core.isolation import own_randomness
from robustkit.core.threat import ThreatModel
from robustkit.data.sources.arrays import from_arrays
from robustkit.diagnostics.doctor import examine
from robustkit.models import Classifier
from robustkit.registry import catalog, parse_defenses, spec

SHAPE = (5, 3, 7, 9)
DETERMINISTIC = ("jpeg:60", "bit-depth:3", "jpeg:60+bit-depth:3", "resize-pad:1", "smoothing:0,3")
RANDOM = ("resize-pad:1.3", "smoothing:0.25,3", "resize-pad:1.3+smoothing:0.1,2", "jpeg:60+resize-pad:1.3")
NETS = Path(__file__).parents[1] / "nets.py"


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def defended(text: str, net: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Classifier:
    return Classifier(
        net or Small(classes=4).requires_grad_(False), string="", identity={}, defenses=parse_defenses(text)
    )


def seen(text: str, x: torch.Tensor) -> torch.Tensor:
    """Return the images that the net behind a defense is given."""
    (defense,) = parse_defenses(text)
    given = []

    def model(images: torch.Tensor) -> torch.Tensor:
        given.append(images)
        return images.flatten(1)[:, :4]

    defense(model, x)
    return torch.cat(given)


# Closed forms


@pytest.mark.parametrize("quality", [1, 10, 75, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillows(quality: int, channels: int) -> None:
    smooth = F.interpolate(images(5, channels, 5, 4), (33, 18), mode="bicubic").clamp(0, 1)
    for x in (smooth, images(5, channels, 7, 9)):
        levels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        expected = []
        for level in levels:
            file = io.BytesIO()
            Image.fromarray(level if channels == 3 else level[:, :, 0]).save(file, "JPEG", quality=quality)
            expected.append(np.array(Image.open(file)).reshape(level.shape))
        got = seen(f"jpeg:{quality}", x)
        torch.testing.assert_close(got, torch.tensor(np.stack(expected)).permute(0, 3, 1, 2) / 255)
        assert (got != x).any()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_depth_rounds_to_the_nearest_level(bits: int) -> None:
    x, steps = images(*SHAPE, dtype=torch.float64), 2**bits - 1
    levels = torch.arange(steps + 1, dtype=torch.float64) / steps
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    assert torch.equal(seen(f"bit-depth:{bits}", x), nearest)
    assert torch.equal(seen(f"bit-depth:{bits}", nearest), nearest)
    assert torch.equal(seen(f"bit-depth:{bits}", 4 * x - 2), seen(f"bit-depth:{bits}", (4 * x - 2).clamp(0, 1)))


def test_eight_bits_do_not_change_image_files() -> None:
    x = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16) / 255
    assert torch.equal(seen("bit-depth:8", x), x)


@pytest.mark.parametrize("ratio", [1.2, 1.5, 2])
def test_resize_pad_is_some_resizing_at_some_place(ratio: float) -> None:
    x = images(800, 3, 7, 9) + 0.5
    out = seen(f"resize-pad:{ratio}", x)
    height, width = round(7 * ratio), round(9 * ratio)
    assert out.shape == (800, 3, height, width)
    found = []
    for image, result in zip(x, out, strict=True):
        down, right = ((result[0] != 0).any(axis).nonzero()[:, 0] for axis in (1, 0))
        top, left, size = int(down[0]), int(right[0]), (len(down), len(right))
        expected = torch.zeros_like(result)
        inside = F.interpolate(image[None], size, mode="nearest")[0]
        expected[:, top : top + size[0], left : left + size[1]] = inside
        assert torch.equal(result, expected)
        found.append((*size, top, left))
    sizes, tops = {row[0] for row in found}, {row[2] for row in found}
    assert sizes == set(range(7, height))
    assert tops == set(range(height - 7 + 1))
    assert len(set(found)) >= (4 if ratio == 1.2 else 20)


def test_resize_pad_at_ratio_1_changes_nothing() -> None:
    x = images(*SHAPE)
    assert torch.equal(seen("resize-pad:1", x), x)


def test_resize_pad_has_the_gradient_of_a_gather() -> None:
    x = images(*SHAPE).requires_grad_()
    (gradient,) = torch.autograd.grad(seen("resize-pad:2", x).sum(), x)
    assert torch.equal(gradient, gradient.round())
    assert gradient.min() >= 1
    with_border = [int((image != 0).any(0).sum()) for image in seen("resize-pad:2", x.detach() + 1)]
    assert min(with_border) >= 7 * 9


def test_smoothing_without_noise_is_the_nets_vote() -> None:
    x, net = images(50, 3, 7, 9), Small(classes=4)
    with torch.no_grad():
        logits, plain = defended("smoothing:0,3", net)(x), net(x)
        votes = F.one_hot(plain.argmax(1), 4) * 3
        torch.testing.assert_close(logits, (votes + (plain.softmax(1) + 0.25) / 2).log())
    assert torch.equal(logits.argmax(1), plain.argmax(1))


def test_smoothing_counts_votes_and_breaks_ties_by_probability() -> None:
    answers = iter([[[0.0, 9.0, 0.0]], [[1.0, 0.0, 0.0]], [[1.0, 0.9, 0.0]], [[0.0, 9.0, 0.0]], [[5.0, 0, 0]]])
    (defense,) = parse_defenses("smoothing:1,5")
    assert defense(lambda x: torch.tensor(next(answers)), images(1, 1, 2, 3)).argmax() == 0
    answers = iter([[[0.0, 9.0, 0.0]], [[1.0, 0.0, 0.0]]])
    (defense,) = parse_defenses("smoothing:1,2")
    assert defense(lambda x: torch.tensor(next(answers)), images(1, 1, 2, 3)).argmax() == 1


def test_smoothings_noise_has_its_deviation_and_is_each_images_own() -> None:
    with own_randomness("noise"):
        noise = seen("smoothing:0.5,40", torch.zeros(5, 3, 17, 19)).view(40, 5, -1)
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert abs(noise.mean().item()) < 0.01
    rows = noise.transpose(0, 1).flatten(1)
    assert (torch.corrcoef(rows) - torch.eye(5)).abs().max() < 0.05


def test_a_votes_certain_answer() -> None:
    """A linear net's smoothed answer is known: noise of deviation s on the margin m gives the share Phi(m / s)."""
    weights = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    (defense,) = parse_defenses("smoothing:0.5,4000")
    x = torch.tensor([0.5, -0.25, 0.0]).view(3, 1, 1, 1).expand(3, 2, 1, 1)
    with own_randomness("votes"):
        votes = defense(lambda x: x.flatten(1) @ weights.T, x).exp()
    share = votes[:, 0] / votes.sum(1)
    expected = torch.distributions.Normal(0, 1).cdf(torch.tensor([1.0, -0.5, 0.0]))
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


def test_a_chain_is_met_from_left_to_right() -> None:
    x, net = images(4, 3, 16, 16), Small(classes=4).requires_grad_(False)
    inner = seen("bit-depth:2", seen("jpeg:30", x))
    assert torch.equal(defended("jpeg:30+bit-depth:2", net)(x), net(inner))
    assert not torch.equal(inner, seen("jpeg:30", seen("bit-depth:2", x)))


# All of them


@pytest.mark.parametrize("text", [*DETERMINISTIC, *RANDOM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_types_and_inputs_are_kept(text: str, dtype: torch.dtype) -> None:
    x = images(*SHAPE, dtype=dtype)
    before = x.clone()
    given: list[torch.Tensor] = []

    def net(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return x.mean((2, 3))

    logits = defended(text, net)(x)
    assert torch.equal(x, before)
    assert (logits.shape, logits.dtype, logits.device) == ((5, 3), dtype, x.device)
    assert {(len(each), each.dtype) for each in given} == {(5, dtype)}
    assert logits.isfinite().all()
    assert defended(text, net)(x[:1]).shape == (1, 3)
    assert defended(text, net)(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("text", DETERMINISTIC)
def test_deterministic_defenses_are_independent_of_the_batch(text: str) -> None:
    x, model = images(*SHAPE), defended(text, lambda x: x.flatten(1))
    whole = model(x)
    assert torch.equal(whole, model(x))
    assert torch.equal(whole, torch.cat([model(row[None]) for row in x]))
    assert torch.equal(whole.flip(0), model(x.flip(0)))
    assert torch.equal(whole, model(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("text", RANDOM)
def test_random_defenses_draw_from_torchs_generator_only(text: str) -> None:
    model, x = defended(text), images(*SHAPE)
    with torch.no_grad():
        with own_randomness("a"):
            first, second = model(x), model(x)
        with own_randomness("a"):
            again = model(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("text", catalog("defense"))
def test_defaults_and_specs(text: str) -> None:
    (made,) = parse_defenses(text)
    record = json.loads(json.dumps(spec(made)))
    assert record.pop("name") == text
    assert type(made)(**record) == made
    written = ",".join(map(str, record.values()))
    assert parse_defenses(f"{text}:{written}") == (made,)


def test_the_source_text_has_the_names_that_the_decorator_registers() -> None:
    for name, entry in catalog("defense").items():
        (made,) = parse_defenses(name)
        assert made.info == entry.info
        assert entry.info.paper.startswith("arXiv:")
        assert [field.name for field in entry.fields] == [field.name for field in dataclasses.fields(made)]
        assert entry.summary.endswith(".")


# Strings and identity


def test_the_string_builds_the_same_again() -> None:
    string = "robustkit:digits-cnn?size=8&defense=jpeg:75+smoothing:0.25,4"
    model = load_model(string)
    assert model.string == string
    again = load_model(model.string)
    assert again.defenses == model.defenses == parse_defenses("jpeg:75+smoothing:0.25,4")
    assert again.fingerprint == model.fingerprint
    assert not model.training


def test_the_defense_is_in_the_fingerprint() -> None:
    texts = ("", "?defense=jpeg:75", "?defense=jpeg:74", "?defense=bit-depth:4", "?defense=bit-depth:4+jpeg:75")
    prints = {load_model(f"robustkit:digits-cnn{text}").fingerprint for text in (*texts, f"{texts[4][:9]}jpeg:75")}
    assert len(prints) == len(texts)
    names = ("jpeg", "jpeg:75", "jpeg%3A75")
    assert len({load_model(f"robustkit:digits-cnn?defense={name}").fingerprint for name in names}) == 1
    plain, swapped = (
        load_model(f"robustkit:digits-cnn?defense={text}").fingerprint
        for text in ("jpeg:75+bit-depth:4", "bit-depth:4+jpeg:75")
    )
    assert plain != swapped


def test_the_defense_comes_before_resizing() -> None:
    model = load_model(f"{NETS}:small?size=5&mean=0.1&defense=resize-pad:2")
    x = images(3, 3, 7, 9)
    with torch.no_grad(), own_randomness("size"):
        got = model(x)
    with torch.no_grad(), own_randomness("size"):
        assert torch.equal(got, load_model(f"{NETS}:small?size=5&mean=0.1")(seen("resize-pad:2", x)))


def test_a_net_of_one_size_says_what_to_do() -> None:
    x = images(2, 1, 8, 8)
    with pytest.raises(UsageError, match=r"resize-pad:1.25.*does not take images of shape \(1, 10, 10\).*size=N"):
        Classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            string="m:f?defense=resize-pad:1.25",
            identity={},
            defenses=parse_defenses("resize-pad:1.25"),
        )(x)


# What the checks and a run make of them


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("jpeg:50", {"zero-gradient"}),
        ("bit-depth:3", {"zero-gradient"}),
        ("resize-pad:1.3", {"randomised"}),
        ("smoothing:0.1,2", {"randomised"}),
        ("jpeg:50+smoothing:0.1,2", {"zero-gradient", "randomised"}),
    ],
)
def test_the_doctor_raises_the_flags_of_masked_gradients(text: str, codes: set[str]) -> None:
    model, x = defended(text), images(12, 3, 7, 9)
    with torch.no_grad():
        labels = Small(classes=4)(x).argmax(1)
    found = examine(model, from_arrays(x, labels), ThreatModel.parse("linf:8/255"), torch.device("cpu"))
    assert codes <= {flag.code for flag in found.flags}
    noted = [flag.meaning for flag in found.flags if flag.code == "randomised"]
    assert all("source: torch)" in meaning for meaning in noted)


def test_a_run_says_that_there_is_no_gradient() -> None:
    x = images(6, 3, 7, 9)
    report = evaluate(defended("jpeg:50"), x, torch.arange(6) % 4, ThreatModel.parse("linf:8/255"), suite="fgsm")
    assert {"zero-gradient", "no-gradient"} <= {flag.code for flag in report.flags}


def test_defenses_work_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["robustkit:digits-cnn?defense=jpeg:75", "--limit", "16", "--out", str(tmp_path), "--no-html"]
    assert run(["evaluate", *command, "--suite", "fgsm,square(queries=60)"]) == 0
    assert "zero-gradient" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "spec.json").read_text())["model"]
    assert recorded["string"] == "robustkit:digits-cnn?defense=jpeg:75"
    assert recorded["fingerprint"] == load_model(recorded["string"]).fingerprint
    assert run(["verify", str(tmp_path)]) == 0
    assert "all good" in capsys.readouterr().out
    assert run(["verify", str(tmp_path), "--model", "robustkit:digits-cnn"]) == 1
    assert "have changed since the run" in capsys.readouterr().out


class Startled(torch.nn.Module):
    """A net that is wrong in two of three draws where an image is not as it was: not made of sixteenths."""

    def __init__(self) -> None:
        super().__init__()
        self.net = load_model("robustkit:digits-cnn")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.net(x)
        touched = (x * 16 % 1 > 0).flatten(1).any(1) & (torch.rand(len(x)) < 2 / 3)
        return torch.where(touched[:, None], logits.roll(1, 1), logits)


def test_other_draws_of_a_random_defense_verify(tmp_path: Path) -> None:
    from robustkit import load_data

    data = load_data("digits:test").head(24)
    model = Startled()
    labels = torch.from_numpy(data.labels)
    threat = ThreatModel.parse("linf:0.01")
    report = evaluate(model, data.images(range(24)), labels, threat, suite="pgd(steps=5)", out=tmp_path)
    assert report.robust_accuracy.value < 0.5
    found = verify(tmp_path, model, data.images(range(24)), labels)
    assert found.bad == []
    assert any("the model is random" in sentence for sentence in found.borderline)
    # Where nothing is random, the same images are bad.
    found = verify(tmp_path, load_model("robustkit:digits-cnn"), data.images(range(24)), labels)
    assert any("does not fool the model" in sentence for sentence in found.bad)
