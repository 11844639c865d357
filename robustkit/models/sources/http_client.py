"""Sends images to an endpoint: in batches, several at a time, at a limited rate, again after a failure."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from robustkit.core.errors import RunError, UsageError, error_summary
from robustkit.models.sources.http_formats import Array, Message, Reply, ServerProtocol, unreadable

# Statuses after which the same request may succeed; a batch that is too large has one of the second kind.
TRANSIENT, TOO_LARGE = {408, 425, 429, 500, 502, 503, 504}, {400, 413, 422}
FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.25, 30.0


@dataclass(frozen=True)
class Limits:
    """How an endpoint may be used.

    Attributes:
        batch: images of a request at most.
        concurrency: requests at a time.
        rate: requests per second at most; None for no limit.
        timeout: seconds that a reply may take.
        retries: how often a request is sent again after a failure.
    """

    batch: int = 32
    concurrency: int = 4
    rate: float | None = None
    timeout: float = 30.0
    retries: int = 5


@dataclass
class Endpoint:
    """A model server.

    Attributes:
        url: of the model, without credentials.
        limits: how it may be used.
        header: the name of a header whose value is in the environment variable `secret`.
        secret: the name of that variable; its value is read when a request is sent and is not stored.
        accepted: images of a request that the server has accepted at most; it is learned.
        requests: how many requests have been sent.
    """

    url: str
    limits: Limits = field(default_factory=Limits)
    header: str = ""
    secret: str = ""
    accepted: int = 0
    requests: int = 0

    def __post_init__(self) -> None:
        """Start with the largest batch."""
        self.accepted = self.accepted or self.limits.batch
        self._client: Any = None
        self._lock = threading.Lock()
        self._free_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the connections out: each process opens its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_client", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the fields of another process."""
        vars(self).update(state, _client=None, _lock=threading.Lock(), _free_at=0.0)

    def metadata(self) -> Any:
        """Return what the server says about the model."""
        return self._send(
            lambda client: client.get(self.url, headers=self._headers(), timeout=self.limits.timeout)
        )

    def outputs(self, protocol: ServerProtocol, x: Array) -> list[Reply]:
        """Return the model's outputs for images (B, C, H, W), in order, in one reply or more.

        Raises:
            RunError: the server cannot be reached, refuses, or sends a reply that cannot be read.
        """
        found: list[Reply] = []
        position = 0
        while position < len(x):
            size = 1 if protocol.one_image else self.accepted
            chunk = x[position : position + size * self.limits.concurrency]
            parts = [chunk[begin : begin + size] for begin in range(0, len(chunk), size)]
            try:
                found += self._several(protocol, parts)
            except _TooLargeError:
                self.accepted = max(1, size // 2)
                continue
            position += len(chunk)
        return found

    def _several(self, protocol: ServerProtocol, parts: list[Array]) -> list[Reply]:
        if len(parts) == 1:
            return [self._one(protocol, parts[0])]
        with ThreadPoolExecutor(self.limits.concurrency) as pool:
            return list(pool.map(lambda part: self._one(protocol, part), parts))

    def _one(self, protocol: ServerProtocol, x: Array) -> Reply:
        message = protocol.message(x)
        body = self._send(lambda client: self._post(client, message), divisible=len(x) > 1)
        try:
            return protocol.reply(body, len(x))
        except ValueError as error:
            if isinstance(error, RunError | UsageError):
                raise
            raise unreadable(self.url, error) from error

    def _post(self, client: Any, message: Message) -> Any:
        url, headers, timeout = self.url + message.path, self._headers(), self.limits.timeout
        if message.image is not None:
            headers = {**headers, "Content-Type": "image/png"}
            return client.post(url, data=message.image, headers=headers, timeout=timeout)
        return client.post(url, json=message.body, headers=headers, timeout=timeout)

    def _send(self, request: Callable[[Any], Any], divisible: bool = False) -> Any:
        """Return the JSON of a reply; the request is sent again after a failure that may pass."""
        import requests

        failure = ""
        for wait in (*self._waits(), None):
            self._take_turn()
            asked = None
            try:
                response = request(self._connected())
            except requests.Timeout:
                failure = f"no reply within {self.limits.timeout:g} s"
            except requests.RequestException as error:
                failure = error_summary(error)
            else:
                if response.ok:
                    return self._json(response)
                if divisible and response.status_code in TOO_LARGE:
                    raise _TooLargeError
                failure = f"status {response.status_code} {response.reason}"
                if response.status_code not in TRANSIENT:
                    raise RunError(f"{self.url} refused a request: {failure}; check the address and the server.")
                asked = _seconds(response.headers.get("Retry-After"))
            if wait is not None:
                time.sleep(max(wait, min(asked or 0.0, MAX_WAIT_SECONDS)))
        raise RunError(
            f"{self.url} gave no result after {self.limits.retries + 1} tries: {failure}; run the same command "
            "again to go on when the server works."
        )

    def _json(self, response: Any) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise unreadable(self.url, ValueError("it is no JSON")) from error

    def _waits(self) -> Iterator[float]:
        wait = FIRST_WAIT_SECONDS
        for _ in range(self.limits.retries):
            yield min(wait, MAX_WAIT_SECONDS)
            wait *= 2

    def _take_turn(self) -> None:
        """Wait until another request may be sent."""
        with self._lock:
            self.requests += 1
            now = time.monotonic()
            begin = max(now, self._free_at)
            self._free_at = begin + (1 / self.limits.rate if self.limits.rate else 0.0)
        if begin > now:
            time.sleep(begin - now)

    def _connected(self) -> Any:
        import requests
        from requests.adapters import HTTPAdapter

        with self._lock:
            if self._client is None:
                self._client = requests.Session()
                for scheme in ("http://", "https://"):
                    self._client.mount(scheme, HTTPAdapter(pool_maxsize=self.limits.concurrency))
            return self._client

    def _headers(self) -> dict[str, str]:
        if not self.header:
            return {}
        value = os.environ.get(self.secret)
        if not value:
            raise UsageError(f"the environment variable {self.secret}, the value of {self.header}, is not set.")
        return {self.header: value}


class _TooLargeError(Exception):
    """A request had more images than the server takes."""


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


@dataclass(frozen=True)
class RemoteNet:
    """A callable from images (B, C, H, W) in [0, 1] to the logits that a server returns; it has no gradient."""

    endpoint: Endpoint
    protocol: ServerProtocol
    num_classes: int | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K), float32, on the device of the images."""
        replies = self.endpoint.outputs(self.protocol, x.detach().float().cpu().numpy())
        logits = stacked(replies, self.num_classes, self.endpoint.url)
        return torch.from_numpy(logits).to(x.device, torch.float32)


def stacked(replies: list[Reply], num_classes: int | None, url: str) -> Array:
    """Return logits (B, K) of replies; those of a label are 1 at its class and 0 elsewhere.

    Raises:
        UsageError: the number of classes is needed and not known, or is too small.
        RunError: the replies differ in form.
    """
    if all(reply.labels is not None for reply in replies):
        labels = np.concatenate([reply.labels for reply in replies if reply.labels is not None]).astype(np.int64)
        if num_classes is None:
            raise UsageError(f"{url} returns labels alone; add num_classes=K to the model string.")
        if labels.max() >= num_classes:
            raise UsageError(f"{url} returned the label {labels.max()}; num_classes={num_classes} is too small.")
        return np.eye(num_classes)[labels]
    rows = [reply.scores for reply in replies if reply.scores is not None]
    if len(rows) != len(replies) or len({row.shape[1] for row in rows}) != 1:
        raise unreadable(url, ValueError("its replies have different numbers of classes"))
    return np.concatenate(rows)
