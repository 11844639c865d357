"""Error messages about code that is not robustkit's."""

from __future__ import annotations

from robustkit.models.failures import described, first_line

__all__ = ["NO_MEMORY", "described", "first_line"]

NO_MEMORY = "out of memory even with one image at a time; use a device with more memory."
