"""Features and residual blocks of any architecture."""
