"""Techniques that change the gradient which a transfer attack is given."""
