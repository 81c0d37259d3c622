"""A trained backbone as safetensors and ONNX, for programs without this project.

    export.py           `export_backbone` and `load_exported_backbone`
    onnx.py             writing and running the ONNX file
    quantised.py        the ONNX file in 8 bits, and its accuracy beside that in float32
    spec.py             preprocessing.json: how to prepare images and use embeddings; config.json
    card.py             README.md: the model card
    check.py            the images; comparison of the exported files with the backbone in torch
    output_folder.py    an output folder that is written as a whole or not at all

A new format is an entry in `export.FORMATS` and `export.NEEDS`, a pair of functions that write and run it, called in
`export_backbone`, and lines of usage in `spec.USAGE`.
"""

from partial_fc.training.export.export import export_backbone, load_exported_backbone

__all__ = ["export_backbone", "load_exported_backbone"]
