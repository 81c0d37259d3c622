"""The sharded cross-entropy over class rows: forward and backward, tile by tile."""
