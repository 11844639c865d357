"""Attacks that use only the scores of the model."""
