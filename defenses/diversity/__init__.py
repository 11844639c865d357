"""Ensembles trained to share few weaknesses."""
