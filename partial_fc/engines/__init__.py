"""Thin adapters to engines and launchers, one module each; what one needs is imported when it is used: the core needs none of them."""
