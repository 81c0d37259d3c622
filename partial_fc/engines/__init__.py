"""Thin adapters to training engines and launchers, one module each.

An adapter imports its engine's package when it is used; the core needs none of them.
"""
