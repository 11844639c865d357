"""Surrogates drawn from posteriors (Gubri et al.), and attacks that use them."""
