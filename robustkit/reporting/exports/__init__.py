"""Records in formats of other programs."""
