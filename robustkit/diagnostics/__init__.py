"""Diagnostics of a model, a device or an ensemble, without an evaluation."""
