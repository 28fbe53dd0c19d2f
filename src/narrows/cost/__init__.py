"""What a step costs, in seconds, and how well that is known. No torch."""

from narrows.cost.attention import AttentionShape, attention_price
from narrows.cost.collectives import COLLECTIVES, collective_price
from narrows.cost.devices import DEVICES, CollectiveSource, Device, device
from narrows.cost.gemm import gemm_price, grouped_gemm_price
from narrows.cost.kernels import norm_price, stream_price
from narrows.cost.price import ZERO, Price, Source

__all__ = [
    "COLLECTIVES",
    "DEVICES",
    "ZERO",
    "AttentionShape",
    "CollectiveSource",
    "Device",
    "Price",
    "Source",
    "attention_price",
    "collective_price",
    "device",
    "gemm_price",
    "grouped_gemm_price",
    "norm_price",
    "stream_price",
]
