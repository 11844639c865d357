"""Posterior samples of a net's weights in one file: written during training, memory-mapped when they are used."""

from robustkit.posterior.draft import UnfinishedPosterior
from robustkit.posterior.store import FILE, Posterior

__all__ = ["FILE", "Posterior", "UnfinishedPosterior"]
