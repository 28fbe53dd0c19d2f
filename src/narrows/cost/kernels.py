"""Prices what is not a GEMM and not a collective: norms, element-wise work, the attention core.

Each is a roofline with an efficiency that was fitted or assumed, never measured on that device, so every
price here says ``roofline``. The norm efficiencies are fitted to the published H20 profile and taken over for the other
devices; an attention efficiency is a stated assumption (see ``Device.sources``).
"""

from __future__ import annotations

from narrows.cost.devices import Device
from narrows.cost.price import ZERO, Price, Source

__all__ = ["attention_roofline", "norm_price", "stream_price"]


def norm_price(device: Device, nbytes: float, *, fused: bool) -> Price:
    """One RMSNorm: bytes / (HBM bandwidth x efficiency) + launch.

    ``nbytes`` is what the kernel moves, read and written: 2 tensors for a plain norm, 4 for a fused add + norm (hidden
    and residual in, both out). The fused kernel reaches 75 % of the bandwidth, the plain one 44 %: at equal width the
    fused one moves twice as much in about the same time. The norms of the latents count as ``fused``.
    """
    efficiency = device.norm_fused_efficiency if fused else device.norm_plain_efficiency
    return _memory_price(device, nbytes, efficiency)


def stream_price(device: Device, nbytes: float) -> Price:
    """One element-wise or copying kernel (add, copy, slice, SiLU x gate, quantise): bytes / bandwidth + launch.

    ``nbytes`` is what it moves, read and written.
    """
    return _memory_price(device, nbytes, device.stream_efficiency)


def attention_roofline(device: Device, *, flops: float, kv_bytes: float, dtype: str) -> Price:
    """The attention core of one layer: the larger of compute and the reading of keys and values, + launch.

    ``flops`` are the multiplies and adds of this rank (2 per multiply-accumulate, masked positions left out),
    ``kv_bytes`` what it reads of the cache. ``dtype`` is that of the cache; only ``fp32`` changes the rate, because
    kernels over an FP8 cache compute in bf16.
    """
    assert flops >= 0 and kv_bytes >= 0, f"attention of {flops} flops over {kv_bytes} bytes"
    if flops == 0 and kv_bytes == 0:
        return ZERO
    rate = device.flops_per_s("fp32" if dtype == "fp32" else "bf16") * device.attention_efficiency
    bandwidth = device.hbm_bytes_per_s * device.stream_efficiency
    return Price(max(flops / rate, kv_bytes / bandwidth) + device.launch_s, Source.ROOFLINE)


def _memory_price(device: Device, nbytes: float, efficiency: float) -> Price:
    assert nbytes >= 0, f"a kernel that moves {nbytes} bytes"
    if nbytes == 0:
        return ZERO
    return Price(nbytes / (device.hbm_bytes_per_s * efficiency) + device.launch_s, Source.ROOFLINE)
