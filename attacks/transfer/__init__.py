"""Attacks whose images should fool models that they have no access to."""
