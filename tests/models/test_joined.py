"""Several nets as one model: aggregation, by strings of run folders and of independent files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from nets import Small
from runs import ARCH, net, write_members, write_posterior, write_single
from safetensors.torch import save_file

from robustkit import load_model
from robustkit.core.errors import UsageError
from robustkit.models.ensembles.aggregation import parse_aggregator
from robustkit.models.ensembles.mixture import Members, Samples
from robustkit.models.strings import ENSEMBLE, ModelString

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NETS = [net(seed) for seed in range(4)]
AGGREGATORS = ["probabilities", "logits", "vote", "median", "crossmax", "crossmax:2"]


def stack(models: Sequence[torch.nn.Module], x: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(x) for model in models], 1)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_members_and_samples_are_aggregated_as_requested(tmp_path: Path, aggregator: str) -> None:
    """Values and gradients are those of the aggregator over nets which are all there."""
    aggregate = parse_aggregator(aggregator)
    slopes = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    for write, kind in ((write_members, Members), (write_posterior, Samples)):
        string = write(tmp_path / write.__name__, NETS)
        singles = [load_model(f"{string}#{number}") for number in (0, 2, 3)]
        whole = load_model(f"{string}#0+2-3?combine={aggregator}")
        assert isinstance(whole.net, kind)
        found, expected = (x.requires_grad_() for x in (X.clone(), X.clone()))
        torch.testing.assert_close(whole(found), aggregate(stack(singles, expected)))
        torch.testing.assert_close(whole.net.stacked(X), stack(singles, X))
        with torch.no_grad():
            torch.testing.assert_close(whole(X), aggregate(stack(singles, X)))
        (whole(found) * slopes).sum().backward()
        (aggregate(stack(singles, expected)) * slopes).sum().backward()
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
        assert load_model(whole.string).fingerprint == whole.fingerprint


def test_the_aggregator_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    for write in (write_members, write_posterior):
        string = write(tmp_path / write.__name__, NETS)
        prints = [load_model(f"{string}?combine={aggregator}").fingerprint for aggregator in AGGREGATORS]
        assert len(set(prints)) == len(AGGREGATORS)
        assert load_model(string).fingerprint == prints[0]


def test_fingerprints_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """By them a run is found again."""
    nets = [net(seed) for seed in range(3)]
    for one in nets:
        for number, tensor in enumerate(one.state_dict().values()):
            tensor.fill_(number / 8)
    members, samples = write_members(tmp_path / "a", nets), write_posterior(tmp_path / "b", nets)
    known = {members: "8cf8b4f1", f"{members}#0+2": "79c48e52", samples: "dd560cf4", f"{samples}#0+2": "0edd8290"}
    assert {string: load_model(string).fingerprint[:8] for string in known} == known


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("?combine=vota", "no combine 'vota'. Did you mean 'vote'"),
        ("?combine=vote:2", "only crossmax takes a number"),
        ("?combine=crossmax:5", "crossmax of 4 predictors, k = 5"),
        ("#1?combine=logits", "is one net: combine=logits joins several; leave it out"),
        ("?combine=", "no combine ''"),
    ],
)
def test_unknown_aggregators_are_refused(tmp_path: Path, query: str, sentence: str) -> None:
    for write in (write_members, write_posterior):
        string = write(tmp_path / write.__name__, NETS)
        with pytest.raises(UsageError, match=sentence):
            load_model(string + query)


def test_combine_is_refused_for_one_net(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is one net: combine=vote"):
        load_model(write_single(tmp_path / "one", NETS[0]) + "?combine=vote")
    with pytest.raises(UsageError, match="no field of robustkit models 'combine'"):
        load_model(f"{ARCH}&pretrained=false&combine=vote")


def test_each_sample_uses_its_own_weights_under_autocast(tmp_path: Path) -> None:
    """Autocast remembers a net's weights, which are swapped here."""
    string = write_posterior(tmp_path / "posterior", NETS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stacked = load_model(string).net.stacked(X)
    for number in range(len(NETS)):
        torch.testing.assert_close(stacked[:, number], load_model(f"{string}#{number}")(X), rtol=0.1, atol=0.05)


def written(folder: Path, seed: int) -> str:
    """A file of weights, as anyone's: an architecture, a file and a normalisation of its own."""
    path = folder / f"{seed}.safetensors"
    save_file(NETS[seed].state_dict(), path)
    return f"robustkit:digits-cnn@{path}?mean=0.{seed}&std=0.5"


def test_independent_files_load_as_one_model(tmp_path: Path) -> None:
    """Each has its normalisation; the string loads the same from anywhere."""
    strings = [written(tmp_path, seed) for seed in range(3)]
    singles = [load_model(string) for string in strings]
    for way in AGGREGATORS:
        whole = load_model(f"ensemble:[{'; '.join(strings)}]?combine={way}")
        torch.testing.assert_close(whole(X), parse_aggregator(way)(stack(singles, X)))
        assert whole.num_classes == 4
        assert load_model(whole.string).fingerprint == whole.fingerprint
    prints = {
        load_model(f"ensemble:[{';'.join(joined_strings)}]").fingerprint
        for joined_strings in (
            strings,
            strings[:2],
            [strings[1], strings[0]],
            [strings[0], strings[1].replace("0.5", "0.4")],
        )
    }
    assert len(prints) == 4
    whole = load_model(f"ensemble:[{';'.join(strings)}]?defense=bit-depth:3")
    assert whole.defenses


def test_ensembles_of_ensembles_load(tmp_path: Path) -> None:
    """Files, members and samples inside one another; and what is asked of samples changes no fingerprint."""
    files = [written(tmp_path, seed) for seed in range(2)]
    members = write_members(tmp_path / "members", NETS[:3])
    samples = write_posterior(tmp_path / "samples", NETS[1:])
    inner = f"ensemble:[{files[0]};{files[1]}]?combine=logits"
    parts = [inner, f"{members}?combine=median", f"{samples}#0+2"]
    whole = load_model(f"ensemble:[{';'.join(parts)}]?combine=crossmax")
    assert isinstance(whole.net, Members)
    assert len(whole.net) == 3
    before = whole.fingerprint
    found, expected = (x.requires_grad_() for x in (X.clone(), X.clone()))
    joined = parse_aggregator("crossmax")(stack([load_model(part) for part in parts], expected))
    torch.testing.assert_close(whole(found), joined)
    whole(found).square().sum().backward()
    joined.square().sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert whole.fingerprint == before == load_model(whole.string).fingerprint


def test_members_of_other_classes_or_images_are_refused(tmp_path: Path) -> None:
    four, ten = (f"robustkit:digits-cnn?num_classes={count}&pretrained=false" for count in (4, 10))
    with pytest.raises(UsageError, match="have 4 and 10 classes: join models of the same images and classes"):
        load_model(f"ensemble:[{four};{ten}]")
    colour = "robustkit:digits-cnn?in_channels=3&pretrained=false"
    with pytest.raises(UsageError, match="have 1 and 3 channels"):
        load_model(f"ensemble:[{ten};{colour}]")
    unknown = Members([Small(1, 4), Small(1, 10)])
    with pytest.raises(UsageError, match="return 4 and 10 logits"):
        unknown(X)


def test_crossmax_of_equal_nets_is_refused(tmp_path: Path) -> None:
    """B-P5: CrossMax of equal predictors is 0 for every class; other ways of joining are not."""
    one, other = (written(tmp_path, seed) for seed in (1, 2))
    for way in ("crossmax", "crossmax:2"):
        with pytest.raises(UsageError, match="is 0 for every class: join nets that differ"):
            load_model(f"ensemble:[{one};{one};{one}]?combine={way}")
    assert load_model(f"ensemble:[{one};{one};{other}]?combine=crossmax")(X).any()
    assert load_model(f"ensemble:[{one};{one}]?combine=median")(X).any()


@pytest.mark.parametrize(
    ("text", "members", "options"),
    [
        ("ensemble:[a:b;c:d]", ["a:b", "c:d"], {}),
        ("ensemble:[ a:b ; runs/x/#2?mean=0.5 ]?combine=vote", ["a:b", "runs/x/#2?mean=0.5"], {"combine": "vote"}),
        (
            "ensemble:[ensemble:[a:b@w.pt;c:d]?combine=crossmax:2;runs/x[1]/]",
            ["ensemble:[a:b@w.pt;c:d]?combine=crossmax:2", "runs/x[1]/"],
            {},
        ),
    ],
)
def test_strings_of_ensembles_parse(text: str, members: list[str], options: dict[str, str]) -> None:
    spec = ModelString.parse(text)
    assert (spec.kind, spec.members, spec.options) == (ENSEMBLE, members, options)
    assert ModelString.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ensemble:a;b", "in brackets with semicolons between"),
        ("ensemble:[a:b;c:d", "in brackets with semicolons between"),
        ("ensemble:[a:b;c:d]@w.pt", "in brackets with semicolons between"),
        ("ensemble:[a:b]", "fewer than two models"),
        ("ensemble:[a:b;]", "fewer than two models"),
        ("ensemble:[a:b;c:d]?combine=vote&combine=vote", "has the field 'combine' twice"),
        ("ensemble:[a:b;c:d]?mean=0.5", "no field of ensemble models 'mean'"),
        ("ensemble:[robustkit:digits-cnn;robustkit:digits-cnm]", "Did you mean 'digits-cnn'"),
    ],
)
def test_malformed_ensemble_strings_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_model(text)
