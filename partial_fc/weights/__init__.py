"""Class weights to and from files: one safetensors file, or the per-rank files of other trainers."""
