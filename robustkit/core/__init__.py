"""Threats, losses, random numbers, errors: what all other packages use. It imports none of them."""
