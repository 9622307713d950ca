"""Optimized models at run time: what a call of one does."""
