"""Posterior samples of a net's weights in one file: written during training, memory-mapped when they are used."""

from robustkit.posterior.draft import Draft
from robustkit.posterior.store import FILE, Posterior

__all__ = ["FILE", "Draft", "Posterior"]
