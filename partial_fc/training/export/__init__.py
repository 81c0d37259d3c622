"""A trained backbone as safetensors and ONNX, for programs without this project."""

from partial_fc.training.export.export import export_backbone, load_exported_backbone

__all__ = ["export_backbone", "load_exported_backbone"]
