"""The training application: settings, data, backbones, trainer, evaluation and reports."""
