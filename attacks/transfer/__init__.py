"""Attacks whose images are to fool models that they never saw."""
