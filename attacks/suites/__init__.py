"""Suites: sequences of attacks."""
