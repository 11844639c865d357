"""Looks at a model, a machine or an ensemble, without an evaluation."""
