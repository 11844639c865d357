"""Models behind an endpoint: `http://HOST/PATH`, by the Open Inference Protocol, TorchServe or plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.core.numbers import exact, whole
from robustkit.models.sources.source import ModelSource

if TYPE_CHECKING:
    from robustkit.models.options import Options
    from robustkit.models.sources.built import Built
    from robustkit.models.sources.http_client import Endpoint
    from robustkit.models.sources.http_formats import ServerProtocol
    from robustkit.models.strings import ModelString
    from robustkit.models.weights.files import WeightsFile

FORMATS = ("json", "kserve", "torchserve")
NUMBERS = {"batch": 1, "concurrency": 1, "retries": 0}
SECONDS = ("rate", "timeout")
FIELDS = ("format", "images", "num_classes", "classes", "header", *NUMBERS, *SECONDS)


def build(spec: ModelString, options: Options, weights: WeightsFile | None) -> Built:
    """Return the model of an address.

    Raises:
        UsageError: the address or a field is not possible.
        RunError: the server does not reply.
    """
    from robustkit.models.sources.built import SCORES, Built
    from robustkit.models.sources.http_client import RemoteNet

    given = {name: str(value) for name, value in options.keywords.items()}
    for name in given:
        if name not in FIELDS:
            raise did_you_mean(f"field of {spec.source} models", name, FIELDS)
    if weights is not None or urlsplit(spec.arch).hostname is None:
        raise UsageError(
            f"{spec.arch!r} is no address of a model: write http://HOST:PORT/PATH, without weights; a credential "
            "is passed by header=NAME,VARIABLE."
        )
    form = given.get("format", "json")
    if form not in FORMATS:
        raise did_you_mean("format", form, FORMATS)
    endpoint = _endpoint(spec.arch.rstrip("/"), given)
    classes = _count(given, "num_classes", 2)
    protocol = _protocol(form, given, endpoint, options.output, classes)
    return Built(
        net=RemoteNet(endpoint, protocol, classes),
        arch=spec.arch,
        identity={"arch": spec.arch, "format": form, "images": given.get("images")},
        num_classes=classes,
        access=SCORES,
    )


def _protocol(
    form: str, given: Mapping[str, str], endpoint: Endpoint, output: str | None, classes: int | None
) -> ServerProtocol:
    from robustkit.models.sources.http_formats import ARRAY, PNG, KServe, Plain, TorchServe, unreadable

    images = given.get("images", ARRAY if form == "kserve" else PNG)
    possible = {"json": (PNG, ARRAY), "kserve": (ARRAY,), "torchserve": (PNG,)}[form]
    if images not in possible:
        raise UsageError(f"images={images} is not possible with format={form}: write {' or '.join(possible)}.")
    if form == "json":
        return Plain(images)
    if form == "torchserve":
        from robustkit.data.classes import read_order

        names = read_order(given["classes"]).names if "classes" in given else ()
        return TorchServe(names, classes)
    try:
        return KServe.of(endpoint.metadata(), output)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise unreadable(endpoint.url, error) from error


def _endpoint(url: str, given: Mapping[str, str]) -> Endpoint:
    from robustkit.models.sources.http_client import Endpoint, Limits

    numbers = {name: _count(given, name, least) for name, least in NUMBERS.items()}
    seconds = {name: _seconds(given, name) for name in SECONDS}
    known = {name: value for name, value in {**numbers, **seconds}.items() if value is not None}
    header, comma, secret = given.get("header", "").partition(",")
    if "header" in given and not (header and comma and secret.isidentifier()):
        raise UsageError("header= needs a name and an environment variable: write header=Authorization,VARIABLE.")
    return Endpoint(url, Limits(**known), header, secret)  # type: ignore[arg-type]


def _count(given: Mapping[str, str], name: str, least: int) -> int | None:
    if name not in given:
        return None
    try:
        number = whole(given[name])
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(f"{name}={given[name][:30]} is not possible: write a whole number of at least {least}.")
    return number


def _seconds(given: Mapping[str, str], name: str) -> float | None:
    if name not in given:
        return None
    try:
        number = float(exact(given[name]))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UsageError(f"{name}={given[name][:30]} is not possible: write a number above 0.")
    return number


SOURCE = ModelSource(
    prefix="http",
    help="a model behind an endpoint, by ?format=json, kserve or torchserve; it has no gradient",
    build=build,
    placeholder="//HOST/PATH?format=json",
)
