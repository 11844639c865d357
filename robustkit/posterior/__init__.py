"""Samples of a net's weights in one file: written while it trains, mapped into memory when they are asked."""

from robustkit.posterior.draft import Draft
from robustkit.posterior.store import FILE, Posterior

__all__ = ["FILE", "Draft", "Posterior"]
