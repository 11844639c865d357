"""Differentiable substitutes of a model, to search adversarial images on."""
