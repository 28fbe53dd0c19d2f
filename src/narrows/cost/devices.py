"""The devices that plans are priced for: peaks, bandwidths, efficiencies, and where each figure comes from.

Peaks are dense. Fitted figures are of one published profile (DeepSeek-V3 on H20), assumed ones say so, and only
``cpu-core`` was measured by this project. A measured machine is ``dataclasses.replace`` of one of these with its tables
(`profile`): prices are cached by the whole device, so it gets its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from narrows.cost.measured import DTYPES, Measured
from narrows.errors import ConfigError

__all__ = ["DEVICES", "DTYPES", "CollectiveSource", "Device", "device", "device_of_card"]

_GROUPS = ("peaks", "memory", "collectives", "gemm", "row work", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveSource:
    """Which measured collective times a device takes, and how they are changed. All of it unchanged: its own table."""

    table: str
    """Device name in ``data/collectives.csv``."""
    time_factor: float = 1.0
    """Times are multiplied by this."""
    byte_factor: float = 1.0
    """A link so many times slower takes for s bytes what the table's takes for ``s * byte_factor``: latency stays."""
    lender: str | None = None
    """The table that lends the curves (group sizes, backends) which ``table`` lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One rank's hardware. Rates are per second and nominal unless ``sources`` says achieved."""

    name: str
    title: str
    tflops_bf16: float
    tflops_fp8: float | None
    """None: the device has no FP8 arithmetic."""
    tflops_int8: float | None = None
    """None: int8 has no price on the device."""
    tflops_fp32: float
    """Vector FMA peak, which a float32 router GEMM runs at. From memory on every GPU: verify before quoting."""
    hbm_bytes_per_s: float
    memory_bytes: float
    """As the driver reports it (``nvidia-smi``: MiB), which is neither the name's GB nor all free: a process's context
    and buffers come out of it (:mod:`narrows.cost.memory`)."""
    link_bytes_per_s: float
    """To the other ranks, per direction, all links together."""
    num_links: int = 1
    """Links behind that figure, one per peer; 1: a switch, so that any group has all of it."""
    is_cpu: bool = False
    """What a rank's process takes, and how its kernels use memory, is a CPU's."""
    shared_memory: bool = False
    """Ranks read each other's memory: collectives cost copies at ``hbm_bytes_per_s`` and use no link."""
    fused_norm_bytes: int = 0
    """An all-reduce of up to so many bytes and the norm after it can be one step. 0 on GPUs: such kernels exist for a
    few MB, but this engine has none."""
    link_latency_s: float = 20e-6
    """Of one collective where no table gives it."""
    network: str = "roce-400"
    """What usually connects its nodes (:mod:`narrows.cost.network`)."""
    node_ranks: int | None = 8
    """How many of it the fast links connect: those of a host, or of an NVLink domain. None: it varies."""
    collectives: CollectiveSource | None = None
    """None: latency + traffic over the link."""
    gemm: str | None = None
    """Device name in ``data/gemm.csv``, for a device without ``kernels``; None: roofline."""
    kernels: str | None = None
    """Device name in ``data/gpu.zip``, whose products, attention and experts were measured over their sizes."""
    gemm_efficiency: float = 0.75
    """Of peak, and used only where no GEMM table is."""
    gemm_memory_efficiency: float = 0.60
    """Of memory bandwidth, for GEMMs of few rows: 42-78 % measured."""
    norm_plain_efficiency: float = 0.44
    norm_fused_efficiency: float = 0.75
    stream_efficiency: float = 0.75
    attention_efficiency: float = 0.55
    launch_s: float = 3e-6
    """Of a small kernel inside a CUDA graph."""
    gemm_launch_s: float = 5.7e-6
    """Of a GEMM priced by roofline; measured times include theirs."""
    measured: Measured | None = None
    """Tables of this very machine (:mod:`narrows.cost.profile`); what they lack is priced by the figures above."""
    sources: tuple[tuple[str, str], ...]
    """Where each group of figures comes from: (group, text)."""
    notes: str = ""

    def __hash__(self) -> int:
        """Of the name: prices are cached by device, and hashing thirty fields would cost more than finding a price."""
        return hash(self.name)

    def flops_per_s(self, dtype: str) -> float:
        """Peak rate for ``bf16`` (and ``int8-weight-only``, whose rows are bf16), ``fp8``, ``int8`` (and ``stored``,
        whose rows are int8, at the rate of ``bf16`` where ``int8`` has none) or ``fp32``.

        Raises:
            ConfigError: another dtype, or ``fp8`` or ``int8`` on a device without it.
        """
        if dtype not in DTYPES:
            raise ConfigError(f"no price for dtype {dtype!r}; there are {', '.join(DTYPES)}")
        peak = self._peak(dtype)
        if peak is None:
            able = ", ".join(name for name, other in DEVICES.items() if getattr(other, f"tflops_{dtype}") is not None)
            lacks = "has no fp8 arithmetic" if dtype == "fp8" else f"has no price for {dtype}"
            raise ConfigError(
                f"{self.name} ({self.title}) {lacks}; use bf16 ({self.tflops_bf16:g} TFLOP/s), "
                f"or a device that has it: {able}"
            )
        return peak * 1e12

    def has_rate(self, dtype: str) -> bool:
        """Whether products of ``dtype``, one of DTYPES, have a price here."""
        return self._peak(dtype) is not None

    def _peak(self, dtype: str) -> float | None:
        if dtype == "stored":
            return self.tflops_int8 or self.tflops_bf16
        peak: float | None = getattr(self, f"tflops_{'bf16' if dtype == 'int8-weight-only' else dtype}")
        return peak

    def source(self, group: str) -> str:
        """Where the figures of ``group`` come from: peaks, memory, collectives, gemm, row work or attention."""
        return dict(self.sources)[group]


def device(name: str) -> Device:
    """The device called ``name`` (lower case).

    Raises:
        ConfigError: no device has that name; the text lists those that there are.
    """
    try:
        return DEVICES[name]
    except KeyError:
        raise ConfigError(f"unknown device {name!r}; known devices: {', '.join(DEVICES)}") from None


_MIB = 1 << 20
_AIC = "NVIDIA AIConfigurator (Apache-2.0)"
_SMI = "nvidia-smi as users printed it"
_OWN_CURVES = f"measured with nccl-tests and a custom all-reduce kernel, {_AIC}"
_OWN_GEMMS = f"measured, 8 shapes of DeepSeek-V3 by 16 row counts, {_AIC}; others by the nearest shapes' efficiency"
_OWN_GRIDS = f"measured over 19 x 19 shapes by 14 row counts, {_AIC}; between them interpolated"
_OWN_ATTENTION = f"measured over heads, batch and length, {_AIC}; between them interpolated"
_H20_FIT = "efficiencies and launch fitted to the published H20 profile"
_FP32 = "FP32 vector peak from memory"


def _sources(
    peaks: str, memory: str, collectives: str, gemm: str, row_work: str, attention: str
) -> tuple[tuple[str, str], ...]:
    return tuple(zip(_GROUPS, (peaks, memory, collectives, gemm, row_work, attention), strict=True))


_H20_COLLECTIVES = (
    "H100's times / 0.888: what collectives reach of nccl-tests inside an engine, fitted to the H20 profile"
)
_H20_GEMM = "roofline at 97 % of nominal, fitted to the published H20 profile, + 5.7 us"
_H20_ATTENTION = "assumed 85 % of bf16 peak: memory feeds this chip 6.7 times better per FLOP than an H100"

_H20 = Device(
    name="h20",
    title="NVIDIA H20 96 GB",
    tflops_bf16=148,
    tflops_fp8=296,
    tflops_fp32=44,
    hbm_bytes_per_s=4.0e12,
    memory_bytes=97_871 * _MIB,
    link_bytes_per_s=450e9,
    collectives=CollectiveSource(table="h100", time_factor=1 / 0.888),
    gemm_efficiency=0.97,
    attention_efficiency=0.85,
    sources=_sources(f"vendor; {_FP32}", f"vendor; {_SMI}", _H20_COLLECTIVES, _H20_GEMM, _H20_FIT, _H20_ATTENTION),
    notes="The device of the published profile. Its links are as fast as an H100's; its collectives were not measured. "
    "Its network varies by cloud, from 25 to 50 GB/s per GPU; the faster is taken.",
)

_H20_3E = Device(
    name="h20-3e",
    title="NVIDIA H20-3e 141 GB",
    tflops_bf16=148,
    tflops_fp8=296,
    tflops_fp32=44,
    hbm_bytes_per_s=4.8e12,
    memory_bytes=143_771 * _MIB,
    link_bytes_per_s=450e9,
    collectives=CollectiveSource(table="h100", time_factor=1 / 0.888),
    gemm_efficiency=0.97,
    attention_efficiency=0.85,
    sources=_sources(
        "from memory",
        "bandwidth from memory; taken to hold what an H200 does",
        _H20_COLLECTIVES,
        _H20_GEMM,
        _H20_FIT,
        _H20_ATTENTION,
    ),
    notes="As the H20, with HBM3e.",
)

_H100 = Device(
    name="h100",
    title="NVIDIA H100 SXM 80 GB",
    tflops_bf16=989,
    tflops_fp8=1979,
    tflops_fp32=67,
    hbm_bytes_per_s=3.35e12,
    memory_bytes=81_559 * _MIB,
    link_bytes_per_s=450e9,
    network="ib-400",
    collectives=CollectiveSource(table="h100"),
    kernels="h100",
    attention_efficiency=0.60,
    sources=_sources(f"{_AIC}; {_FP32}", f"{_AIC}; {_SMI}", _OWN_CURVES, _OWN_GRIDS, _H20_FIT, _OWN_ATTENTION),
)

_H200 = Device(
    name="h200",
    title="NVIDIA H200 SXM 141 GB",
    tflops_bf16=989,
    tflops_fp8=1979,
    tflops_fp32=67,
    hbm_bytes_per_s=4.8e12,
    memory_bytes=143_771 * _MIB,
    link_bytes_per_s=450e9,
    network="ib-400",
    collectives=CollectiveSource(table="h200"),
    kernels="h200",
    attention_efficiency=0.60,
    sources=_sources(f"{_AIC}; {_FP32}", f"{_AIC}; {_SMI}", _OWN_CURVES, _OWN_GRIDS, _H20_FIT, _OWN_ATTENTION),
)

_H800 = Device(
    name="h800",
    title="NVIDIA H800 SXM 80 GB",
    tflops_bf16=989,
    tflops_fp8=1979,
    tflops_fp32=67,
    hbm_bytes_per_s=3.35e12,
    memory_bytes=81_559 * _MIB,
    link_bytes_per_s=200e9,
    network="ib-400",
    # Chosen so that an all-reduce of 512 MiB among 8 has a bus bandwidth (2 x 7/8 x bytes / time) of 215 GB/s.
    collectives=CollectiveSource(table="h100", byte_factor=2.187),
    kernels="h100",
    attention_efficiency=0.60,
    sources=_sources(
        f"vendor; {_FP32}",
        f"vendor; {_SMI} of an H100, the same memory",
        "H100's curves with the bus slowed to the published 215 GB/s (large all-reduce among 8), same latency",
        "the same chip as the H100, whose table is taken",
        _H20_FIT,
        f"the H100's: {_OWN_ATTENTION}",
    ),
    notes="215 GB/s is 107 % of the 200 GB/s link: an all-reduce that is summed in the switch sends less than a ring.",
)

_A100 = Device(
    name="a100",
    title="NVIDIA A100 SXM 80 GB",
    tflops_bf16=312,
    tflops_fp8=None,
    tflops_fp32=19.5,
    hbm_bytes_per_s=2.04e12,
    memory_bytes=81_920 * _MIB,
    link_bytes_per_s=300e9,
    network="ib-200",
    collectives=CollectiveSource(table="a100"),
    kernels="a100",
    attention_efficiency=0.60,
    sources=_sources(
        f"{_AIC}; {_FP32}",
        f"{_AIC}; {_SMI}",
        _OWN_CURVES,
        _OWN_GRIDS,
        _H20_FIT,
        f"prefill and latent attention: {_OWN_ATTENTION}; grouped-query decode: assumed 60 % of bf16 peak",
    ),
)

_B200 = Device(
    name="b200",
    title="NVIDIA B200 SXM 180 GB",
    tflops_bf16=2250,
    tflops_fp8=4500,
    tflops_fp32=80,
    hbm_bytes_per_s=7.7e12,
    memory_bytes=183_359 * _MIB,
    link_bytes_per_s=900e9,
    network="ib-400",
    collectives=CollectiveSource(table="b200"),
    kernels="b200",
    attention_efficiency=0.50,
    sources=_sources(f"{_AIC}; {_FP32}", f"{_AIC}; {_SMI}", _OWN_CURVES, _OWN_GRIDS, _H20_FIT, _OWN_ATTENTION),
    notes="Boxes have 400 or 800 Gb/s of network per GPU; the slower is taken.",
)

_GB200 = Device(
    name="gb200",
    title="NVIDIA GB200 185 GB",
    tflops_bf16=2500,
    tflops_fp8=5000,
    tflops_fp32=80,
    hbm_bytes_per_s=8.0e12,
    memory_bytes=189_471 * _MIB,
    link_bytes_per_s=900e9,
    network="ib-800",
    node_ranks=72,
    collectives=CollectiveSource(table="gb200", lender="b200"),
    kernels="gb200",
    attention_efficiency=0.50,
    sources=_sources(
        f"{_AIC}; {_FP32}",
        f"{_AIC}, its size too",
        f"2 and 4 GPUs: nccl-tests, {_AIC}; 8 GPUs, and the custom all-reduce kernel: B200's curves; gathers of more: "
        "32 GPUs of one NVLink domain, Google's A4X page",
        _OWN_GRIDS,
        _H20_FIT,
        _OWN_ATTENTION,
    ),
)

_L40S = Device(
    name="l40s",
    title="NVIDIA L40S 48 GB",
    tflops_bf16=362,
    tflops_fp8=733,
    tflops_fp32=91.6,
    hbm_bytes_per_s=0.864e12,
    memory_bytes=46_068 * _MIB,
    link_bytes_per_s=32e9,
    network="ethernet-100",
    collectives=CollectiveSource(table="l40s"),
    gemm="l40s",
    attention_efficiency=0.50,
    sources=_sources(
        f"{_AIC}; {_FP32}",
        f"{_AIC}; {_SMI}",
        f"measured with nccl-tests over PCIe 4, {_AIC}; no custom kernel",
        _OWN_GEMMS,
        _H20_FIT,
        "assumed 50 % of bf16 peak",
    ),
)

_MI300X = Device(
    name="mi300x",
    title="AMD Instinct MI300X 192 GB",
    tflops_bf16=1307,
    tflops_fp8=2615,
    tflops_fp32=163.4,
    hbm_bytes_per_s=5.3e12,
    memory_bytes=206_141_652_992,
    link_bytes_per_s=7 * 48e9,
    num_links=7,
    link_latency_s=25e-6,
    gemm_efficiency=0.55,
    attention_efficiency=0.40,
    sources=_sources(
        "from memory",
        "vendor; rocm-smi as users printed it",
        "roofline: 7 links of about 48 usable GB/s (vendor), one to each peer; 25 us latency assumed",
        "roofline at an assumed 55 % of peak",
        f"{_H20_FIT}, taken over",
        "assumed 40 % of bf16 peak",
    ),
    notes="A group of n ranks uses n - 1 of the 7 links: 2 ranks have 48 GB/s.",
)


def _xeon(name: str, title: str, bf16: float, fp32: float, memory: float, link: float) -> Device:
    """One socket as one rank; everything about it is from memory or assumed."""
    return Device(
        name=name,
        title=title,
        tflops_bf16=bf16,
        tflops_fp8=None,
        tflops_fp32=fp32,
        hbm_bytes_per_s=memory,
        memory_bytes=512e9,
        is_cpu=True,
        link_bytes_per_s=link,
        network="ethernet-100",
        node_ranks=None,
        gemm_efficiency=0.70,
        attention_efficiency=0.30,
        launch_s=10e-6,
        gemm_launch_s=10e-6,
        sources=_sources(
            "AMX bf16, the middle of the range given, from memory; FP32 is AVX-512 at its sustained clock, from memory",
            "bandwidth from memory; 512 GB a socket assumed",
            "roofline: UPI at about 70 % of nominal, from memory; 20 us latency assumed",
            "roofline at an assumed 70 % of peak; 10 us launch assumed",
            f"{_H20_FIT}, taken over; 10 us launch assumed",
            "assumed 30 % of bf16 peak",
        ),
        notes="One rank is one socket. No FP8; int8 runs at twice the bf16 rate and has no price here.",
    )


_CPU_CORE = Device(
    name="cpu-core",
    title="one core of a Xeon with AMX",
    tflops_bf16=1.1,
    tflops_fp8=None,
    tflops_int8=2.2,
    tflops_fp32=0.15,
    hbm_bytes_per_s=10e9,
    memory_bytes=12e9,
    is_cpu=True,
    link_bytes_per_s=10e9,
    network="ethernet-10",
    node_ranks=None,
    shared_memory=True,
    fused_norm_bytes=1 << 15,
    link_latency_s=40e-6,
    gemm_efficiency=1.0,
    gemm_memory_efficiency=0.80,
    stream_efficiency=0.90,
    attention_efficiency=0.30,
    launch_s=10e-6,
    gemm_launch_s=10e-6,
    sources=_sources(
        "achieved, not nominal: 2048 x 4096 x 1024 bf16 in torch on one core; int8 assumed twice it; FP32 from memory",
        "achieved by reads of 256 MiB on one core of a shared machine; 24 GB between 2 cores",
        "copies between ranks at that rate + 40 us, both from one machine; the collectives were not timed",
        "roofline at the achieved rates; 5.9-9.5 GB/s measured for one row, so 80 %; 10 us launch assumed",
        f"{_H20_FIT}, taken over; copies measured at 9.5 GB/s; 10 us launch assumed",
        "assumed 30 % of the achieved bf16 rate",
    ),
    notes="One rank is one core, as thread and process ranks run. GEMM and memory rates moved several-fold in an hour.",
)

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        found.name: found
        for found in (
            _H20,
            _H20_3E,
            _H100,
            _H200,
            _H800,
            _A100,
            _B200,
            _GB200,
            _L40S,
            _MI300X,
            _xeon("xeon-8480", "Intel Xeon Platinum 8480+, one socket", 132, 7.2, 0.307e12, 130e9),
            _xeon("xeon-8592", "Intel Xeon Platinum 8592+, one socket", 150, 8.2, 0.358e12, 165e9),
            _xeon("xeon-6980p", "Intel Xeon 6980P, one socket", 260, 16.4, 0.614e12, 300e9),
            _CPU_CORE,
        )
    }
)
"""Every known device by name."""


def device_of_card(card: str) -> str | None:
    """The name here of a GPU that its driver calls ``card``; None for one without prices.

    >>> [device_of_card(card) for card in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H20-3e", "T4")]
    ['h100', 'a100', 'h20-3e', None]
    """
    for word in card.lower().split():
        for name in (word, word.partition("-")[0]):
            if name in DEVICES:
                return name
    return None
