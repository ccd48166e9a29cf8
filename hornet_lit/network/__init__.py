"""The network: gnConv, its filters, HorNet and its variants (registered with timm on import), and weight files."""

from hornet_lit.network import variants as variants
from hornet_lit.network.block import Block
from hornet_lit.network.filters import DepthwiseConv, GlobalLocalFilter
from hornet_lit.network.gnconv import GnConv
from hornet_lit.network.hornet import HorNet
from hornet_lit.network.weights import WeightsReport, load_weights

__all__ = ["Block", "DepthwiseConv", "GlobalLocalFilter", "GnConv", "HorNet", "WeightsReport", "load_weights"]
