"""Models behind an encrypted endpoint: `https://HOST/PATH`."""

from __future__ import annotations

from robustkit.models.sources.from_http import build
from robustkit.models.sources.source import ModelSource

SOURCE = ModelSource(
    prefix="https",
    help="the same over TLS",
    build=build,
    placeholder="//HOST/PATH?format=json",
)
