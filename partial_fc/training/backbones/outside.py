"""Vision models of timm and transformers, by name, with the output stage of face recognition on their features.

    timm:NAME      a model of timm
    hf:FOLDER      the model that the config.json of transformers in FOLDER describes
    hf:TYPE        a model type of transformers with its default sizes, such as hf:vit or hf:resnet

images [n, C, H, W] in [-1, 1] -> (x - mean) / std of the model's own configuration, if the settings say so
  -> the model's pooled features [n, F] -> batch norm -> dropout -> linear -> batch norm  [n, D]

Weights are initialised randomly; --backbone.weights names a file of pretrained ones. Nothing is downloaded, and no
code in a folder is run.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partial_fc.training.backbones import PREFIXES
from partial_fc.training.backbones.precision import in_full_precision
from partial_fc.training.backbones.weights import INPUT_STATISTICS
from partial_fc.training.errors import UserError

InputStatistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel of images in [0, 1]."""
PROCESSOR = "preprocessor_config.json"


class WithOutputStage(nn.Module):
    """`trunk` with pooled features of size `features`, and the output stage of the ArcFace paper (section 3.2.2).

    own_input: what the configuration of the model says about its images, for `normalize_input`.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self, trunk: nn.Module, features: int, embedding_size: int, own_input: InputStatistics | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.own_input = own_input
        self.class_token = has_class_token(trunk)
        self.norm = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(p=0.0)
        self.fc = nn.Linear(features, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        # The head normalises embeddings or learns its own scale, so a second learned scale would only drift.
        self.features.weight.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Make the model recompute its blocks in the backward pass. Raises UserError if it cannot."""
        if hasattr(self.trunk, "set_grad_checkpointing"):
            self.trunk.set_grad_checkpointing(enable)  # type: ignore[operator]
        elif getattr(self.trunk, "supports_gradient_checkpointing", False):
            # the name since transformers 5, or the earlier one; both take the same first argument
            new_name = getattr(self.trunk, "activation_checkpointing_enable", None)
            enable_checkpointing = new_name or self.trunk.gradient_checkpointing_enable
            enable_checkpointing({"use_reentrant": False})  # type: ignore[operator]
        else:
            raise UserError(
                f"{type(self.trunk).__name__} has no gradient checkpointing; "
                "leave --backbone.gradient_checkpointing out"
            )

    def normalize_input(self, channels: int) -> None:
        """Give the model its images, of so many channels, with the mean and standard deviation of its configuration.

        Raises UserError if that has none, or has them for another number of channels.
        """
        if self.own_input is None:
            raise UserError(
                f"--backbone.normalize_input: the configuration of {type(self.trunk).__name__} has no mean and "
                f"standard deviation of images; of transformers give a folder with {PROCESSOR}, which save_pretrained "
                "of the model's AutoImageProcessor writes"
            )
        if channels != len(self.own_input[0]):
            raise UserError(
                f"--backbone.normalize_input: the configuration of {type(self.trunk).__name__} is for "
                f"{len(self.own_input[0])} channels, and the images have {channels}; set --data.channels"
            )
        for name, values in zip(INPUT_STATISTICS, self.own_input, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if hasattr(self, INPUT_STATISTICS[0]):
            images = (images * 0.5 + 0.5 - self.input_mean) / self.input_std  # from [-1, 1]
        x = pooled(self.trunk, images, self.class_token)
        with in_full_precision(images.device):
            x = self.dropout(self.norm(x.to(self.fc.weight.dtype)))
            out: Tensor = self.features(self.fc(x))
        return out


def pooled(trunk: nn.Module, images: Tensor, class_token: bool) -> Tensor:
    """Return the model's features `[n, F]`: the output of the model or, in transformers, of its pooler.

    Without a pooler, tokens are reduced to the class token or else to their mean; a feature map is averaged.
    """
    out: Any = trunk(images)
    if not isinstance(out, Tensor):
        found = getattr(out, "pooler_output", None)
        out = out.last_hidden_state if found is None else found.flatten(1)
    if out.ndim == 4:  # [n, F, H, W]
        return out.mean((2, 3))
    if out.ndim == 3:  # [n, T, F]
        return out[:, 0] if class_token else out.mean(1)
    return out


def has_class_token(trunk: nn.Module) -> bool:
    """Return whether the model's first token is a class token, which stands for the whole image."""
    return any(name.endswith("cls_token") for name, _ in trunk.named_parameters())


def _with_output_stage(
    trunk: nn.Module,
    name: str,
    image_shape: tuple[int, int, int],
    embedding_size: int,
    own_input: InputStatistics | None,
) -> WithOutputStage:
    """Add the output stage; one image shows the number of features and the parameters that have no gradient."""
    training = trunk.training
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    try:
        with torch.enable_grad():
            image = torch.zeros(1, *image_shape, device=parameters[0].device)
            features = pooled(trunk.eval(), image, has_class_token(trunk))
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    except Exception as error:  # the model's own code can raise anything
        raise UserError(
            f"the model {name!r} cannot take images of shape {image_shape}: {_reason(error)}; see --data.image_size"
        ) from error
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:  # for another task, such as a mask token; DDP would wait for its gradient
            parameter.requires_grad_(False)
    return WithOutputStage(trunk.train(training), int(features.shape[1]), embedding_size, own_input)


@contextmanager
def _importing(package: str, name: str) -> Iterator[None]:
    """Raise UserError for any error on import of `package`."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"the backbone {name!r} needs {package} ({error.name} is missing): pip install {package}, "
            "or 'partial_fc[models]' for all of them"
        ) from error
    except Exception as error:  # such as RuntimeError of a torchvision built for another torch, OSError of a library
        raise UserError(
            f"the backbone {name!r} needs {package}, which cannot be imported with torch {torch.__version__}: "
            f"{_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def timm_backbone(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> WithOutputStage:
    """Build the timm model `name` without its classifier, for `image_shape`.

    A name may end with the tag of pretrained weights ("resnet18.a1_in1k"); the weights are not loaded.
    """
    with _importing("timm", f"timm:{name}"):
        import timm
    architecture = name.partition(".")[0]
    if architecture not in timm.list_models():
        near = timm.list_models(f"*{architecture}*")[:5]
        raise UserError(
            f"timm has no model {name!r}"
            + (f"; similar names: {', '.join(near)}" if near else "; timm.list_models() lists its models")
        )
    settings: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": image_shape[0]}
    try:
        try:
            trunk = timm.create_model(name, img_size=image_shape[1:], **settings)
        except TypeError:  # models without position embeddings have no img_size
            trunk = timm.create_model(name, **settings)
    except Exception as error:  # an unknown tag, or the model's own code
        raise UserError(f"timm cannot build {name!r} for images of shape {image_shape}: {_reason(error)}") from error
    about = getattr(trunk, "pretrained_cfg", None) or {}
    own_input = _own_input(about.get("mean"), about.get("std"))
    return _with_output_stage(trunk, f"timm:{name}", image_shape, embedding_size, own_input)


def hf_backbone(name: str, image_shape: tuple[int, int, int], embedding_size: int) -> WithOutputStage:
    """Build the transformers model that the folder `name` describes, or of type `name`, for `image_shape`."""
    with _importing("transformers", f"hf:{name}"):
        from transformers import AutoConfig, AutoModel
    needs_code = _has_auto_map(name)
    try:
        config = (
            AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            if Path(name).is_dir()
            else AutoConfig.for_model(name)
        )
    except (OSError, ValueError, KeyError) as error:
        if needs_code:
            raise _code_refused(name) from error
        if "/" in name and not Path(name).exists():
            raise UserError(
                f"'hf:{name}': there is no folder {name}, and nothing is downloaded; save the model to a folder first, "
                f'AutoModel.from_pretrained("{name}").save_pretrained(FOLDER), and name hf:FOLDER (docs/backbones.md)'
            ) from error
        # its list of hundreds of model types follows
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(" Should ")[0][:150]
        raise UserError(
            f"'hf:{name}' is neither a folder with a config.json of transformers nor one of its model types, such as "
            f"hf:vit (nothing is downloaded): {reason}"
        ) from error
    channels, height, width = image_shape
    if hasattr(config, "image_size"):
        config.image_size = height if height == width else [height, width]
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    try:
        # dtype: whatever the weights were saved in. attn_implementation: a config may name kernels to download.
        trunk = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32, attn_implementation=None)
    except (ValueError, TypeError, ImportError) as error:
        if needs_code:
            raise _code_refused(name) from error
        raise UserError(f"transformers cannot build 'hf:{name}': {_reason(error)}") from error
    _remove_dense_pooler(trunk)
    own_input = _input_of_folder(Path(name))
    return _with_output_stage(trunk, f"hf:{name}", image_shape, embedding_size, own_input)


def _has_auto_map(name: str) -> bool:
    """Return whether the config.json in the folder `name` refers to Python files for its model."""
    try:
        return '"auto_map"' in (Path(name) / "config.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _code_refused(name: str) -> UserError:
    return UserError(
        f"the model in 'hf:{name}' needs Python code of its own (auto_map in config.json), which is not run; "
        "choose another model"
    )


def _remove_dense_pooler(trunk: nn.Module) -> None:
    """Remove a pooler that is a dense layer with tanh (ViT, DeiT), as `add_pooling_layer=False` does.

    Checkpoints of classifiers do not contain such a layer, because they classify the class token, and in few other
    checkpoints it is trained. Other poolers (Swin's mean, BEiT's mean and norm) are part of the classifiers and stay.
    """
    pooler = getattr(trunk, "pooler", None)
    if hasattr(pooler, "dense") and "add_pooling_layer" in inspect.signature(type(trunk).__init__).parameters:
        trunk.register_module("pooler", None)


def _own_input(mean: Any, std: Any) -> InputStatistics | None:
    """Return the mean and standard deviation of each channel of images in [0, 1]; None if they are not such."""
    try:
        found = tuple(float(each) for each in mean), tuple(float(each) for each in std)
    except (TypeError, ValueError):
        return None
    return found if len(found[0]) == len(found[1]) and min(found[1], default=0.0) > 0 else None


def _input_of_folder(folder: Path) -> InputStatistics | None:
    """Return what the image processor saved in a folder of transformers gives its model."""
    try:
        settings = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
        if settings.get("do_normalize", True):
            return _own_input(settings["image_mean"], settings["image_std"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


PREFIXES["timm:"] = timm_backbone
PREFIXES["hf:"] = hf_backbone
