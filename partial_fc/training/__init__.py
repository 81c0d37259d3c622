"""The training application: configuration, data, backbones, trainer, evaluation and report."""
