"""Exports of records to formats of other programs."""
