"""Pipelines of passes, patterns, and their certification on random inputs."""
