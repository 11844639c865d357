"""The first code that a new worker process runs. It imports no torch, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def begin(thread_count: int) -> None:
    """Set up a worker process with so many CPU threads; Ctrl-C is handled by the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    import torch

    torch.set_num_threads(thread_count)


def _end_with_driver() -> None:
    """End this process when the driver ends, in whatever way; otherwise it would wait for tasks for minutes."""
    if driver := multiprocessing.parent_process():
        driver.join()
    os._exit(1)
