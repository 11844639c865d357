"""Downloads of pretrained weights that fail soon and quietly when there is no network."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_PROBE_SECONDS = 5.0
_STALL_SECONDS = 30.0


def reachable(url: str) -> bool:
    """Return whether a server responds at the address within a few seconds."""
    import urllib.error  # 30 ms that lists of models do not need
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings and logs, and give up on a connection that stalls for 30 seconds."""
    timeout, level = socket.getdefaulttimeout(), logging.root.manager.disable
    socket.setdefaulttimeout(_STALL_SECONDS)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        socket.setdefaulttimeout(timeout)


@contextmanager
def offline_if_unreachable(*, local: bool = False) -> Iterator[None]:
    """Let the Hugging Face hub look into its cache at once instead of retrying for most of a minute.

    Args:
        local: Whether the model is a folder, so that nothing is downloaded.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local or not reachable(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
