"""Code that runs on the card, or in Triton's interpreter. Its modules import triton when they are imported."""
