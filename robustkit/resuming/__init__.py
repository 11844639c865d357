"""Unfinished work on disk, from which a killed run continues, and the recorded answers of models."""

from robustkit.resuming.answers import Answers, asked, current, live, once, recording
from robustkit.resuming.store import Store

__all__ = ["Answers", "Store", "asked", "current", "live", "once", "recording"]
