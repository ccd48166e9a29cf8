"""What timm's users rely on, and what gnConv computes, for every registered variant that is quick enough."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from hornet_lit.bench import held_bytes
from hornet_lit.network import DepthwiseConv, GnConv, HorNet, fused, layers
from hornet_lit.network.layers import StridedConv
from tests.conftest import images

SMALL = ["hornet_femto_32", "hornet_pico_32", "hornet_nano_32", "hornet_nano_gf_32"]


def small(name: str = "hornet_pico_32", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, ls_init_value=0.5, **kwargs).eval()


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_gnconv_is_the_recursion_of_the_paper(order: int) -> None:
    torch.manual_seed(order)
    mixer = GnConv(32, order=order, filter=partial(DepthwiseConv, scale=1 / 3), size=(9, 11)).double()
    x_BCHW = torch.randn(2, 32, 9, 11, dtype=torch.double)
    widths = [32 // 2 ** (order - 1 - k) for k in range(order)]
    p, *q = mixer.proj_in(x_BCHW).split([widths[0], *widths], dim=1)
    kernel, bias = mixer.dwconv.weight.split(widths), mixer.dwconv.bias.split(widths)
    for k in range(order):
        f_q = nn.functional.conv2d(q[k], kernel[k], bias[k], padding=3, groups=widths[k])
        g_p = p if k == 0 else mixer.pws[k - 1](p)
        p = f_q * g_p / 3
    torch.testing.assert_close(mixer(x_BCHW), mixer.proj_out(p))


def test_gnconv_takes_any_filter_that_keeps_the_map() -> None:
    mixer = GnConv(16, order=3, filter=lambda channels, size: nn.AvgPool2d(3, 1, 1), size=(8, 8))
    assert mixer(torch.randn(2, 16, 8, 8)).shape == (2, 16, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_no_stage_of_a_small_network_shrinks_to_one_pixel(name: str) -> None:
    shapes = [f.shape[-2:] for f in timm.create_model(name, features_only=True)(images(0, 1, 3, 32, 32))]
    assert len(shapes) == (3 if "femto" in name else 4) and min(shapes[-1]) >= 2, shapes


@pytest.mark.parametrize("name", ["hornet_tiny_7x7", "hornet_tiny_gf", *SMALL])
def test_features_only_reduces_as_it_says(name: str) -> None:
    network = timm.create_model(name, features_only=True, out_indices=(0, -1))
    side = network.feature_info.reduction()[-1] * 2
    maps = network(images(0, 1, 3, side, side + side // 2))
    for m, channels, reduction in zip(
        maps, network.feature_info.channels(), network.feature_info.reduction(), strict=True
    ):
        assert m.shape == (1, channels, side // reduction, (side + side // 2) // reduction)


def test_intermediates_are_those_of_the_forward_pass() -> None:
    network, x_BCHW = small(), images(0, 2, 3, 32, 32)
    final, maps = network.forward_intermediates(x_BCHW)
    torch.testing.assert_close(final, network.forward_features(x_BCHW))
    torch.testing.assert_close(maps[-1], final)
    torch.testing.assert_close(network.forward_head(final), network(x_BCHW))
    (normed,) = network.forward_intermediates(x_BCHW, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed, network._norm_last(final))
    pruned = small()
    assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    torch.testing.assert_close(pruned.forward_intermediates(x_BCHW, [1], intermediates_only=True)[0], maps[1])


def test_head_can_be_replaced_and_left_out() -> None:
    network, x_BCHW = small(), images(0, 2, 3, 32, 32)
    assert network.get_classifier() is network.head
    pre_logits = network.forward_head(network.forward_features(x_BCHW), pre_logits=True)
    assert pre_logits.shape == (2, network.num_features) == (2, network.head_hidden_size)
    network.reset_classifier(0)
    torch.testing.assert_close(network(x_BCHW), pre_logits)
    network.reset_classifier(7, global_pool="max")
    assert network(x_BCHW).shape == (2, 7)
    network.reset_classifier(7, global_pool="")
    assert network(x_BCHW).shape == (2, 7, 2, 2)


@pytest.mark.parametrize("name", ["hornet_pico_32", "hornet_nano_gf_32"])
def test_bfloat16_parameters_and_autocast(name: str) -> None:
    network, x_BCHW = small(name), images(0, 2, 3, 32, 40)
    exact = network(x_BCHW)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x_BCHW).float(), exact, rtol=0.05, atol=0.05)
    network.bfloat16().train()
    logits = network(x_BCHW.bfloat16())
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("mixed", [False, True])
def test_convolutions_between_stages_on_cpus_without_bfloat16(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MULTIPLIES_BFLOAT16", False)
    dtype = torch.float32 if mixed else torch.bfloat16
    conv, x_BCHW = StridedConv(6, 12, 2, stride=2).to(dtype), images(0, 3, 6, 8, 8).to(dtype)
    types, own = [], StridedConv._conv_forward
    monkeypatch.setattr(
        StridedConv, "_conv_forward", lambda self, x, *others: types.append(x.dtype) or own(self, x, *others)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y_BCHW = conv(x_BCHW)
    exact_BCHW = F.conv2d(x_BCHW.float(), conv.weight.float(), conv.bias.float(), stride=2)
    assert torch.equal(y_BCHW, exact_BCHW.bfloat16()) and types == [torch.float32]
    y_BCHW.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in conv.parameters())
    if not mixed:
        with pytest.raises(RuntimeError, match="type"):
            conv.float()(x_BCHW)


@pytest.mark.parametrize("name", ["hornet_pico_32", "hornet_nano_gf_32"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_changes_nothing_and_stays_channels_last_inside(name: str, layout: torch.memory_format) -> None:
    network, x_BCHW = small(name), images(0, 2, 3, 32, 32)
    torch.testing.assert_close(network(x_BCHW.contiguous(memory_format=layout)), network(x_BCHW), rtol=1e-4, atol=1e-5)
    for m in network.forward_intermediates(x_BCHW, intermediates_only=True):
        assert m.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["hornet_pico_32", "hornet_nano_gf_32"])
@pytest.mark.parametrize("by_kernels", [False, True])
def test_keeping_less_gives_the_same_gradients(name: str, by_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_kernels:
        monkeypatch.setattr(fused, "_built", lambda low: False)
    network, x_BCHW = small(name, drop_path_rate=0.5).train(), images(0, 2, 3, 32, 32)
    kept, grads = [], []
    for recompute, checkpointed in ((False, False), (True, False), (True, [0, 1]), (True, True)):
        network.set_recompute(recompute)
        network.set_grad_checkpointing(checkpointed)
        network.zero_grad()
        torch.manual_seed(1)
        logits_BK, held = held_bytes(lambda: network(x_BCHW))
        logits_BK.square().sum().backward()
        grads.append([p.grad.clone() for p in network.parameters()])
        kept.append(held)
    for others in grads[1:]:
        for a, b in zip(grads[0], others, strict=True):
            torch.testing.assert_close(a, b)
    assert kept[1] <= (1 if fused._built(False) else 0.75) * kept[0] and kept[1] > kept[2] > kept[3], kept


def test_what_a_hook_keeps_is_not_overwritten() -> None:
    network, x_BCHW = small(), images(0, 2, 3, 32, 32)
    kept = []
    handle = network.stages[0][0].pwconv1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        logits_BK = network(x_BCHW)
    with torch.enable_grad():  # never in place
        network(x_BCHW)
    torch.testing.assert_close(*kept)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(network(x_BCHW), logits_BK)


def test_a_stage_that_is_not_there_cannot_be_checkpointed() -> None:
    with pytest.raises(ValueError, match="names stage 4: stages are 0 to 3"):
        small().set_grad_checkpointing([0, 4])


@pytest.mark.parametrize("name", ["hornet_pico_32", "hornet_nano_gf_32"])
def test_export_and_compile(name: str) -> None:
    network, x_BCHW = small(name, depths=(1, 1, 2, 1)), images(0, 2, 3, 32, 32)  # every block takes a second
    exported = torch.export.export(network, (x_BCHW,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(exported.module()(images(1, 3, 3, 32, 32)), network(images(1, 3, 3, 32, 32)))
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_BCHW), network(x_BCHW))


def test_create_model_options() -> None:
    network = timm.create_model("hornet_tiny_gf", num_classes=10, in_chans=1, img_size=96, drop_path_rate=0.3)
    assert network(images(0, 1, 1, 96, 96)).shape == (1, 10)
    assert network.stages[2][0].gnconv.dwconv.complex_weight.shape[1:3] == (6, 4)
    rates = [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]
    blocks = sum(len(stage) for stage in network.stages)
    assert rates == pytest.approx([0.3 * i / (blocks - 1) for i in range(1, blocks)])
    assert network.pretrained_cfg["classifier"] == "head" and network.pretrained_cfg["first_conv"] in dict(
        network.named_modules()
    )


@pytest.mark.parametrize(
    "options,message",
    [
        ({"output_stride": 16}, "output_stride must be 32"),
        ({"global_pool": "fast"}, "global_pool must be one of"),
        ({"stem_stride": 3}, "stem_stride must be 1, 2 or 4"),
        ({"img_size": 16}, "at least 32"),
        ({"depths": (1,) * 5}, "1 to 4 stages"),
    ],
)
def test_impossible_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("hornet_tiny_7x7", **options)


def test_impossible_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\), got \(2, 1, 32, 32\)"):
        small()(images(0, 2, 1, 32, 32))
    with pytest.raises(ValueError, match="at least 16×16"):
        small()(images(0, 2, 3, 32, 15))
    with pytest.raises(ValueError, match="multiple of 16"):
        GnConv(24, order=5, filter=DepthwiseConv, size=(7, 7))
    with pytest.raises(ValueError, match="use 7"):
        DepthwiseConv(8, kernel_size=6)


def test_group_matcher_covers_every_parameter_with_any_depth() -> None:
    from timm.models import group_parameters

    for name in ("hornet_pico_32", "hornet_tiny_gf"):
        network = timm.create_model(name)
        layers = group_parameters(network, network.group_matcher(), reverse=True)
        assert layers.keys() == {n for n, _ in network.named_parameters()}
        assert set(layers.values()) == set(range(max(layers.values()) + 1))
        assert layers["head.weight"] == layers["norm.bias"] == max(layers.values())


def test_multiply_adds_of_gnconv_match_the_papers_formula() -> None:
    """HorNet §3.1: HW (2C² + K² (2C - C_0) + Σ C_{k-1} C_k + C²), counted by torch, which leaves the gates out."""
    from torch.utils.flop_counter import FlopCounterMode

    c, order, side = 64, 4, 14
    mixer = GnConv(c, order=order, filter=DepthwiseConv, size=(side, side))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.randn(1, c, side, side))
    widths = [c // 2 ** (order - 1 - k) for k in range(order)]
    convolutions = 2 * c * c + 49 * (2 * c - widths[0]) + c * c
    expected = side * side * (convolutions + sum(a * b for a, b in pairwise(widths)))
    assert counter.get_total_flops() == 2 * expected


def test_hornet_needs_its_mixers() -> None:
    with pytest.raises(TypeError, match="mixers"):
        HorNet()
