"""Graphs, functions and programs, and the plan by which passes rewrite them."""
