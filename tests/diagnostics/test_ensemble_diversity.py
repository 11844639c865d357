"""Members of an ensemble against each other: the reference's properties A-P12, 13, 15, 16 and traps 1, 6, 8."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import write_members, write_posterior
from torch import nn

from robustkit import diversity, load_data, load_model
from robustkit.cli import run
from robustkit.core import criteria
from robustkit.core.errors import UsageError
from robustkit.core.rng import RowRng
from robustkit.core.threat import ThreatModel
from robustkit.diagnostics.ensemble_members import STEP_SIZE, EnsembleMembers, attack, each_loss, transferred
from robustkit.models import Classifier
from robustkit.models.ensembles.mixture import Members
from robustkit.models.layers.features import distil
from robustkit.runs.craft_record import worst
from robustkit.runs.diversity_record import Diversity
from robustkit.training import ensemble_utils

DATA = load_data("digits:test").head(32)
THREAT = ThreatModel.parse("linf:0.12")
IMAGES = DATA.images(np.arange(32))
WRITERS = {"members": write_members, "samples": write_posterior}
LABELS = torch.from_numpy(DATA.labels)


def like(seed: int) -> nn.Module:
    """The built-in net with each weight a little off, by a seed."""
    net = copy.deepcopy(load_model("robustkit:digits-cnn").net)
    assert isinstance(net, nn.Module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.35 * weight.std() * torch.randn(weight.shape, generator=generator))
    return net


NETS = [like(seed) for seed in range(3)]


class Few(nn.Module):
    """A net without its last class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[:, :-1]


def ensemble(nets: Sequence[nn.Module]) -> Classifier:
    return Classifier(Members(nets), string="these", identity={"members": len(nets)}).eval()


def found(nets: Sequence[nn.Module] = NETS, restarts: int = 1, **words: Any) -> Diversity:
    return diversity(ensemble(nets), DATA, None, THREAT, steps=5, restarts=restarts, device="cpu", **words)


@functools.cache
def default_diversity() -> Diversity:
    return found()


def values(record: Diversity) -> torch.Tensor:
    return torch.tensor([[rate.value for rate in row] for row in record.transfer])


def test_the_record_holds_the_options_and_round_trips() -> None:
    record = default_diversity()
    assert len(record.index) > 16
    assert record.n == 32
    right = torch.stack([net(IMAGES).argmax(1) == LABELS for net in NETS])
    assert list(record.index) == right.all(0).nonzero()[:, 0].tolist()
    assert [rate.value for rate in record.accuracy[:3]] == pytest.approx(right.float().mean(1).tolist())
    assert record.clean.any.value == pytest.approx(float(right.any(0).float().mean()))
    assert record.clean.all.value == pytest.approx(float(right.all(0).float().mean()))
    assert record.clean.best.value == max(rate.value for rate in record.accuracy[:3])
    for bounds in (record.clean, *record.attacked):
        assert bounds.all.value <= bounds.best.value <= bounds.any.value
    assert values(record).shape == (3, 4)
    assert (values(record).diagonal() >= values(record)[:, :3].amin(0)).all()
    for column, rate in enumerate(record.worst):
        others = [record.transfer[row][column].value for row in range(3) if row != column]
        assert rate.value >= max(others)
    assert all(0 < rate.low < rate.high <= 1 for rate in record.worst)
    assert Diversity.from_json(json.loads(json.dumps(record.to_json()))).to_json() == record.to_json()


def test_members_may_come_in_any_order_and_twice() -> None:
    """A-P12: d is symmetric, relabelling permutes everything, twins are no different."""
    one, other = default_diversity(), found([NETS[2], NETS[0], NETS[1]])
    moved = torch.tensor([1, 2, 0])
    for name in ("confusion", "diversity", "cosine"):
        table, permuted = torch.tensor(getattr(one, name)), torch.tensor(getattr(other, name))
        torch.testing.assert_close(permuted[moved][:, moved], table, rtol=1e-4, atol=1e-5)
    assert torch.tensor(one.diversity).equal(torch.tensor(one.diversity).T)
    assert values(other)[moved][:, [1, 2, 0, 3]].equal(values(one))
    twins = found([NETS[0], copy.deepcopy(NETS[0])])
    confusion = torch.tensor(twins.confusion)
    torch.testing.assert_close(confusion, confusion[0, 0].expand(2, 2))
    assert twins.alignment == pytest.approx(1)
    assert values(twins)[0].equal(values(twins)[1])


def test_a_member_is_fooled_most_by_images_crafted_on_it() -> None:
    """A-P13, at the last layer; of pairs of members, since these are not equally sure of themselves."""
    panel = EnsembleMembers(ensemble(NETS), torch.device("cpu"))
    rows = []
    for net in NETS:
        made = distil(net, IMAGES, IMAGES.roll(1, 0), 4, eps=0.12, step_size=0.1, steps=10, inertia=1.0)
        rows.append(each_loss(panel, made, LABELS.roll(1)))
    table = torch.stack(rows)
    own = table.diagonal()
    one, other = torch.triu_indices(3, 3, 1)
    assert (own[one] + own[other] < table[one, other] + table[other, one]).all()


def test_more_restarts_never_help_the_defender() -> None:
    """A-P15, and that another restart starts elsewhere."""
    single, more = default_diversity(), found(restarts=3)
    assert (values(more) >= values(single)).all()
    for one, other in zip(single.attacked, more.attacked, strict=True):
        assert other.any.value <= one.any.value
        assert other.all.value <= one.all.value
    rng = RowRng(0, "diversity/attack", torch.arange(4))
    starts = [ensemble_utils.random_start(IMAGES[:4], THREAT, rng.at(restart=restart)) for restart in range(2)]
    assert (starts[0] != starts[1]).flatten(1).any(1).all()


def test_any_of_several_sets_is_their_union() -> None:
    """A-P15 for sets that were made elsewhere."""
    sets = [[True, False, None, False], [False, False, None, True]]
    assert [worst(sets[:1]).value, worst(sets).value] == pytest.approx([1 / 3, 2 / 3])
    assert worst([[None, None]]) is None
    assert worst([]) is None


def test_finished_rows_do_not_change_the_result() -> None:
    """The union over restarts that run to their end on all images is the same."""
    panel = EnsembleMembers(ensemble(NETS), torch.device("cpu"))
    rng = RowRng(3, "diversity/attack", torch.arange(32))
    fooled, lost = attack(panel, 1, IMAGES, LABELS, THREAT, rng, steps=6, restarts=3)
    wrong = []
    for restart in range(3):
        x = ensemble_utils.random_start(IMAGES, THREAT, rng.at(restart=restart))
        for _ in range(6):
            point = x.requires_grad_()
            (slope,) = torch.autograd.grad(criteria.ce(NETS[1](point), LABELS).sum(), point)
            x = THREAT.project(x.detach() + STEP_SIZE * float(THREAT.eps) * slope.sign(), IMAGES)
        wrong.append(torch.stack([net(x).argmax(1) != LABELS for net in (*NETS, ensemble(NETS))]))
    assert fooled.equal(torch.stack(wrong).any(0))
    assert lost.equal(torch.stack([row[:3].all(0) for row in wrong]).any(0))
    assert panel.counts[1] < 3 * 6 * 32


def test_by_others_leaves_a_member_s_own_images_out() -> None:
    table = torch.zeros(2, 3, 1, dtype=torch.bool)
    table[0, 0] = table[1, 0] = table[1, 2] = True
    assert transferred(table)[:, 0].tolist() == [True, False, True]
    table[1, 0] = False
    assert transferred(table)[:, 0].tolist() == [False, False, True]


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_margin_on_logarithms_of_probabilities_has_a_gradient(share: float) -> None:
    """A-P16 and trap 1: masked with 0 instead of -inf, the best other class of outputs below 0 is none."""
    logits = torch.log(torch.tensor([[[share, 1 - share, 1e-4]], [[share, 1 - share, 1e-3]]])).requires_grad_()
    margin = criteria.margin(ensemble_utils.ensemble_log_probabilities(logits), torch.tensor([0]))
    (slope,) = torch.autograd.grad(margin.sum(), logits)
    assert (slope[:, 0, :2].abs() > 1e-3).all()
    assert float(margin.detach()) == pytest.approx(np.log((1 - share) / share), abs=0.01)


def test_seeds_share_no_weights() -> None:
    """Trap 6: five seeds that begin from one set of weights are one seed."""
    begun = [load_model("robustkit:digits-cnn?pretrained=false", seed=seed).fingerprint for seed in range(5)]
    assert len(set(begun)) == 5


def test_two_ensembles_on_the_same_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 8: each alone is on images of its own; --images-of brings them together."""
    words = {"classes": 10, "arch": "robustkit:digits-cnn"}
    a = write_members(tmp_path / "a", NETS[:2], **words)
    b = write_members(tmp_path / "b", [like(7), like(8)], **words)
    flags = ["--data", "digits:test", "--limit", "32", "--threat", "linf:0.1", "--steps", "2", "--restarts", "1"]
    out = {name: tmp_path / f"out-{name}" for name in "abc"}
    assert run(["diversity", a, *flags, "--out", str(out["a"])]) == 0
    first = capsys.readouterr().out
    assert "Images crafted on one member fool another" in first
    assert first.splitlines()[-1].startswith("next     robustkit evaluate")
    assert run(["diversity", b, *flags, "--images-of", str(out["a"]), "--out", str(out["b"])]) == 0
    assert run(["diversity", a, *flags, "--images-of", str(out["b"]), "--out", str(out["c"]), "--json"]) == 0
    records = {
        name: Diversity.from_json(json.loads((folder / "diversity.json").read_text()))
        for name, folder in out.items()
    }
    assert set(records["b"].index) < set(records["a"].index)
    assert list(records["b"].index) == list(records["c"].index)
    page = (out["b"] / "diversity.html").read_text()
    assert "any member" in page
    assert "http" not in page.replace("http-equiv", "")
    capsys.readouterr()
    assert run(["diversity", a, *flags, "--out", str(out["a"])]) == 0
    assert "finished before" in (again := capsys.readouterr()).err
    assert again.out == first
    assert run(["verify", str(out["a"])]) == 2
    assert "compares an ensemble's members" in capsys.readouterr().err
    assert run(["report", str(out["b"]), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == page
    capsys.readouterr()
    assert run(["diversity", a, *flags, "--limit", "16", "--images-of", str(out["b"])]) == 2
    assert "use the same --data" in capsys.readouterr().err


def test_samples_of_a_posterior_are_members_too(tmp_path: Path) -> None:
    words = {"classes": 10, "arch": "robustkit:digits-cnn"}
    folders = [write(tmp_path / name, NETS, **words) for name, write in WRITERS.items()]
    one, other = (
        diversity(folder, DATA.head(8), None, THREAT, steps=2, restarts=1, device="cpu") for folder in folders
    )
    assert values(one).equal(values(other))
    # A store keeps weights in fewer digits.
    torch.testing.assert_close(torch.tensor(one.confusion), torch.tensor(other.confusion), rtol=1e-3, atol=0)
    assert one.cost.backwards == other.cost.backwards > 0


def test_invalid_comparisons_are_refused() -> None:
    single = load_model("robustkit:digits-cnn")
    with pytest.raises(UsageError, match="no members to compare"):
        diversity(single, DATA, None, THREAT, device="cpu")
    with pytest.raises(UsageError, match="a comparison needs two"):
        found(only=[0])
    with pytest.raises(UsageError, match="has the label 9"):
        diversity(ensemble([Few(net) for net in NETS]), DATA, None, THREAT, device="cpu")
    with pytest.raises(UsageError, match="restarts must be at least 1, got 0"):
        found(restarts=0)
