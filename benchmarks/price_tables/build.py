"""Builds the measured GPU times of src/narrows/cost/data: kernels (gpu.zip), and collectives between hosts.

    python benchmarks/price_tables/build.py FOLDER

FOLDER holds the wide CSV tables (``gemm_bf16.csv``, ``mla_decode.csv``, ``moe_hopper.csv``, ...): keys, then one column
per size, in microseconds. The archive has one member per device and kernel, ``h200/mla_decode.csv``, so that a plan
parses only what it asks for. Where several backends measured a point, the least time is kept. Left out: expert tables
whose synthetic router sends all tokens to the same groups (``..._grouped``), whose times are those of half the experts.

gpu.zip is from the tables of NVIDIA AIConfigurator, collectives_hosts.csv from public pages (data/NOTICE).
``nodes`` in it are what a fast network connects: the 8 hosts of an NVLink domain are one node. The GPUs of one source
had no peer access, so that all of their traffic crossed the network: they are written as nodes of one GPU. Left out: a
pair of hosts that was set up badly, and one host, of which data/collectives.csv has more.

The same input gives the same bytes.
"""

from __future__ import annotations

import csv
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

TABLES = {
    "gemm_bf16": ("n", "k"),
    "gemm_fp8": ("n", "k"),
    "gemm_fp8_block": ("n", "k"),
    "mla_prefill": ("kv", "heads", "batch"),
    "mla_decode": ("kv", "heads", "batch"),
    "mla_bmm": ("op", "dtype", "heads"),
    "gqa_prefill": ("kv", "heads", "kv_heads", "batch"),
    "gqa_decode": ("kv", "heads", "kv_heads", "batch"),
    "moe_hopper": ("model", "dtype", "routing", "tp", "ep"),
    "moe_blackwell": ("model", "dtype", "routing", "tp", "ep"),
}
"""The keys kept of each table, after the device."""
MEMBERS = {"moe_hopper": "moe", "moe_blackwell": "moe"}
ROUTINGS = {"balanced", "power_law"}
DATA = Path(__file__).parents[2] / "src/narrows/cost/data"
TARGET = DATA / "gpu.zip"
HOSTS = DATA / "collectives_hosts.csv"
NETWORKS = {
    "8x400G-IB": "ib-400",
    "8x400G-RoCE": "roce-400",
    "8x400G-RoCE-no-p2p": "roce-400",
    "4x800G-RoCE": "roce-800",
    "NVLink-NVL72": "",
}
"""Our name of a network, of those tables that are kept; empty: NVLink."""
EPOCH = (2026, 8, 21, 0, 0, 0)


def main(folder: Path) -> None:
    members: dict[str, list[str]] = {}
    for table, keys in TABLES.items():
        rows: dict[str, dict[tuple[str, ...], dict[str, float]]] = defaultdict(dict)
        with (folder / f"{table}.csv").open() as lines:
            reader = csv.DictReader(lines)
            sizes = [name for name in reader.fieldnames or () if name.isdigit()]
            for row in reader:
                if row.get("routing", "balanced") not in ROUTINGS or row.get("dtype") == row.get("kv") == "fp8":
                    continue
                cells = rows[row["device"]].setdefault(tuple(row[key] for key in keys), {})
                for size in sizes:
                    if row[size]:
                        cells[size] = min(float(row[size]), cells.get(size, float("inf")))
        for device, found in rows.items():
            text = [",".join((*keys, *sizes))]
            for key, cells in sorted(found.items(), key=lambda item: [_sortable(part) for part in item[0]]):
                text.append(",".join((*key, *(f"{cells[size]:g}" if size in cells else "" for size in sizes))))
            members[f"{device}/{MEMBERS.get(table, table)}.csv"] = text
    with zipfile.ZipFile(TARGET, "w") as archive:
        for name, text in sorted(members.items()):
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, "\n".join(text) + "\n", compresslevel=9)
    print(f"{TARGET.name}: {len(members)} tables, {TARGET.stat().st_size} bytes")
    between_hosts(folder / "collectives_internode.csv")


def between_hosts(source: Path) -> None:
    """Write the collectives that were measured between hosts, or in an NVLink domain of several."""
    rows = []
    with source.open() as lines:
        for row in csv.DictReader(lines):
            network = NETWORKS.get(row["network"])
            if network is None:
                continue
            nodes = row["num_gpus"] if row["network"].endswith("no-p2p") else row["nodes"] if network else "1"
            rows.append(
                (row["device"], row["op"], row["num_gpus"], nodes, network, row["bytes"], f"{float(row['us']):g}")
            )
    text = [("device", "op", "num_gpus", "nodes", "network", "bytes", "us"), *rows]
    HOSTS.write_text("".join(f"{','.join(cells)}\n" for cells in text), encoding="ascii")
    print(f"{HOSTS.name}: {len(rows)} points, {HOSTS.stat().st_size} bytes")


def _sortable(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (0, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
