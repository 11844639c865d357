"""Transforms of the images in front of a model."""
