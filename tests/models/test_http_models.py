"""Models behind an endpoint: the same numbers through each format, faults of servers, secrets, resuming."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustkit
from robustkit.cli import run
from robustkit.core.errors import RunError, UsageError
from robustkit.models.sources.http_client import Endpoint, Limits
from robustkit.testing.server import ModelServer


class Linear(nn.Module):
    """A linear classifier of any image shape."""

    def __init__(self, *shape: int, classes: int = 5) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, *shape, generator=numbers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight)


def images(*shape: int) -> torch.Tensor:
    """Return images with 256 levels, which PNG keeps."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)) / 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "query", ["format=json", "format=json&images=array", "format=kserve", "format=torchserve"]
)
def test_every_format_returns_the_logits_of_the_model(query: str, channels: int) -> None:
    net, x = Linear(channels, 6, 7), images(9, channels, 6, 7)
    with ModelServer(net, query.partition("=")[2].partition("&")[0]).running() as server:
        model = robustkit.load_model(f"{server.url}?{query}&batch=4")
        torch.testing.assert_close(model(x), net(x), atol=1e-5, rtol=1e-5)
        assert server.images == 9


@pytest.mark.parametrize("form", ["json", "kserve", "torchserve"])
def test_labels_alone_become_rows_with_a_one(form: str) -> None:
    net, x = Linear(1, 6, 7), images(4, 1, 6, 7)
    with ModelServer(net, form, labels_only=True).running() as server:
        logits = robustkit.load_model(f"{server.url}?format={form}&num_classes=5")(x)
        assert torch.equal(logits.argmax(1), net(x).argmax(1))
        assert torch.equal(logits.sum(1), torch.ones(4))
        with pytest.raises(UsageError, match="num_classes=K"):
            robustkit.load_model(f"{server.url}?format={form}")(x)


def test_scores_by_class_name_are_put_in_order() -> None:
    def names(number: int, body: Any) -> tuple[int, Any]:
        return 200, dict(zip(["dog", "ape", "cat", "cow", "fox"], body, strict=True))

    net, x = Linear(3, 6, 7), images(2, 3, 6, 7)
    with ModelServer(net, "torchserve", fault=names).running() as server:
        model = robustkit.load_model(f"{server.url}?format=torchserve&classes=dog,ape,cat,cow,fox")
        torch.testing.assert_close(model(x), net(x), atol=1e-5, rtol=1e-5)
        with pytest.raises(RunError, match="names the class 'dog'"):
            robustkit.load_model(f"{server.url}?format=torchserve")(x)


def test_a_batch_that_is_refused_is_divided_until_it_fits() -> None:
    net, x = Linear(1, 6, 7), images(30, 1, 6, 7)
    with ModelServer(net, max_images=5).running() as server:
        model = robustkit.load_model(server.url)
        torch.testing.assert_close(model(x), net(x), atol=1e-5, rtol=1e-5)
        assert server.images == 30
        before = server.requests
        model(x[:8])
        assert server.requests == before + 2


def test_a_server_that_fails_sometimes_is_asked_again() -> None:
    def sometimes(number: int, body: Any) -> tuple[int, Any]:
        if number % 3 == 0:
            raise ConnectionError
        return (503, {}) if number % 3 == 1 else (200, body)

    net, x = Linear(1, 6, 7), images(6, 1, 6, 7)
    with ModelServer(net, fault=sometimes).running() as server:
        model = robustkit.load_model(f"{server.url}?batch=2&concurrency=1")
        torch.testing.assert_close(model(x), net(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((500, {}), "gave no result after 2 tries: status 500"),
        ((404, {}), "refused a request: status 404"),
        ((200, b"<html>"), "it is no JSON"),
        ((200, {"logits": [[1.0, 2.0], [1.0]]}), "rows of different lengths"),
        ((200, {"logits": [[1.0, 2.0]]}), r"an array of shape \(1, 2\) for 2 images"),
        ((200, {"classes": [1, 2]}), "none of the entries logits"),
        ((200, {"labels": [0.5, 1]}), "no whole numbers"),
    ],
)
def test_a_faulty_server_is_one_sentence(reply: tuple[int, Any], sentence: str) -> None:
    with ModelServer(Linear(1, 6, 7), fault=lambda number, body: reply).running() as server:
        model = robustkit.load_model(f"{server.url}?retries=1")
        with pytest.raises(RunError, match=sentence):
            model(images(2, 1, 6, 7))


def test_a_server_that_stalls_or_is_absent_is_one_sentence() -> None:
    freed = threading.Event()

    def stalled(number: int, body: Any) -> tuple[int, Any]:
        freed.wait(5)
        return 200, body

    with ModelServer(Linear(1, 6, 7), fault=stalled).running() as server:
        with pytest.raises(RunError, match=r"no reply within 0\.2 s"):
            robustkit.load_model(f"{server.url}?timeout=0.2&retries=0")(images(1, 1, 6, 7))
        freed.set()
    with pytest.raises(RunError, match="gave no result after 1 tries"):
        robustkit.load_model(f"{server.url}?retries=0")(images(1, 1, 6, 7))


def test_the_secret_is_read_from_the_environment_and_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = robustkit.load_data("digits:test").head(6)
    net = robustkit.load_model("robustkit:digits-cnn")
    with ModelServer(net, token="Bearer s3cret").running() as server:
        string = f"{server.url}?header=Authorization,MODEL_KEY&retries=0"
        with pytest.raises(UsageError, match="MODEL_KEY, the value of Authorization, is not set"):
            robustkit.load_model(string)(data.images([0]))
        monkeypatch.setenv("MODEL_KEY", "wrong")
        with pytest.raises(RunError, match="401"):
            robustkit.load_model(string)(data.images([0]))
        monkeypatch.setenv("MODEL_KEY", "Bearer s3cret")
        model = robustkit.load_model(string)
        robustkit.corrupt(model, data, corruptions=["contrast"], severities=[1], out=tmp_path / "e")
    for file in (tmp_path / "e").iterdir():
        assert b"s3cret" not in file.read_bytes()


def test_the_rate_is_limited() -> None:
    endpoint = Endpoint("http://127.0.0.1:9/", Limits(rate=50.0))
    begun = time.monotonic()
    for _ in range(6):
        endpoint._take_turn()
    assert time.monotonic() - begun > 0.095


def test_an_endpoint_is_sent_to_workers_without_its_connections() -> None:
    endpoint = Endpoint("http://127.0.0.1:9/", Limits(batch=3))
    endpoint._connected()
    copy = pickle.loads(pickle.dumps(endpoint))
    assert copy.limits == endpoint.limits
    assert copy.accepted == 3


@pytest.mark.slow
def test_an_evaluation_by_scores_has_the_verdicts_of_the_model_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = robustkit.load_model("robustkit:digits-cnn")
    words = [
        "--data",
        "digits:test",
        "--limit",
        "8",
        "--threat",
        "linf:0.2",
        "--suite",
        "square(queries=20)",
        "--json",
    ]
    found: list[list[bool]] = []
    with ModelServer(net).running() as server:
        for string in (f"{server.url}?images=array", "robustkit:digits-cnn"):
            assert run(["evaluate", string, *words, "--no-html", "--out", str(tmp_path / str(len(found)))]) == 0
            report = json.loads(capsys.readouterr().out)
            found.append([verdict["robust"] for verdict in report["verdicts"]])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("string", "sentence"),
    [
        ("http://h/p?format=grpc", "no format 'grpc'"),
        ("http://h/p?formt=json", "Did you mean 'format'"),
        ("http://h/p?batch=0", "whole number of at least 1"),
        ("http://h/p?timeout=-1", "number above 0"),
        ("http://h/p?format=kserve&images=png", "write array"),
        ("http://h/p?header=Authorization", "environment variable"),
        ("http:h", "no address"),
    ],
)
def test_a_wrong_string_is_one_sentence(string: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        robustkit.load_model(string)
