"""Attacks that use the gradient of the model."""
