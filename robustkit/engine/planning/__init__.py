"""Forecast of the cost of an evaluation."""
