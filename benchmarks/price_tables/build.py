"""Builds src/narrows/cost/data/gpu.zip, the measured GPU kernel times, from the tables of NVIDIA AIConfigurator.

    python benchmarks/price_tables/build.py FOLDER

FOLDER holds the wide CSV tables (``gemm_bf16.csv``, ``mla_decode.csv``, ``moe_hopper.csv``, ...): keys, then one column
per size, in microseconds. The archive has one member per device and kernel, ``h200/mla_decode.csv``, so that a plan
parses only what it asks for. Where several backends measured a point, the least time is kept. Left out: expert tables
whose synthetic router sends all tokens to the same groups (``..._grouped``), whose times are those of half the experts.

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
TARGET = Path(__file__).parents[2] / "src/narrows/cost/data/gpu.zip"
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


def _sortable(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (0, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
