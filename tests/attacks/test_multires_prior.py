"""The multi-resolution prior: what its changes look like, and pictures made with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from robustkit import load_model
from robustkit.attack_api import Answer, Rows
from robustkit.attacks.gradient.multires_prior import MAX_SUM_EPS, coarse
from robustkit.cli import run
from robustkit.core.criteria import Goal
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.registry import make

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "tools"))
X = torch.full((3, 2, 16, 16), 0.5)


def rows(threat: str) -> Rows:
    goal = Goal(torch.zeros(3, dtype=torch.int64))
    return Rows(X, goal, ThreatModel.parse(threat), RowRng(0, "test", torch.arange(3)), goal)


def answer(seed: int = 0, scale: float = 1.0) -> Answer:
    gradient = scale * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
    return Answer(torch.zeros(3, 10), torch.zeros(3), gradient)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_change_without_fine_parts_is_smooth(norm: str) -> None:
    """It is a sum of enlarged tensors of 4 x 4 and of 2 x 2 pixels, found again by least squares."""
    attack, rules = make("multires-prior", skip=2, step_size=0.2), rows(f"{norm}:0.3")
    state = attack.init(rules)
    for seed in range(3):
        state = attack.step(rules, state, answer(seed))
    change = (state["x"] - X).flatten(2).double()
    parts = [torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size) for size in (4, 2)]
    basis = torch.cat([F.interpolate(part, (16, 16), mode="bicubic").flatten(1) for part in parts])
    # In linf what is beyond eps is cut off.
    whole = state["sum"].flatten(2).double()
    assert float((whole - whole @ torch.linalg.pinv(basis) @ basis).abs().max()) < 1e-6
    if norm == "l2":
        assert torch.allclose(change, whole, atol=1e-6)
    else:
        assert torch.allclose(change, whole.clamp(-0.3, 0.3), atol=1e-6)
    assert change.abs().amax() > 0.01


def test_steps_are_shares_of_eps() -> None:
    """And sums stay within reach; the size of the gradient does not matter, and none moves nothing."""
    for norm, size in (("linf", lambda x: x.abs().flatten(1).mean(1)), ("l2", lambda x: x.flatten(1).norm(dim=1))):
        attack, rules = make("multires-prior"), rows(f"{norm}:0.3")
        state = attack.init(rules)
        one = attack.step(rules, state, answer())
        assert size(one["sum"]).tolist() == pytest.approx([0.03] * 3, rel=1e-4)
        tiny = attack.step(rules, state, answer(scale=1e-30))
        assert torch.allclose(tiny["sum"], one["sum"], atol=1e-6)
        assert torch.equal(attack.step(rules, state, answer(scale=0.0))["x"], X)
        for _ in range(100):
            state = attack.step(rules, state, answer())
        if norm == "linf":
            assert float(state["sum"].abs().max()) == pytest.approx(MAX_SUM_EPS * 0.3, rel=1e-4)
        else:
            assert size(state["sum"]).tolist() == pytest.approx([0.3] * 3, rel=1e-4)


def test_one_scale_is_plain_ascent() -> None:
    attack, rules = make("multires-prior", scales=1, step_size=0.5), rows("l2:0.3")
    moved = attack.step(rules, attack.init(rules), answer())["x"]
    assert torch.allclose(moved, X + 0.15 * F.normalize(answer().gradient.flatten(1)).view_as(X), atol=1e-6)
    assert torch.equal(coarse(X, 1), X)
    assert coarse(torch.rand(1, 1, 7, 9), 16).shape == (1, 1, 7, 9)


def test_no_scale_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves none"):
        make("multires-prior", scales=2, skip=2)


def test_the_prior_crafts_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a technique, which takes its gradients."""
    command = ["craft", "--limit", "8", "--threat", "linf:0.2", "--out", str(tmp_path)]
    assert run([*command, "--attack", "multires-prior(steps=4,skip=1)+di"]) == 0
    assert (tmp_path / "adversarial.npz").is_file()
    assert "4 gradients" in capsys.readouterr().out


def test_generated_images_are_classified_as_their_class(tmp_path: Path) -> None:
    import generate_images

    model = load_model("robustkit:digits-cnn")
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    attack = make("multires-prior", steps=30)
    grid = generate_images.pictures(model, images, 10, ThreatModel.parse("linf:0.5"), attack)
    assert grid.shape == (2, 11, 1, 8, 8)
    assert torch.equal(grid[1, 0], images[0])
    assert float((grid[1] - images).abs().max()) <= 0.5
    share, sure = generate_images.sureness(model, grid)
    assert share.tolist() == [1, 1]
    assert float(sure.min()) > 0.9
    generate_images.draw(grid).save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as file:
        assert file.size == (11 * 66, 2 * 66)
