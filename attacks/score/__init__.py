"""Attacks that use only the outputs of the model: its scores (logits), or its decisions (predicted labels)."""
