"""Tests, laid out like the package. This file makes them a package, so that a `tests` in site-packages is not found instead."""
