"""A worker that lacks a model's files gets them from the driver, once for its machine, and the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import runs
import torch
from nets import small
from safetensors.torch import save_file
from teams import as_threads

from robustkit import RunError, load_model
from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.distributed import files
from robustkit.distributed.files import Sent, answer, files_of, here
from robustkit.engine.evaluation.run import Evaluation

NET = "nets:small"


class Driver:
    """Another machine, from which nothing can be read but by asking."""

    def __init__(self, place: Path) -> None:
        self.place, self.away, self.asked = place, place.with_name("away"), list[tuple[str, bool]]()

    def leave(self) -> None:
        self.place.rename(self.away)

    def ask(self, path: str, whole: bool) -> Sent:
        self.asked.append((Path(path).name, whole))
        return answer(str(self.away / Path(path).relative_to(self.place)), whole)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "driver"
    place.mkdir()
    for seed in (0, 1):
        save_file(small(seed=seed).state_dict(), place / f"{seed}.safetensors")
    runs.write_single(place / "run", runs.net(3))
    runs.write_posterior(place / "posterior", [runs.net(seed) for seed in (4, 5)])
    return Driver(place)


@pytest.mark.parametrize(
    ("form", "count"),
    [
        (f"{NET}@{{}}/0.safetensors", 1),
        (f"ensemble:[{NET}@{{}}/0.safetensors;{NET}@{{}}/1.safetensors]?combine=logits", 2),
        ("{}/run/", 2),
        ("{}/posterior/#1", 2),
    ],
)
def test_the_same_model_elsewhere(form: str, count: int, driver: Driver) -> None:
    model = load_model(form.replace("{}", str(driver.place)))
    known = tuple(files_of(model.string))
    assert len(known) == count
    assert here(model.string, known, driver.ask) == model.string
    assert not driver.asked
    driver.leave()
    for _ in range(2):
        found = here(model.string, known, driver.ask)
        assert str(driver.place) not in found
        assert load_model(found).fingerprint == model.fingerprint
    assert sum(whole for _, whole in driver.asked) == count


def test_a_file_that_changes_on_its_way(driver: Driver) -> None:
    string = f"{NET}@{driver.place}/0.safetensors"
    known = tuple(files_of(string))
    driver.leave()

    def ask(path: str, whole: bool) -> Sent:
        return Sent("00" * 32, driver.ask(path, whole).content)

    with pytest.raises(RunError, match="changed while it was sent"):
        here(string, known, ask)
    shutil.rmtree(driver.away)
    with pytest.raises(RunError, match=r"cannot send .*0\.safetensors to workers: No such file"):
        here(string, known, driver.ask)


def test_workers_get_what_they_lack(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    as_threads(monkeypatch)
    monkeypatch.setattr(files, "_missing", lambda path: "cache" not in path)
    model = load_model(f"{NET}@{driver.place}/0.safetensors")
    x = torch.rand(6, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    samples = from_arrays(x, model(x).argmax(1))
    plan = Evaluation(model, samples, ThreatModel.parse("linf:0.02"), suite="pgd(steps=3)", precision="fp32")
    many = Evaluation(**{**vars(plan), "workers": 2}).run()
    assert [v.robust for v in plan.run().verdicts] == [v.robust for v in many.verdicts]
    assert list((driver.place.parent / "cache" / "models").glob("*.safetensors"))
