"""Backbones: the registry, output shapes, sizes, and the names that checkpoints of the field use."""

import pytest
import torch

from partial_fc.training.backbones import BACKBONES, build_backbone, register
from partial_fc.training.errors import UserError

SHAPES = [(1, 32, 32), (3, 112, 112), (1, 31, 45), (3, 8, 8), (1, 1, 1)]


def parameters_of(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_package_registers_its_modules():
    assert {"small", "iresnet18"} <= BACKBONES.keys()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(BACKBONES))
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
    for name in BACKBONES:
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
    with pytest.raises(ValueError, match="'small' is registered already"):
        register("small")(BACKBONES["iresnet18"])
