"""Class weights as files: one safetensors file, or the files of each rank that other trainers leave."""
