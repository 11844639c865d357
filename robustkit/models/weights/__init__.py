"""Weights files: read without executing anything, and put into a net."""
