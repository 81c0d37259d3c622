"""Backbones: registry, output shapes, sizes, parameter names of published checkpoints, weights from files."""

import copy
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from partial_fc.training.backbones import BACKBONES, build_backbone, register
from partial_fc.training.backbones.counts import count_backbone
from partial_fc.training.backbones.outside import pooled
from partial_fc.training.backbones.settings import BackboneConfig
from partial_fc.training.backbones.weights import load_weights, read_weights
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import to_config
from partial_fc.training.errors import UserError
from partial_fc.training.export.onnx import run_onnx, write_onnx
from partial_fc.training.trainer import Trainer

ROOT = Path(__file__).parents[3]
SHAPES = [(1, 32, 32), (3, 112, 112), (1, 31, 45), (3, 8, 8), (1, 1, 1)]
QUICK = ["small", "iresnet18", "mobilefacenet", "vit_t"]  # one of each kind; the others differ in depth and width


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_package_registers_its_modules():
    assert {"small", "iresnet18"} <= BACKBONES.keys()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUICK)
def test_embeddings_have_the_asked_size_and_all_parameters_get_gradients(name, shape):
    torch.manual_seed(0)
    model = build_backbone(name, image_shape=shape, embedding_size=24)
    out = model(torch.randn(3, *shape))
    assert out.shape == (3, 24)
    assert out.dtype == torch.float32
    out.square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_in_evaluation_an_image_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    for name in QUICK:
        model = build_backbone(name, image_shape=(1, 32, 32), embedding_size=16)
        model(torch.randn(8, 1, 32, 32))
        model.eval()
        images = torch.randn(4, 1, 32, 32)
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-4, rtol=1e-4)
        assert model(images[:0]).shape == (0, 16)


def test_small_is_small_at_any_image_size():
    assert parameters_of(build_backbone("small", image_shape=(1, 32, 32), embedding_size=128)) == 520_128
    at_112 = build_backbone("small", image_shape=(3, 112, 112), embedding_size=128)
    assert parameters_of(at_112) == 520_128 + 2 * 9 * 32, "two channels more in the first convolution, and nothing else"


def test_iresnet18_has_the_size_that_the_field_reports():
    model = build_backbone("iresnet18", image_shape=(3, 112, 112), embedding_size=512)
    assert parameters_of(model) == 24_025_600
    assert model.fc.in_features == 512 * 7 * 7


def test_iresnet18_has_the_names_that_the_field_uses():
    model = build_backbone("iresnet18", image_shape=(3, 112, 112), embedding_size=512)

    def norm(prefix: str) -> set[str]:
        return {f"{prefix}.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}

    expected = {"conv1.weight", "prelu.weight", "fc.weight", "fc.bias"} | norm("bn1") | norm("bn2") | norm("features")
    for layer in range(1, 5):
        for block in range(2):
            prefix = f"layer{layer}.{block}"
            expected |= {f"{prefix}.conv1.weight", f"{prefix}.conv2.weight", f"{prefix}.prelu.weight"}
            expected |= norm(f"{prefix}.bn1") | norm(f"{prefix}.bn2") | norm(f"{prefix}.bn3")
        expected |= {f"layer{layer}.0.downsample.0.weight"} | norm(f"layer{layer}.0.downsample.1")
    state = model.state_dict()
    assert set(state) == expected
    assert state["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert state["layer2.0.bn1.weight"].shape == (64,)
    assert state["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert state["fc.weight"].shape == (512, 25_088)


def test_iresnet_keeps_the_scale_of_its_embeddings_at_one():
    model = build_backbone("iresnet18", image_shape=(1, 32, 32), embedding_size=16)
    assert not model.features.weight.requires_grad
    assert torch.equal(model.features.weight, torch.ones(16))
    assert model.features.bias.requires_grad


def test_iresnet_ends_in_float32_under_autocast():
    model = build_backbone("iresnet18", image_shape=(1, 32, 32), embedding_size=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 1, 32, 32)).dtype == torch.float32


def test_wrong_requests_say_what_to_do():
    with pytest.raises(UserError, match=r"unknown backbone 'resnet9000'; choose one of: .*iresnet18.*small"):
        build_backbone("resnet9000", image_shape=(1, 32, 32), embedding_size=8)
    with pytest.raises(UserError, match="the embedding size is 0; give at least 1"):
        build_backbone("small", image_shape=(1, 32, 32), embedding_size=0)
    with pytest.raises(UserError, match=r"the image shape is \(0, 32, 32\)"):
        build_backbone("small", image_shape=(0, 32, 32), embedding_size=8)
    with pytest.raises(ValueError, match="'small' is already registered"):
        register("small")(BACKBONES["iresnet18"])


# ------------------------------------------------------------------------------------------------- the field's networks

# millions of parameters at 3 x 112 x 112 and 512 embeddings, and billions of operations of a forward
SIZES = {
    "iresnet18": (24.03, 5.22),
    "iresnet34": (34.14, 8.92),
    "iresnet50": (43.59, 12.62),
    "iresnet100": (65.16, 24.18),
    "iresnet200": (118.83, 46.84),
    "mbf": (2.06, 0.88),
    "vit_t": (19.14, 3.01),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_fields_networks_have_the_fields_sizes(name):
    with torch.device("meta"):
        model = build_backbone(name, image_shape=(3, 112, 112), embedding_size=512)
        assert model(torch.empty(2, 3, 112, 112)).shape == (2, 512)
    counts = count_backbone(model, (3, 112, 112))
    parameters, operations = SIZES[name]
    assert f"{counts.parameters / 1e6:.2f} {counts.operations / 1e9:.2f}" == f"{parameters} {operations}"


def test_mobilefacenet_at_its_papers_embedding_size_has_a_million_parameters():
    with torch.device("meta"):
        model = build_backbone("mobilefacenet", image_shape=(3, 112, 112), embedding_size=128)
    assert parameters_of(model) == pytest.approx(1.0e6, rel=0.01)


def names_of_mbf() -> dict[str, tuple[int, ...]]:
    """The parameters of the field's mbf, written down from its layers: scale 2, (1, 4, 6, 2) blocks, 3 x 112 x 112, 512
    embeddings."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(prefix: str, inputs: int, outputs: int, kernel: int, active: bool = True) -> None:
        found[f"{prefix}.layers.0.weight"] = (outputs, inputs, kernel, kernel)
        found[f"{prefix}.layers.1.weight"] = found[f"{prefix}.layers.1.bias"] = (outputs,)
        if active:
            found[f"{prefix}.layers.2.weight"] = (outputs,)

    def bottleneck(prefix: str, inputs: int, between: int, outputs: int) -> None:
        convolution(f"{prefix}.layers.0", inputs, between, 1)
        convolution(f"{prefix}.layers.1", 1, between, 3)
        convolution(f"{prefix}.layers.2", between, outputs, 1, active=False)

    convolution("layers.0", 3, 128, 3)
    convolution("layers.1", 2, 128, 3)  # 64 groups of 2
    for place, inputs, between, outputs in ((2, 128, 128, 128), (4, 128, 256, 256), (6, 256, 512, 256)):
        bottleneck(f"layers.{place}", inputs, between, outputs)
    for place, count, width, between in ((3, 4, 128, 128), (5, 6, 256, 256), (7, 2, 256, 256)):
        for block in range(count):
            bottleneck(f"layers.{place}.layers.{block}", width, between, width)
    convolution("conv_sep", 256, 512, 1)
    convolution("features.layers.0", 1, 512, 7, active=False)
    found["features.layers.2.weight"] = (512, 512)
    found["features.layers.3.weight"] = found["features.layers.3.bias"] = (512,)
    return found


def names_of_vit(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"pos_embed": (1, 144, width), "mask_token": (1, 1, width)}
    found |= {
        "patch_embed.proj.weight": (width, 3, 9, 9),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        found |= {f"blocks.{i}.{norm}.{n}": (width,) for norm in ("norm1", "norm2") for n in ("weight", "bias")}
        found |= {f"blocks.{i}.attn.qkv.weight": (3 * width, width), f"blocks.{i}.attn.proj.weight": (width, width)}
        found |= {f"blocks.{i}.mlp.fc1.weight": (4 * width, width), f"blocks.{i}.mlp.fc2.weight": (width, 4 * width)}
        found |= {f"blocks.{i}.{n}.bias": (width,) for n in ("attn.proj", "mlp.fc2")} | {
            f"blocks.{i}.mlp.fc1.bias": (4 * width,)
        }
    found |= {"feature.0.weight": (width, 144 * width), "feature.2.weight": (512, width)}
    return found | {f"feature.{i}.{n}": (size,) for i, size in ((1, width), (3, 512)) for n in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "expected"), [("mbf", names_of_mbf()), ("vit_t", names_of_vit(256, 12)), ("vit_b", names_of_vit(512, 24))]
)
def test_parameters_have_the_names_and_shapes_that_the_field_uses(name, expected):
    with torch.device("meta"):
        model = build_backbone(name, image_shape=(3, 112, 112), embedding_size=512)
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == expected


def test_the_transformers_block_is_attention_and_mlp_by_hand():
    """In float64, one image; in training patches are left out and blocks too, in evaluation none."""
    torch.manual_seed(0)
    model = build_backbone("vit_t", image_shape=(1, 24, 24), embedding_size=8).double().eval()
    images = torch.randn(2, 1, 24, 24, dtype=torch.float64)
    w = dict(model.named_parameters())

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        return (
            centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).reshape(2, 144, 4)
    x = patches @ w["patch_embed.proj.weight"].reshape(256, 4).T + w["patch_embed.proj.bias"] + w["pos_embed"]
    for i in range(12):
        b = f"blocks.{i}"
        q, k, v = (norm(x, f"{b}.norm1") @ w[f"{b}.attn.qkv.weight"].T).split(256, -1)
        heads = []
        for h in range(0, 256, 32):
            scores = q[..., h : h + 32] @ k[..., h : h + 32].transpose(1, 2) / 32**0.5
            heads.append(scores.softmax(-1) @ v[..., h : h + 32])
        x = x + torch.cat(heads, -1) @ w[f"{b}.attn.proj.weight"].T + w[f"{b}.attn.proj.bias"]
        inner = (norm(x, f"{b}.norm2") @ w[f"{b}.mlp.fc1.weight"].T + w[f"{b}.mlp.fc1.bias"]).clamp(0, 6)
        x = x + inner @ w[f"{b}.mlp.fc2.weight"].T + w[f"{b}.mlp.fc2.bias"]
    x = norm(x, "norm").flatten(1) @ w["feature.0.weight"].T / (1 + 2e-5) ** 0.5
    expected = x @ w["feature.2.weight"].T / (1 + 2e-5) ** 0.5
    torch.testing.assert_close(model(images), expected)
    model.train()
    assert not torch.allclose(model(images), model(images)), "each forward leaves out others"


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "vit_t"])
def test_recomputed_blocks_give_the_same_gradients_and_count_a_batch_once(name):
    torch.manual_seed(0)
    plain = build_backbone(name, image_shape=(1, 16, 16), embedding_size=8)
    torch.manual_seed(0)
    saving = build_backbone(name, image_shape=(1, 16, 16), embedding_size=8, gradient_checkpointing=True)
    runs: list[int] = []
    block = next(m for m in saving.modules() if type(m).__name__ in ("IBasicBlock", "Bottleneck", "_Block"))
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    for step in range(2):
        images = torch.randn(4, 1, 16, 16)
        for model in (plain, saving):
            torch.manual_seed(step)
            model.zero_grad()
            model(images)[:, :3].square().sum().backward()
        for (key, mine), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), key
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad), key
        for (key, mine), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(mine, theirs), key
    assert len(runs) == 4, "twice in each of two steps"
    assert any(b.abs().sum() > 0 for key, b in saving.named_buffers() if key.endswith("running_mean"))
    saving.eval()
    before = copy.deepcopy(saving.state_dict())
    saving(images).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in saving.state_dict().items())


@pytest.mark.parametrize("name", QUICK)
def test_channels_last_is_another_layout_and_the_same_function(name):
    torch.manual_seed(0)
    # float64, because the kernels of the two layouts round differently in float32
    plain = build_backbone(name, image_shape=(3, 32, 32), embedding_size=8).double()
    torch.manual_seed(0)
    other = build_backbone(name, image_shape=(3, 32, 32), embedding_size=8, channels_last=True).double()
    layouts: list[bool] = []
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for training in (False, True):
        torch.manual_seed(1)
        expected = plain.train(training)(images)
        torch.manual_seed(1)
        torch.testing.assert_close(other.train(training)(images), expected, atol=1e-9, rtol=1e-9)
    assert layouts and all(layouts)
    assert all(p.is_contiguous() for p in other.parameters()), "weights stay as every engine takes them"


def test_dropout_is_before_the_last_layer_and_where_there_is_none_it_is_refused(monkeypatch):
    for name in ("iresnet18", "mobilefacenet", "vit_t"):
        model = build_backbone(name, image_shape=(1, 16, 16), embedding_size=8, dropout=0.4)
        assert model.dropout.p == 0.4
        seen: list[float] = []
        model.dropout.register_forward_hook(
            lambda _m, given, out, seen=seen: seen.append(float((out == 0).float().mean()))
        )
        model(torch.randn(8, 1, 16, 16))
        assert 0.2 < seen[0] < 0.6
    with pytest.raises(UserError, match=r"'small' has no dropout; leave --backbone\.dropout out"):
        build_backbone("small", image_shape=(1, 16, 16), embedding_size=8, dropout=0.4)
    monkeypatch.setattr("partial_fc.training.backbones.recompute.tells_backward", lambda within: False)
    with pytest.raises(RuntimeError, match=r"does not tell whether a backward pass is in progress"):
        build_backbone("iresnet18", image_shape=(1, 16, 16), embedding_size=8, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"'small' has no gradient checkpointing; leave"):
        build_backbone("small", image_shape=(1, 16, 16), embedding_size=8, gradient_checkpointing=True)
    with pytest.raises(UserError, match=r"dropout is 1\.0; give a probability"):
        build_backbone("iresnet18", image_shape=(1, 16, 16), embedding_size=8, dropout=1.0)


# --------------------------------------------------------------------------------------------------- weights from files


def drawn(seed: int, name: str = "iresnet18") -> nn.Module:
    torch.manual_seed(seed)
    model = build_backbone(name, image_shape=(1, 16, 16), embedding_size=8)
    model(torch.randn(4, 1, 16, 16))  # batch statistics of their own
    return model


@pytest.mark.parametrize("kind", ["plain", "ddp", "wrapped", "half", "insightface checkpoint", "safetensors"])
def test_weights_of_a_file_become_the_backbones(tmp_path, kind):
    source, target, file = drawn(1), drawn(2), tmp_path / "backbone.pth"
    state = source.state_dict()
    if kind == "plain":
        torch.save(state, file)
    elif kind == "ddp":
        torch.save({f"module.{key}": value for key, value in state.items()}, file)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}}, file)
    elif kind == "half":
        torch.save({key: value.half() for key, value in state.items() if not key.endswith("num_batches_tracked")}, file)
    elif kind == "insightface checkpoint":
        optimizer = {"state": {}, "param_groups": []}
        torch.save({"epoch": 1, "global_step": 5, "state_dict_backbone": state, "state_optimizer": optimizer}, file)
    else:
        file = tmp_path / "backbone.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    load_weights(target, file)
    for key, value in target.state_dict().items():
        torch.testing.assert_close(
            value, state[key], atol=1e-3 if kind == "half" else 0, rtol=1e-3 if kind == "half" else 0, msg=key
        )


def test_weights_that_do_not_fit_are_named_and_nothing_changes(tmp_path):
    file, target = tmp_path / "w.pth", drawn(2)
    state = drawn(1).state_dict()
    state["mystery.weight"] = state.pop("layer1.0.conv1.weight")
    state["fc.weight"] = torch.zeros(3, 4)
    torch.save(state, file)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError) as caught:
        load_weights(target, file)
    message = str(caught.value)
    assert "missing in the file: layer1.0.conv1.weight" in message
    assert "unknown to the backbone: mystery.weight" in message
    assert "fc.weight is [3, 4], not [8, 512]" in message and "\n" not in message
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


class Bomb:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_files_that_are_no_weights_are_refused_and_run_no_code(tmp_path, capsys):
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    expected = {
        "bomb.pth": "cannot be read",
        "text.pth": "cannot be read",
        "numbers.pth": "not a state dict",
        "damaged.safetensors": "damaged",
    }
    for name, words in {**expected, "none.pth": "does not exist"}.items():
        with pytest.raises(UserError, match=words) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_run_starts_from_weights_and_goes_on_without_them(tmp_path, capsys, mistake):
    torch.manual_seed(5)
    source = build_backbone("mobilefacenet", image_shape=(1, 32, 32), embedding_size=16)
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    settings = [
        "--backbone.name",
        "mobilefacenet",
        "--backbone.embedding_size",
        "16",
        "--backbone.weights",
        str(tmp_path / "backbone.pth"),
    ]
    settings += [
        "--backbone.gradient_checkpointing",
        "true",
        "--backbone.channels_last",
        "true",
        "--backbone.dropout",
        "0.2",
    ]
    settings += ["--data.identities", "20", "--train.batch_size", "100", "--train.epochs", "1"]
    settings += ["--train.cpu", "true", "--output.folder", str(tmp_path / "run")]
    assert main(["train", *settings, "--check"]) == 0
    trainer = Trainer(to_config(train_parser(), settings))
    mine = dict(trainer.engine.model.named_parameters())
    assert all(torch.equal(mine[key], value) for key, value in source.named_parameters())
    trainer.train()
    trainer.close()
    assert f"backbone mobilefacenet: {count_backbone(source, (1, 32, 32))}" in capsys.readouterr().out
    (tmp_path / "backbone.pth").unlink()
    Trainer(to_config(train_parser(), settings), resume=True).close()
    assert "--backbone.weights: there is no file" in mistake(
        "train", *settings[:-1], str(tmp_path / "other"), "--check"
    )


# --------------------------------------------------------------------------------------------- models of other packages


def hf_folder(path, kind: str, **sizes) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    return f"hf:{path}"


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}


def test_models_of_transformers_get_the_output_stage(tmp_path):
    pytest.importorskip("transformers")
    kinds = {
        "vit": VIT,
        "dinov2": {k: v for k, v in VIT.items() if k != "intermediate_size"},  # has a parameter of another task
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    }
    for kind, sizes in kinds.items():
        model = build_backbone(hf_folder(tmp_path / kind, kind, **sizes), image_shape=(1, 32, 32), embedding_size=24)
        images = torch.randn(3, 1, 32, 32)
        model(images).square().sum().backward()
        assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        model.eval()
        assert model(images).shape == (3, 24)
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="has no gradient checkpointing"):
        build_backbone(
            f"hf:{tmp_path / 'resnet'}", image_shape=(1, 32, 32), embedding_size=24, gradient_checkpointing=True
        )
    for saving in (False, True):
        model = build_backbone(
            f"hf:{tmp_path / 'vit'}", image_shape=(1, 32, 32), embedding_size=24, gradient_checkpointing=saving
        )
        attentions = [module for module in model.modules() if type(module).__name__ == "ViTAttention"]
        computed: list[object] = []
        for module in attentions:
            module.register_forward_hook(lambda module, *_, computed=computed: computed.append(module))
        loss = model(images).square().sum()
        assert computed == attentions and len(attentions) == 2
        loss.backward()
        assert computed == [*attentions, *(reversed(attentions) if saving else ())], (
            "in the backward, the last block first"
        )
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(UserError, match=r"'hf:nonsense' is neither a folder .*nothing is downloaded"):
        build_backbone("hf:nonsense", image_shape=(1, 32, 32), embedding_size=24)


SAVED = {
    "ViTForImageClassification": {**VIT, "image_size": 32},
    "ViTModel": {**VIT, "image_size": 32},
    "DeiTForImageClassification": {**VIT, "image_size": 32},
    "BeitForImageClassification": {**VIT, "image_size": 32},
    "Dinov2Model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "SwinForImageClassification": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    },
    "ResNetForImageClassification": {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}


def saved_by_transformers(folder: Path, kind: str, **how) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    model = getattr(transformers, kind)(
        getattr(transformers, re.sub("Model|ForImageClassification", "Config", kind))(**SAVED[kind])
    )
    for value in model.state_dict().values():  # also of what begins as zeros or ones, such as norms and biases
        if value.is_floating_point():
            value.add_(torch.rand_like(value), alpha=0.1)
    model.save_pretrained(folder, **how)
    return model.eval()


def feature_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a classifier's last layer gets; of a model without one, its pooler's features, or the class token if that is
    a dense layer."""
    if hasattr(model, "classifier"):
        got: list[torch.Tensor] = []
        handle = model.classifier.register_forward_pre_hook(lambda _, given: got.append(given[0]))
        model(images)
        handle.remove()
        return got[0].flatten(1)
    out = model(images)
    return out.last_hidden_state[:, 0] if hasattr(getattr(model, "pooler", None), "dense") else out.pooler_output


@pytest.mark.parametrize("kind", SAVED)
def test_weights_that_transformers_saved_give_its_features(kind, tmp_path, capfd):
    """The names in its files are those of earlier versions, and classifiers' have no pooler."""
    model = saved_by_transformers(tmp_path, kind)
    torch.save(
        {"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}},
        tmp_path / "by_torch.bin",
    )
    (tmp_path / "model.safetensors").rename(tmp_path / "by_its_names.safetensors")
    torch.save(load_file(tmp_path / "by_its_names.safetensors"), tmp_path / "pytorch_model.bin")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = feature_of(model, images)
    capfd.readouterr()
    for path in (tmp_path / "by_its_names.safetensors", tmp_path / "by_torch.bin", tmp_path):
        backbone = build_backbone(
            f"hf:{tmp_path}", image_shape=(3, 32, 32), embedding_size=24, gradient_checkpointing="ViT" in kind
        ).eval()
        drawn = {name: value.clone() for name, value in backbone.state_dict().items() if not name.startswith("trunk.")}
        random = torch.get_rng_state()
        load_weights(backbone, path)
        assert torch.equal(random, torch.get_rng_state()), "nothing is drawn"
        with torch.no_grad():
            torch.testing.assert_close(
                pooled(backbone.trunk, images, backbone.class_token), expected, atol=1e-6, rtol=1e-5
            )
        assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in drawn.items()), (
            "the output stage stays"
        )
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("normalized", [False, True])
def test_a_model_gets_its_images_as_its_own_configuration_says_if_asked(normalized, tmp_path):
    """In place of the application's [-1, 1]; and the run says what the weights expect, and what was not used."""
    model = saved_by_transformers(tmp_path, "ViTForImageClassification")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    processor = {"do_normalize": True, "image_mean": mean.tolist(), "image_std": std.tolist()}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    settings = BackboneConfig(f"hf:{tmp_path}", 24, normalize_input=normalized)
    said: list[str] = []
    backbone = settings.build((3, 32, 32), str(tmp_path), said.append).eval()
    count = len(backbone.trunk.state_dict())
    assert said[0].startswith(f"loaded {count} tensors from {tmp_path}; not used, of its classifier or another task: ")
    assert "classifier.bias, classifier.weight; the output stage is random" in said[0] and len(said) == 1
    hint = "they expect images with mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225, and get them in [-1, 1]: set "
    assert (hint + "--backbone.normalize_input true" in said[0]) is not normalized
    pixels = torch.rand(2, 3, 32, 32)
    expected = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1) if normalized else pixels * 2 - 1
    got: list[torch.Tensor] = []
    backbone.trunk.register_forward_pre_hook(lambda _, given: got.append(given[0]))
    with torch.no_grad():
        backbone(pixels * 2 - 1)
        torch.testing.assert_close(got[0], expected, atol=1e-6, rtol=1e-5)
        feature_of(model, expected)
    others = BackboneConfig(f"hf:{tmp_path}", 24, normalize_input=not normalized)
    torch.save(backbone.state_dict(), tmp_path / "run.pth")
    with pytest.raises(UserError, match=r"input_mean, input_std; --backbone\.normalize_input must be as it was"):
        others.build((3, 32, 32), str(tmp_path / "run.pth"))


def test_a_model_without_a_mean_or_for_other_channels_does_not_normalize_its_input(tmp_path):
    with pytest.raises(UserError, match=r"'small' takes images in \[-1, 1\] as they are; leave"):
        BackboneConfig("small", normalize_input=True).build((3, 32, 32))
    saved_by_transformers(tmp_path, "ResNetForImageClassification")
    settings = BackboneConfig(f"hf:{tmp_path}", 24, normalize_input=True)
    processor = tmp_path / "preprocessor_config.json"
    for text in (
        "",
        "{",
        "[]",
        '{"image_mean": [0.5]}',
        '{"do_normalize": false, "image_mean": [1], "image_std": [1]}',
    ):
        processor.write_text(text)
        with pytest.raises(
            UserError, match=r"has no mean and standard deviation of images; .*preprocessor_config\.json"
        ):
            settings.build((3, 32, 32))
    processor.write_text('{"image_mean": [0.5], "image_std": [0.2]}')
    with pytest.raises(UserError, match="is for 1 channels, and the images have 3"):
        settings.build((3, 32, 32))


def test_a_name_of_the_hub_says_how_to_save_the_model():
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"there is no folder some/resnet-18, .*save_pretrained\(FOLDER\)") as caught:
        build_backbone("hf:some/resnet-18", image_shape=(3, 32, 32), embedding_size=8)
    assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match=r"Unrecognized model identifier: nosuch\.$"):
        build_backbone("hf:nosuch", image_shape=(3, 32, 32), embedding_size=8)


def test_weights_of_transformers_in_parts(tmp_path):
    model = saved_by_transformers(tmp_path, "Dinov2Model", max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    backbone = build_backbone(f"hf:{tmp_path}", image_shape=(3, 32, 32), embedding_size=24)
    load_weights(backbone, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(backbone.trunk.state_dict()[name], value), name
    index = tmp_path / "model.safetensors.index.json"
    for text, words in (
        ('{"weight_map": {"a": "../x.safetensors"}}', "files in its own folder"),
        ("[]", "not an index"),
        ('{"weight_map": {}}', "at least one"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            read_weights(tmp_path)
    index.unlink()
    with pytest.raises(UserError, match=r"has no file of weights \(model\.safetensors, "):
        read_weights(tmp_path)


def test_weights_of_transformers_that_do_not_fit_are_named(tmp_path):
    saved_by_transformers(tmp_path, "ViTForImageClassification")
    file = tmp_path / "model.safetensors"
    target = build_backbone(f"hf:{tmp_path}", image_shape=(3, 64, 64), embedding_size=24)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(
        UserError,
        match=r"embeddings is \[1, 17, 16\], not \[1, 65, 16\]; position embeddings are not interpolated: give the --data.image_size",
    ):
        load_weights(target, file)
    state = load_file(file)
    extra = {
        name.replace("layer.1.", "layer.2."): value.clone() for name, value in state.items() if ".layer.1." in name
    }
    lacking = {name: value for name, value in state.items() if ".layer.1." not in name}
    for changed, words in (
        (state | extra, r"unknown to the backbone: (encoder\.)?layers?\.2\..* and 13 more"),
        (lacking, r"missing in the file: (encoder\.)?layers?\.1\..* and 13 more"),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=words) as caught:
            load_weights(build_backbone(f"hf:{tmp_path}", image_shape=(3, 32, 32), embedding_size=24), file)
        assert "\n" not in str(caught.value) and "classifier" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


def test_a_model_of_transformers_is_trained_in_float32_whatever_it_was_saved_in(tmp_path):
    pytest.importorskip("transformers")
    model = build_backbone(
        hf_folder(tmp_path / "vit", "vit", **VIT, dtype="float16"), image_shape=(3, 32, 32), embedding_size=24
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("classes", [["AutoConfig", "AutoModel"], ["AutoModel"]])
def test_code_in_a_folder_is_not_run_and_nobody_is_asked(classes, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    marker = tmp_path / "ran"
    name = hf_folder(
        tmp_path / "evil",
        "own" if "AutoConfig" in classes else "encoder-decoder",
        auto_map={c: f"own.{c}" for c in classes},
    )
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import PretrainedConfig\nclass AutoConfig(PretrainedConfig): model_type = 'own'\n"
    (tmp_path / "evil/own.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match=r"needs Python code of its own .*, which is not run") as caught:
        build_backbone(name, image_shape=(3, 32, 32), embedding_size=24)
    assert not marker.exists() and "\n" not in str(caught.value) and sys.stdin.read() == "y\n" * 9


class TinyTimm(nn.Module):
    """What timm promises of a model: pooled features without a classifier, and its switch for recomputation."""

    def __init__(self, in_chans: int) -> None:
        super().__init__()
        self.conv, self.bn, self.saving = nn.Conv2d(in_chans, 6, 3), nn.BatchNorm2d(6), False
        self.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.saving = enable

    def _block(self, x):
        return self.bn(self.conv(x)).relu()

    def forward(self, x):
        x = torch.utils.checkpoint.checkpoint(self._block, x, use_reentrant=False) if self.saving else self._block(x)
        return x.mean((2, 3))


def test_models_of_timm_get_the_output_stage_and_count_a_batch_once(monkeypatch):
    """A stand-in with timm's interface: timm itself needs torchvision."""
    asked: list[dict] = []

    def create_model(name, *, pretrained, num_classes, in_chans):
        if name.endswith(".nonsense"):
            raise RuntimeError("Invalid pretrained tag (nonsense) for tiny.")
        asked.append({"name": name, "pretrained": pretrained, "num_classes": num_classes})
        return TinyTimm(in_chans)

    timm = ModuleType("timm")
    timm.list_models = lambda pattern="*": [n for n in ("tiny", "tinier") if pattern.strip("*") in n]  # type: ignore[attr-defined]
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    colour = build_backbone("timm:tiny", image_shape=(3, 16, 16), embedding_size=8, normalize_input=True)
    assert colour.input_mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])  # type: ignore[operator]
    asked.clear()
    models = []
    for saving in (False, True):
        torch.manual_seed(0)
        models.append(
            build_backbone("timm:tiny", image_shape=(1, 16, 16), embedding_size=8, gradient_checkpointing=saving)
        )
    assert asked[0] == {"name": "tiny", "pretrained": False, "num_classes": 0}
    images = torch.randn(4, 1, 16, 16)
    for model in models:
        model(images)[:, :3].square().sum().backward()
    for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
    for mine, theirs in zip(models[1].buffers(), models[0].buffers(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(UserError, match="timm has no model 'tin'; similar names: tiny, tinier"):
        build_backbone("timm:tin", image_shape=(1, 16, 16), embedding_size=8)
    build_backbone("timm:tiny.some_in1k", image_shape=(1, 16, 16), embedding_size=8)
    assert asked[-1] == {"name": "tiny.some_in1k", "pretrained": False, "num_classes": 0}
    with pytest.raises(UserError, match=r"timm cannot build 'tiny\.nonsense' .*: Invalid pretrained tag"):
        build_backbone("timm:tiny.nonsense", image_shape=(1, 16, 16), embedding_size=8)
    with pytest.raises(UserError, match=r"timm has no model 'hf_hub:timm/tiny'; timm\.list_models"):
        build_backbone("timm:hf_hub:timm/tiny", image_shape=(1, 16, 16), embedding_size=8)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224.augreg_in21k", "mobilenetv3_small_100.lamb_in1k"])
def test_models_of_timm_itself_train_and_take_its_weights(name, tmp_path):
    timm = pytest.importorskip("timm")
    backbone = build_backbone(f"timm:{name}", image_shape=(3, 64, 64), embedding_size=8)
    backbone(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
    model = timm.create_model(name, **({"img_size": 64} if "vit" in name else {})).eval()
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    load_weights(backbone.eval(), tmp_path / "timm.pth")
    images = torch.randn(2, 3, 64, 64)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(pooled(backbone.trunk, images, backbone.class_token), expected, atol=1e-5, rtol=1e-5)


def test_models_of_packages_that_are_missing_say_what_to_install(monkeypatch):
    for package in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    for name, package in (("timm:resnet18", "timm"), ("hf:vit", "transformers")):
        with pytest.raises(UserError, match=f"needs {package} .*pip install {package}"):
            build_backbone(name, image_shape=(3, 32, 32), embedding_size=8)


@pytest.mark.parametrize(("package", "name"), [("timm", "timm:resnet18"), ("transformers", "hf:vit")])
def test_a_package_that_cannot_be_imported_is_named_in_one_line(package, name, tmp_path, monkeypatch):
    """As timm beside a torchvision that was built for another torch."""
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(
        UserError,
        match=rf"'{name}' needs {package}, which cannot be imported .*: operator torchvision::nms does not exist",
    ):
        build_backbone(name, image_shape=(3, 32, 32), embedding_size=8)


# ---------------------------------------------------------------------------------------------------- what is told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilefacenet", "vit_t"])
def test_onnx_files_of_the_new_kinds_give_what_torch_gives(tmp_path, name):
    torch.manual_seed(0)
    model = build_backbone(name, image_shape=(1, 24, 24), embedding_size=8)
    model(torch.randn(8, 1, 24, 24))
    model.eval()
    images = torch.randn(4, 1, 24, 24)
    write_onnx(model, (1, 24, 24), tmp_path / "b.onnx", name)
    found = torch.cat(run_onnx(tmp_path / "b.onnx", images, (1, 3), name))
    torch.testing.assert_close(found, model(images).detach(), atol=1e-4, rtol=1e-3)


def test_operations_are_counted_by_hand_and_the_module_stays_as_it_is():
    model = build_backbone("small", image_shape=(1, 32, 32), embedding_size=10)
    before = copy.deepcopy(model.state_dict())
    convolutions = [(1, 32, 16), (32, 64, 8), (64, 128, 4), (128, 256, 2)]
    expected = 2 * (sum(i * o * 9 * side**2 for i, o, side in convolutions) + 1024 * 10)
    assert count_backbone(model, (1, 32, 32)).operations == expected
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    class Asks(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    assert count_backbone(Asks(), (1, 32, 32)).operations is None


def test_the_command_lists_every_backbone_and_the_page_shows_what_it_says(monkeypatch, capsys):
    monkeypatch.delitem(BACKBONES, "mine", raising=False)  # of the page's own example, when that has run before
    assert main(["backbones"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:]] == list(BACKBONES)
    assert f"```text\n{table}```" in (ROOT / "docs/backbones.md").read_text()
    assert main(["backbones", "--image_size", "0"]) == 2
