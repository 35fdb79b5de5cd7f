from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.config.model import ArchitectureConfig
from dmvae.nn.networks import Dimensions, architecture_of, register, registry
from dmvae.nn.networks.mlp import MLPDecoder, MLPEncoder
from dmvae.nn.networks.residual import Plan


def dimensions(shape: tuple[int, ...], classes: int | None = None) -> Dimensions:
    output_shape = shape if classes is None else (*shape, classes)
    return Dimensions(shape, output_shape, shared_dim=3, private_dim=2, classes=classes)


def build(settings: ArchitectureConfig, dims: Dimensions) -> tuple[nn.Module, nn.Module]:
    architecture = architecture_of(settings, dims, "a")
    return architecture.encoder(settings, dims), architecture.decoder(settings, dims)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("mlp", (7,)),
        ("mlp", (1, 28, 28)),
        ("skip_mlp", (7,)),
        ("skip_mlp", (1, 28, 28)),
        ("conv", (1, 28, 28)),
        ("conv", (3, 32, 32)),
        ("conv", (1, 32, 32)),
        ("residual", (1, 28, 28)),
        ("residual", (5, 8, 13)),
        ("residual", (3, 65, 30)),
        ("residual", (1, 8, 256)),
        ("series", (1, 8)),
        ("series", (12, 1001)),
    ],
)
def test_every_architecture_maps_rows_to_latents_and_back(architecture: str, shape: tuple[int, ...]) -> None:
    encoder, decoder = build(ArchitectureConfig(name=architecture), dimensions(shape))
    output = encoder(torch.randn(4, *shape))
    assert output.embedding.shape == output.log_covariance.shape == (4, 3)
    assert output.style_embedding.shape == output.style_log_covariance.shape == (4, 2)
    assert decoder(torch.randn(4, 5)).reconstruction.shape == (4, *shape)


@pytest.mark.parametrize("architecture", ["mlp", "skip_mlp", "conv", "residual"])
def test_every_output_depends_on_its_own_row_alone(architecture: str) -> None:
    networks = build(ArchitectureConfig(name=architecture), dimensions((1, 28, 28)))
    encoder, decoder = (network.double() for network in networks)
    x, z = torch.randn(3, 1, 28, 28, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(encoder(x).style_embedding[1:2], encoder(x[1:2]).style_embedding)
    torch.testing.assert_close(decoder(z).reconstruction[1:2], decoder(z[1:2]).reconstruction)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        ("conv", (1, 28, 28)),
        ("conv", (1, 32, 32)),
        ("residual", (1, 28, 28)),
        ("residual", (2, 9, 40)),
        ("series", (2, 333)),
    ],
)
def test_convolutions_see_and_paint_every_element(architecture: str, shape: tuple[int, ...]) -> None:
    encoder, decoder = build(ArchitectureConfig(name=architecture), dimensions(shape))
    x = torch.randn(8, *shape, requires_grad=True)
    encoder(x).embedding.sum().backward()
    assert bool((x.grad.abs().sum(0) > 0).all())
    image = decoder(torch.randn(8, 5)).reconstruction
    assert bool((image.std(0) > 0).all())


@pytest.mark.parametrize(
    ("architecture", "shape", "channels"),
    [
        ("residual", (1, 8, 8), [32]),
        ("residual", (1, 28, 28), [32, 64, 128]),
        ("residual", (1, 33, 8), [32, 64, 128, 256]),
        ("residual", (1, 256, 256), [32, 64, 128, 256, 256, 256]),
        ("series", (2, 16), [32]),
        ("series", (2, 1000), [32, 64, 128]),
    ],
)
def test_the_depth_follows_from_the_size(architecture: str, shape: tuple[int, ...], channels: list[int]) -> None:
    with torch.device("meta"):
        settings, dims = ArchitectureConfig(name=architecture), dimensions(shape)
        assert Plan(settings, dims).channels == tuple(channels)
        chosen = Plan(settings.model_copy(update={"hidden_dims": (24, 24)}), dims)
    assert chosen.channels == (24, 24)


@pytest.mark.parametrize(("architecture", "shape"), [("residual", (3, 20, 33)), ("series", (3, 70))])
def test_residual_networks_learn_with_every_weight_and_in_bfloat16(architecture: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = DMVAE(DMVAEConfig(input_dims={"a": shape}, architectures={"a": {"name": architecture}}))
    batch = Batch({"a": torch.randn(4, *shape)})
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model.zero_grad()
        with context:
            loss = model(batch).loss
        loss.backward()
        assert loss.dtype == torch.float32
        for name, parameter in model.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name


def test_images_are_convolved_in_the_channels_last_format() -> None:
    for network in build(ArchitectureConfig(name="residual"), dimensions((3, 20, 33))):
        kernels = [layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@pytest.mark.parametrize(
    ("settings", "dims", "message"),
    [
        ({"name": "residual"}, dimensions((1, 7, 30)), r"sides of 8 or more, got shape \(1, 7, 30\)"),
        ({"name": "residual"}, dimensions((3, 30)), r"\(channels, height, width\)"),
        ({"name": "residual"}, dimensions((1, 28, 28), classes=3), "categories"),
        ({"name": "residual", "hidden_dims": ()}, dimensions((1, 28, 28)), "at least one stage"),
        ({"name": "series"}, dimensions((30,)), r"\(channels, time\)"),
        ({"name": "transformer"}, dimensions((30,)), "categorical sequences"),
        ({"name": "transformer", "hidden_dims": (64, 32)}, dimensions((30,), 4), "all the same multiple of 16"),
        ({"name": "transformer", "hidden_dims": (24,)}, dimensions((30,), 4), "all the same multiple of 16"),
        ({"name": "transformer", "hidden_dims": ()}, dimensions((30,), 4), "all the same multiple of 16"),
    ],
)
def test_networks_refuse_shapes_and_widths_that_do_not_suit_them(
    settings: dict[str, Any], dims: Dimensions, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        architecture_of(ArchitectureConfig(**settings), dims, "a")


def test_attention_relates_places_however_far_apart() -> None:
    """A change of the first class changes what the last place contributes, which no convolution of five reaches."""
    torch.manual_seed(0)
    encoder, _ = build(ArchitectureConfig(name="transformer"), dimensions((60,), classes=4))
    x = torch.zeros(4, 60, dtype=torch.int64)
    x[1, 0], x[2, -1], x[3, 0], x[3, -1] = 1, 1, 1, 1
    neither, first, last, both = encoder.double()(x).embedding
    assert (both - first - last + neither).abs().max() > 1e-6


def test_the_conv_networks_are_those_of_the_paper() -> None:
    encoder, decoder = build(ArchitectureConfig(name="conv"), dimensions((3, 32, 32)))
    down = [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)]
    up = [layer for layer in decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in down] == [32, 64, 128, 256]
    assert [layer.in_channels for layer in up] == [256, 128, 64, 32]
    assert {(layer.kernel_size, layer.stride) for layer in down + up} == {((4, 4), (2, 2))}
    widths = [[m for m in network.modules() if isinstance(m, nn.Linear)] for network in (encoder, decoder)]
    assert widths[0][-1].in_features == widths[1][0].out_features == 512


def test_no_decoder_squashes_its_output() -> None:
    for architecture in ("mlp", "conv", "residual"):
        _, decoder = build(ArchitectureConfig(name=architecture), dimensions((1, 28, 28)))
        output = decoder(1000 * torch.randn(50, 5)).reconstruction
        assert output.min() < -3, architecture
        assert output.max() > 3, architecture


def test_a_perceptron_without_hidden_layers_is_one_linear_map() -> None:
    settings, dims = ArchitectureConfig(hidden_dims=()), dimensions((2, 3))
    for network in (MLPEncoder(settings, dims), MLPDecoder(settings, dims)):
        with_parameters = [module for module in network.modules() if list(module.parameters(recurse=False))]
        assert len(with_parameters) == 1
        assert isinstance(with_parameters[0], nn.Linear)
        assert not [module for module in network.modules() if isinstance(module, nn.ReLU)]
    decoder = MLPDecoder(settings, dims).double()
    left, right = torch.randn(2, 4, 5, dtype=torch.float64)
    middle = decoder((left + right) / 2).reconstruction
    torch.testing.assert_close(middle, (decoder(left).reconstruction + decoder(right).reconstruction) / 2)


def test_hidden_layers_have_the_configured_widths_and_the_decoder_mirrors_them() -> None:
    settings, dims = ArchitectureConfig(hidden_dims=(8, 4)), dimensions((6,))
    widths = [
        [(layer.in_features, layer.out_features) for layer in network.modules() if isinstance(layer, nn.Linear)]
        for network in (MLPEncoder(settings, dims), MLPDecoder(settings, dims))
    ]
    assert widths == [[(6, 8), (8, 4), (4, 10)], [(5, 4), (4, 8), (8, 6)]]


def test_categories_enter_one_hot() -> None:
    dims = dimensions((2,), classes=3)
    encoder = MLPEncoder(ArchitectureConfig(hidden_dims=()), dims)
    x = torch.tensor([[0, 2], [1, 1]])
    one_hot = torch.tensor([[1.0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]])
    of_floats = MLPEncoder(ArchitectureConfig(hidden_dims=()), dimensions((6,)))
    of_floats.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(x).embedding, of_floats(one_hot).embedding)
    assert MLPDecoder(ArchitectureConfig(), dims)(torch.zeros(4, 5)).reconstruction.shape == (4, 2, 3)


@pytest.mark.parametrize("architecture", ["mlp", "conv", "residual"])
def test_dropout_is_off_unless_asked_for(architecture: str) -> None:
    dims = dimensions((1, 28, 28))
    settings = ArchitectureConfig(name=architecture), ArchitectureConfig(name=architecture, dropout=0.4)
    for without, with_it in zip(*(build(setting, dims) for setting in settings), strict=True):
        assert not [m for m in without.modules() if isinstance(m, nn.Dropout)]
        assert {m.p for m in with_it.modules() if isinstance(m, nn.Dropout)} == {0.4}


def test_conv_refuses_widths_and_shapes_that_it_does_not_have() -> None:
    for settings, dims, message in (
        (ArchitectureConfig(name="conv", hidden_dims=(8,)), dimensions((1, 28, 28)), r"hidden_dims=\(8,\)"),
        (ArchitectureConfig(name="conv"), dimensions((1, 16, 16)), r"\(1, 16, 16\)"),
        (ArchitectureConfig(name="conv"), dimensions((784,)), r"\(784,\)"),
        (ArchitectureConfig(name="conv"), dimensions((1, 28, 28), classes=3), "categories"),
    ):
        with pytest.raises(ValueError, match=f"'conv' for modality 'image': .*{message}"):
            architecture_of(settings, dims, "image")


def test_a_registered_architecture_is_used_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Offset(MLPEncoder):
        pass

    register("offset", Offset, MLPDecoder)
    model = DMVAE(DMVAEConfig(input_dims={"a": (3,), "b": (2,)}, architectures={"a": {"name": "offset"}}))
    assert type(model.encoders["a"]) is Offset
    assert type(model.encoders["b"]) is MLPEncoder
    assert bool(model(Batch({"a": torch.zeros(2, 3)})).loss.isfinite())
    with pytest.raises(ValueError, match="'offset' is already registered"):
        register("offset", Offset, MLPDecoder)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'resnet' for modality 'a'\. Available: conv, mlp"):
        DMVAE(DMVAEConfig(input_dims={"a": (3,)}, architectures={"a": {"name": "resnet"}}))


def test_a_skip_connection_adds_a_linear_map_of_the_input_to_means() -> None:
    networks = build(ArchitectureConfig(name="skip_mlp", hidden_dims=(8, 4)), dimensions((6,)))
    encoder, decoder = (network.double() for network in networks)
    x, z = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    parts = encoder.heads.split(encoder.body(x))
    shared, private = (x @ encoder.skip.weight.T).split([3, 2], dim=1)
    output = encoder(x)
    torch.testing.assert_close(output.embedding, parts.embedding + shared)
    torch.testing.assert_close(output.style_embedding, parts.style_embedding + private)
    torch.testing.assert_close(output.log_covariance, parts.log_covariance)
    torch.testing.assert_close(output.style_log_covariance, parts.style_log_covariance)
    torch.testing.assert_close(decoder(z).reconstruction, decoder.body(z) + z @ decoder.skip.weight.T)
    assert [type(layer) for layer in encoder.body] == [nn.Linear, nn.LayerNorm, nn.SiLU] * 2
    assert [type(layer) for layer in decoder.body] == [nn.Linear, nn.SiLU] * 2 + [nn.Linear]


def test_without_hidden_layers_a_skip_connection_is_the_linear_map_itself() -> None:
    settings, dims = ArchitectureConfig(name="skip_mlp", hidden_dims=()), dimensions((6,))
    for place, plain in enumerate((MLPEncoder(settings, dims), MLPDecoder(settings, dims))):
        built = build(settings, dims)[place]
        assert {n: t.shape for n, t in built.state_dict().items()} == {
            n: t.shape for n, t in plain.state_dict().items()
        }


def test_values_that_are_not_standardised_give_finite_variances() -> None:
    encoder, _ = build(ArchitectureConfig(name="skip_mlp"), dimensions((6,)))
    output = encoder(1e6 * torch.randn(100, 6))
    assert float(output.log_covariance.detach().abs().max()) < 20
