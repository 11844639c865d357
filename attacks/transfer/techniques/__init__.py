"""Techniques that change the gradient of a transfer attack."""
