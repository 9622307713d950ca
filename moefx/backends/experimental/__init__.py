"""Backends that are tested against stand-ins at most and have not run on a GPU: used only where they are named.

``resolve(["deepep_elastic"])`` and ``moefx.optimize(model, backends=["te_ep", ...])`` find them by name like all others.
"""
