"""Continuous batching: samples go through a sequence of attacks, each at its own pace."""
