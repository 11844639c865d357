"""Craft runs: transferable adversarial images, judged on other models."""
