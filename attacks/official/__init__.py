"""Adapters to the authors' own packages."""
