"""Vision models of timm and transformers, by name, with the output stage of face recognition on their features.

    timm:NAME      a model of timm , its weights drawn
    hf:FOLDER      a folder with a config.json of transformers , its weights drawn
    hf:TYPE        a model type of transformers with its default sizes, such as hf:vit or hf:resnet

images [n, C, H, W] -> the model's pooled features [n, F] -> batch norm -> dropout -> linear -> batch norm  [n, D]

Nothing is fetched from the network. Pretrained weights are a file: name it with --backbone.weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.training.backbones import PREFIXES
from partial_fc.training.backbones.precision import in_full_precision
from partial_fc.training.errors import UserError


class WithOutputStage(nn.Module):
    """`trunk`, whose pooled features have `features` numbers, and the output stage of the ArcFace paper (section 3.2.2)."""

    def __init__(self, trunk: nn.Module, features: int, embedding_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(p=0.0)
        self.fc = nn.Linear(features, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        # The head normalises embeddings, or learns its own scale: a second, free one would only drift.
        self.features.weight.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let the model compute its blocks again in the backward, if it can."""
        if hasattr(self.trunk, "set_grad_checkpointing"):
            self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]
        elif getattr(self.trunk, "supports_gradient_checkpointing", False):
            # its name since transformers 5; the former one, with the same first argument, before that
            switch = getattr(self.trunk, "activation_checkpointing_enable", None) or self.trunk.gradient_checkpointing_enable
            switch({"use_reentrant": False})  # type: ignore[operator]
        else:
            raise UserError(f"{type(self.trunk).__name__} has no gradient checkpointing; leave --backbone.gradient_checkpointing out")

    def forward(self, images: Tensor) -> Tensor:
        x = pooled(self.trunk, images)
        with in_full_precision(images.device):
            x = self.dropout(self.norm(x.to(self.fc.weight.dtype)))
            out: Tensor = self.features(self.fc(x))
        return out


def pooled(trunk: nn.Module, images: Tensor) -> Tensor:
    """The model's features `[n, F]`: what it gives itself, its pooler's, or the mean over its tokens or places."""
    out: Any = trunk(images)
    if not isinstance(out, Tensor):
        found = getattr(out, "pooler_output", None)
        out = out.last_hidden_state if found is None else found.flatten(1)
    if out.ndim == 4:  # [n, F, H, W]
        return out.mean((2, 3))
    return out.mean(1) if out.ndim == 3 else out  # [n, T, F]


def _with_output_stage(trunk: nn.Module, name: str, image_shape: tuple[int, int, int], embedding_size: int) -> WithOutputStage:
    """The whole backbone; the number of features, and what takes part in them, is found with one image."""
    training = trunk.training
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            features = pooled(trunk.eval(), torch.zeros(1, *image_shape, device=parameters[0].device))
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    except Exception as error:  # the model's own code
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model {name!r} cannot take images of shape {image_shape}: {reason}; see --data.image_size") from error
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:  # of another task, such as a token for masked patches: DDP would wait for its gradient
            parameter.requires_grad_(False)
    return WithOutputStage(trunk.train(training), int(features.shape[1]), embedding_size)


def timm_backbone(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> WithOutputStage:
    """The timm model `name` without its classifier, for `image_shape`."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UserError(f"the backbone 'timm:{name}' needs timm ({error.name} is missing): pip install timm") from error
    if not name or name not in timm.list_models():
        near = timm.list_models(f"*{name}*")[:5]
        raise UserError(f"timm has no model {name!r}" + (f"; it has {', '.join(near)}" if near else "; timm.list_models() names them"))
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": image_shape[0]}
    try:
        trunk = timm.create_model(name, img_size=image_shape[1:], **settings)
    except TypeError:  # models without positions have no such argument
        trunk = timm.create_model(name, **settings)
    return _with_output_stage(trunk, f"timm:{name}", image_shape, embedding_size)


def hf_backbone(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> WithOutputStage:
    """The transformers model that the folder `name` describes, or of the type `name`, for `image_shape`."""
    try:
        from transformers import AutoConfig, AutoModel
    except ModuleNotFoundError as error:
        raise UserError(f"the backbone 'hf:{name}' needs transformers ({error.name} is missing): pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True) if Path(name).is_dir() else AutoConfig.for_model(name)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise UserError(
            f"'hf:{name}' is neither a folder with a config.json of transformers nor a model type that it knows, such as hf:vit "
            f"(nothing is fetched from the network): {reason}"
        ) from error
    channels, height, width = image_shape
    if hasattr(config, "image_size"):
        config.image_size = height if height == width else [height, width]
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    try:
        trunk = AutoModel.from_config(config)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"transformers cannot build 'hf:{name}': {' '.join(str(error).split())[:200]}") from error
    return _with_output_stage(trunk, f"hf:{name}", image_shape, embedding_size)


PREFIXES["timm:"] = timm_backbone
PREFIXES["hf:"] = hf_backbone
