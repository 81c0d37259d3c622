"""Thin adapters, one an engine; each imports its engine only when used, so that the core needs none of them."""
