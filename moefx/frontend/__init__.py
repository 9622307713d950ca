"""Capture: from a model to a Program of graphs."""
