"""The Common Weakness Attack and its parts (Chen et al., arXiv:2303.09105)."""
