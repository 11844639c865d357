"""A small model server for tests and examples, in the three formats that `http://` models are read in."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

# From a request's number and its reply to the status and reply that are sent instead; it may wait or raise.
Fault = Callable[[int, Any], tuple[int, Any]]


@dataclass
class ModelServer:
    """A server of one model; its address is `url`.

    Attributes:
        model: from images (B, C, H, W) in [0, 1] to logits (B, K).
        format: `json`, `kserve` or `torchserve`.
        labels_only: whether it returns the predicted classes alone.
        max_images: it refuses requests with more images with status 413.
        token: what the header Authorization must hold; None for nothing.
        fault: changes replies, to try what a client does.
        images: how many images it has evaluated.
        requests: how many requests it has received.
    """

    model: Callable[[torch.Tensor], torch.Tensor]
    format: str = "json"
    labels_only: bool = False
    max_images: int | None = None
    token: str | None = None
    fault: Fault | None = None
    images: int = 0
    requests: int = 0
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self, port: int = 0) -> Iterator[ModelServer]:
        """Serve on this machine alone, in a thread, until the block ends."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served._answer(self, b"")

            def do_POST(self) -> None:
                served._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self.url = f"http://127.0.0.1:{server.server_address[1]}{PATHS[self.format]}"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        with self._lock:
            self.requests += 1
            number = self.requests
        try:
            status, body = self._result(handler, content)
            if self.fault is not None and handler.command == "POST":
                status, body = self.fault(number, body)
        except ConnectionError:
            handler.connection.close()
            return
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)
        except OSError:
            return  # the client has gone

    def _result(self, handler: BaseHTTPRequestHandler, content: bytes) -> tuple[int, Any]:
        if self.token is not None and handler.headers.get("Authorization") != self.token:
            return 401, {"error": "no permission"}
        if handler.command == "GET":
            return 200, {
                "name": "model",
                "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, -1, -1, -1]}],
                "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, -1]}],
            }
        x = READERS[self.format](content)
        if self.max_images is not None and len(x) > self.max_images:
            return 413, {"error": "too many images"}
        with self._lock, torch.no_grad():
            self.images += len(x)
            logits = self.model(x)
        return 200, self._reply(logits)

    def _reply(self, logits: torch.Tensor) -> Any:
        values = (logits.argmax(1) if self.labels_only else logits).tolist()
        if self.format == "json":
            return {"labels" if self.labels_only else "logits": values}
        if self.format == "torchserve":
            return values[0]
        kind, shape = ("INT64", [len(values)]) if self.labels_only else ("FP32", list(logits.shape))
        return {
            "outputs": [{"name": "logits", "datatype": kind, "shape": shape, "data": np.ravel(values).tolist()}]
        }


def _read_json(content: bytes) -> torch.Tensor:
    images = json.loads(content)["images"]
    if isinstance(images[0], str):
        return torch.cat([_read_png(base64.b64decode(one)) for one in images])
    return torch.tensor(images, dtype=torch.float32)


def _read_kserve(content: bytes) -> torch.Tensor:
    tensor: Mapping[str, Any] = json.loads(content)["inputs"][0]
    return torch.tensor(tensor["data"], dtype=torch.float32).view(tensor["shape"])


def _read_png(content: bytes) -> torch.Tensor:
    pixels = np.array(Image.open(io.BytesIO(content), formats=["PNG"]))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels))[None].float() / 255


READERS: Mapping[str, Callable[[bytes], torch.Tensor]] = {
    "json": _read_json,
    "kserve": _read_kserve,
    "torchserve": _read_png,
}
PATHS = {"json": "/classify", "kserve": "/v2/models/model", "torchserve": "/predictions/model"}
