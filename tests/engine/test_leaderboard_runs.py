"""Each run of a list of models equals the run of that model alone, also if workers die."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import Flat, labelled
from teams import Died, as_threads

from robustkit import RunError, UsageError
from robustkit.core.threat import ThreatModel
from robustkit.data import from_arrays
from robustkit.distributed.sent_models import SentModel
from robustkit.engine.evaluation import evaluate_worker
from robustkit.engine.evaluation.leaderboard import LeaderboardRun, NamedModel, read_models
from robustkit.engine.evaluation.run import Evaluation
from robustkit.engine.progress import Progress
from robustkit.models import load_model
from robustkit.runs.evaluation_record import Report
from robustkit.runs.ledger import Chunk

# One or the other: workers that are threads share the global generators, which flights set apart.
ROWS, COUPLED = "pgd(steps=4),square(queries=4),apgd(steps=8)", "autoattack:apgd-ce(steps=4)"
MODELS = [NamedModel(f"net{seed}", f"nets:flat?pixels=144&seed={seed}") for seed in range(3)]
X, Y = labelled(Flat(144), 8, (3, 6, 8))
ABSENT = NamedModel("bad", "nets:absent")


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    as_threads(monkeypatch)


class Watch(Progress):
    """Keeps what is said; may stop the command after some news of progress, as Ctrl-C would."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def plan(entry: NamedModel, suite: str = ROWS) -> Evaluation:
    return Evaluation(
        load_model(entry.string),
        from_arrays(X, Y),
        ThreatModel.parse("linf:0.02"),
        suite=suite,
        precision="fp32",
        batch_size=3,
    )


def run_list(
    out: Path, workers: int, entries: list[NamedModel] = MODELS, watch: Progress | None = None, suite: str = ROWS
) -> list[Any]:
    watch = watch or Progress()
    made = LeaderboardRun(entries, lambda entry: plan(entry, suite), workers=workers)
    found = made.run(out, watch, lambda name: Progress())
    return [one if isinstance(one, Exception) else one[1] for one in found]


def assert_same(one: list[Report], other: list[Report]) -> None:
    for first, second in zip(one, other, strict=True):
        assert isinstance(second, Report), second
        assert first.run_id == second.run_id
        assert [(v.robust, v.attack) for v in first.verdicts] == [(v.robust, v.attack) for v in second.verdicts]
        assert np.allclose([v.margin for v in first.verdicts], [v.margin for v in second.verdicts], atol=1e-5)
        assert [stage.fooled for stage in first.stages] == [stage.fooled for stage in second.stages]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    return run_list(tmp_path_factory.mktemp("alone"), 1)


# Fewer workers than models, and more.
@pytest.mark.parametrize(
    "workers", [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 5]
)
def test_any_number_of_workers_gives_the_reports_of_one_process(
    workers: int, alone: list[Report], tmp_path: Path
) -> None:
    assert len({report.run_id for report in alone}) == 3
    watch = Watch()
    assert_same(alone, run_list(tmp_path, workers, watch=watch))
    assert sum("robust accuracy" in line for line in watch.said) == 3
    watch = Watch()
    assert_same(alone, run_list(tmp_path, workers, watch=watch))


@pytest.mark.slow
def test_attacks_on_whole_batches_get_the_same_batches(tmp_path: Path) -> None:
    assert_same(run_list(tmp_path / "1", 1, suite=COUPLED), run_list(tmp_path / "2", 2, suite=COUPLED))


def test_images_of_a_dead_worker_are_attacked_by_others(
    alone: list[Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = evaluate_worker.Outbox.write
    deaths: list[Any] = []

    def dying(box: evaluate_worker.Outbox, *chunks: Chunk) -> None:
        if len(deaths) < 3:
            deaths.append(1)
            raise Died
        write(box, *chunks)

    monkeypatch.setattr(evaluate_worker.Outbox, "write", dying)
    watch = Watch()
    assert_same(alone, run_list(tmp_path, 2, watch=watch))
    assert sum("has died" in line for line in watch.said) == 3


def test_an_interrupted_list_resumes_with_another_number_of_workers(
    alone: list[Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Watch):
        def say(self, text: str) -> None:
            if "robust accuracy" in text:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_list(tmp_path, 2, watch=Stop())
    assert list(tmp_path.glob("*/report.json"))
    assert_same(alone, run_list(tmp_path, 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_cannot_be_loaded_stops_no_other(workers: int, alone: list[Report], tmp_path: Path) -> None:
    found = run_list(tmp_path, workers, [ABSENT, MODELS[0], NamedModel("again", MODELS[0].string)])
    assert isinstance(found[0], UsageError)
    assert_same(alone[:1], found[1:2])
    assert "is the model 'net0' once more" in str(found[2])


def test_an_error_in_a_model_s_code_stops_no_other(tmp_path: Path) -> None:
    def fails(entry: NamedModel) -> Evaluation:
        raise ZeroDivisionError("division by zero")

    found = LeaderboardRun([ABSENT], fails, workers=2).run(tmp_path, Progress(), lambda name: Progress())
    assert isinstance(found[0], RunError)
    assert str(found[0]) == "ZeroDivisionError: division by zero"


def test_a_model_that_fails_in_a_worker_stops_no_other(
    alone: list[Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SentModel.load

    def other(model: SentModel, *place: Any) -> object:
        return load(replace(model, string=model.string.replace("seed=2", "seed=1")), *place)

    monkeypatch.setattr(SentModel, "load", other)
    found = run_list(tmp_path, 2)
    assert isinstance(found[2], RunError)
    assert "found another model than the driver" in str(found[2])
    assert_same(alone[:2], found[:2])


def test_a_file_lists_models_with_names_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "models.txt"
    path.write_text(
        "# a zoo\n\nrobustkit:digits-cnn   # built in\nold one = runs/x/#2\ntimm:resnet50?mean=0,0,0\n"
        "b=./net.py:build@w.pt?size=3\n"
    )
    assert read_models(path) == [
        NamedModel("robustkit:digits-cnn", "robustkit:digits-cnn"),
        NamedModel("old one", "runs/x/#2"),
        NamedModel("timm:resnet50?mean=0,0,0", "timm:resnet50?mean=0,0,0"),
        NamedModel("b", "./net.py:build@w.pt?size=3"),
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"# nothing\n\n", "lists no model; write a model string on each line"),
        (b"timm:a\ntimm:a\n", "line 2: 'timm:a' is in the list already; write each model once"),
        (b"a=timm:a\na=timm:b\n", "line 2: 'a' is in the list already"),
        (b"a=timm:a\n b = \n", "line 2: 'b =' names no model; write NAME=MODEL"),
        (b"\xff\xfe\x00", "is no text file; write one with a model string on each line"),
        (None, "cannot read the list of models .*: No such file or directory; write"),
    ],
)
def test_an_invalid_list_is_an_error_in_a_sentence(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "models.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        read_models(path)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.json").write_text("{}")
    with pytest.raises(UsageError, match=r"'spec\.json', which is no run of a list of models; give an empty"):
        run_list(tmp_path, 1)
