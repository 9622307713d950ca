"""The tests: they mirror the package. A package, so that `tests` in site-packages is not found instead."""
