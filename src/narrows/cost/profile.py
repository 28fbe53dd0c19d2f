"""Profiles: a machine's prices in a file, whoever wrote it. Reads, checks and writes them (format: docs/profiles.md).

Knows devices, measured tables and JSON. A profile names what it was made for (a :class:`Setting`); who runs ranks
refuses one that is of another machine or version, who only plans may take any.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from narrows.arch.stages import AttentionCore, Gemm, GroupedGemm, Norm, PriceClass, Stream, Work
from narrows.cost.collectives import COLLECTIVES
from narrows.cost.devices import DEVICES, Device, device
from narrows.cost.here import Setting, here
from narrows.cost.measured import AXES, REDUCE_NORM, CollectivePoints, Measured, StagePoint, StagePoints, StepPoints
from narrows.errors import ConfigError

__all__ = [
    "MEASURED_OPS",
    "Profile",
    "device_here",
    "find_device",
    "is_profile",
    "kept_profile",
    "profiles_folder",
    "read_profile",
    "write_profile",
]

VERSION = 1
MEASURED_OPS = (*COLLECTIVES, "column_gather", REDUCE_NORM)
_FOLDER_VARIABLE = "NARROWS_PROFILES"
_WORKS: Mapping[str, type[Work]] = {
    "gemm": Gemm,
    "grouped_gemm": GroupedGemm,
    "norm": Norm,
    "stream": Stream,
    "attention": AttentionCore,
}
_NAMES = {kind: name for name, kind in _WORKS.items()}
_DEVICE_FIELDS = frozenset(
    each.name
    for each in fields(Device)
    if each.name not in ("name", "title", "sources", "notes", "collectives", "gemm", "measured")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A device with measured prices, and what it was made for. ``made``: date, command, models; for people."""

    device: Device
    fits: Setting
    made: Mapping[str, Any] = field(default_factory=dict)
    like: str = "cpu-core"
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the device that differ from those of ``like``."""

    def said(self, file: str) -> str:
        """What prices are, in one line, where they are of this profile."""
        return f"prices: the profile {file}, made {self.made.get('date', 'at an unknown date')}"


def profiles_folder() -> Path:
    """Where this user's profiles are kept: $NARROWS_PROFILES, else narrows/profiles among the user's data."""
    if folder := os.environ.get(_FOLDER_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "narrows" / "profiles"


def kept_profile(setting: Setting, *, whatever: Collection[str] = ()) -> tuple[str, Profile | None, list[str]]:
    """The profile among this user's that fits ``setting`` and leaves least open, and its file's name; or why those for
    as many ranks do not fit. ``whatever``: fields of the setting that may differ."""
    fitting, refused = [], []
    for path in sorted(profiles_folder().glob("*.json")):
        try:
            profile = read_profile(path)
        except ConfigError as error:
            refused.append(f"not used: {error}")
            continue
        misfit = profile.fits.misfit(setting, whatever=whatever)
        if not misfit:
            fitting.append((len(profile.fits.document()), path.name, profile))
        elif profile.fits.ranks == setting.ranks and ("world" in whatever or profile.fits.world == setting.world):
            refused.append(f"the profile {path.name} is not used: {misfit}")
    if not fitting:
        return "", None, refused
    _, file, best = max(fitting, key=lambda one: one[:2])
    return file, best, []


def device_here(num_ranks: int) -> tuple[Device, str]:
    """The device of this machine's profile for so many ranks, however they exchange; and what it is, in words.

    Raises:
        ConfigError: there is none.
    """
    setting = here(ranks=num_ranks, threads=1, world="")
    file, profile, refused = kept_profile(setting, whatever=("threads", "world", "card"))
    if profile is None:
        told = (
            "; ".join(refused) or f"there is no profile of this machine for {num_ranks} rank(s) in {profiles_folder()}"
        )
        raise ConfigError(f"{told}; make one with: narrows calibrate --ranks {num_ranks}, or name a --device")
    return profile.device, profile.said(file)


def is_profile(name: str) -> bool:
    """Whether a device is named by a file."""
    return name.endswith(".json") or os.sep in name


def find_device(name: str) -> Device:
    """The device of the catalogue called ``name``, or that of the profile in the file of that name.

    Raises:
        ConfigError: there is none, or the file is not a profile.
    """
    return read_profile(Path(name)).device if is_profile(name) else device(name)


def write_profile(path: Path, profile: Profile) -> None:
    """Write ``profile`` to ``path``, whose folder is made where it is not there.

    Raises:
        ConfigError: it cannot be written.
    """
    measured = profile.device.measured or Measured()
    document = {
        "narrows_profile": VERSION,
        "name": profile.device.name,
        "title": profile.device.title,
        "fits": profile.fits.document(),
        "made": dict(profile.made),
        "device": {"like": profile.like, **profile.figures},
        "stages": [_stage_document(each) for each in measured.stages],
        "collectives": [
            {
                "op": c.op,
                "ranks": c.num_ranks,
                "axis": c.axis,
                **({"phase": c.phase} if c.phase else {}),
                "points": _rows(c.points, c.spreads),
            }
            for c in measured.collectives
        ],
        "copies": _rows(measured.copies, ()),
        "steps": [{"phase": each.phase, "points": _rows(each.points, each.spreads)} for each in measured.steps],
    }
    lists = ("stages", "collectives", "steps")
    head = {name: value for name, value in document.items() if name not in lists}
    text = json.dumps(head, indent=1)[:-2]
    for name in lists:  # a line for each table, so that a person can read and compare files
        lines = ",\n  ".join(json.dumps(each) for each in document[name])  # type: ignore[attr-defined]
        text += f',\n "{name}": [\n  {lines}\n ]'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the profile cannot be written to {path}: {error.strerror}") from None


def read_profile(path: Path) -> Profile:
    """The profile in ``path``.

    Raises:
        ConfigError: it cannot be read, or is no profile that this narrows understands; the text says what is wrong.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; make a profile with: narrows calibrate") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or "narrows_profile" not in document:
        raise ConfigError(f"{path} is not a profile; make one with: narrows calibrate (format: docs/profiles.md)")
    if document["narrows_profile"] != VERSION:
        raise ConfigError(
            f"{path} is a profile of version {document['narrows_profile']}, and this narrows reads version {VERSION}; "
            "make it anew with: narrows calibrate"
        )
    try:
        return _profile(document, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path} is not a whole profile: {what} (format: docs/profiles.md)") from None


def _profile(document: Mapping[str, Any], stem: str) -> Profile:
    given = dict(document.get("device", {}))
    like = given.pop("like", "cpu-core")
    if like not in DEVICES:
        raise ConfigError(f"device.like is {like!r}; known devices: {', '.join(DEVICES)}")
    if unknown := set(given) - _DEVICE_FIELDS:
        raise ConfigError(f"device has no field {sorted(unknown)[0]!r}; fields: {', '.join(sorted(_DEVICE_FIELDS))}")
    for name, value in given.items():
        if not isinstance(value, int | float) and value is not None:
            raise ConfigError(f"device.{name} is {value!r}, which is no number")
    fits = {name: value for name, value in document.get("fits", {}).items()}
    if unknown := set(fits) - {each.name for each in fields(Setting)}:
        raise ConfigError(f"fits has no field {sorted(unknown)[0]!r}")
    made = document.get("made", {})
    base = DEVICES[like]
    measured = Measured(
        stages=tuple(_stage(each) for each in document.get("stages", ())),
        collectives=tuple(_collective(each) for each in document.get("collectives", ())),
        copies=_points(document.get("copies", ()), "copies")[0],
        steps=tuple(
            StepPoints(phase=each["phase"], points=points, spreads=spreads)
            for each in document.get("steps", ())
            for points, spreads in [_points(each["points"], f"steps, {each['phase']}")]
        ),
        num_ranks=int(fits.get("ranks", 0)),
    )
    source = f"this profile ({made.get('date', 'no date')}); what it lacks is priced as {like}"
    return Profile(
        device=replace(
            base,
            name=document.get("name") or stem,
            title=document.get("title") or f"{base.title}, as {stem}",
            **given,
            measured=measured,
            sources=tuple((group, source) for group, _ in base.sources),
            notes=f"profile for {fits or 'any setting'}, made {made.get('date', 'at an unknown date')}",
        ),
        fits=Setting(**fits),
        made=made,
        like=like,
        figures=given,
    )


def _stage_document(stage: StagePoints) -> dict[str, Any]:
    attends = any(point.attended for point in stage.points)
    return {
        "stage": stage.price_class,
        "dtype": stage.dtype,
        **({"phase": stage.phase} if stage.phase else {}),
        "work": [{"kind": _NAMES[type(item)], **asdict(item)} for item in stage.work],
        "points": [
            [p.rows, round(1e6 * p.seconds, 3), round(p.spread, 3), *([p.attended] if attends else [])]
            for p in stage.points
        ],
    }


def _stage(given: Mapping[str, Any]) -> StagePoints:
    name = str(given["stage"])
    if name not in list(PriceClass):
        raise ConfigError(f"a stage is {name!r}; stages: {', '.join(PriceClass)}")
    points = []
    for row in given["points"]:
        rows, us, spread, attended = (*row, *(0.0, 0.0)[len(row) - 2 :]) if len(row) in (2, 3, 4) else (0, 0, 0, 0)
        if not (isinstance(rows, int | float) and rows > 0 and us > 0 and attended >= 0):
            raise ConfigError(f"a point of stage {name} is {row}; it is [rows > 0, us > 0, spread, attended tokens]")
        points.append(StagePoint(rows=rows, seconds=us / 1e6, spread=spread, attended=attended))
    if not points:
        raise ConfigError(f"stage {name} has no points")
    return StagePoints(
        price_class=name,
        work=tuple(_work(item) for item in given["work"]),
        dtype=str(given["dtype"]),
        phase=str(given.get("phase", "")),
        points=tuple(points),
    )


def _work(given: Mapping[str, Any]) -> Work:
    values = dict(given)
    kind = values.pop("kind")
    if kind not in _WORKS:
        raise ConfigError(f"work of kind {kind!r}; kinds: {', '.join(_WORKS)}")
    return _WORKS[kind](**values)


def _collective(given: Mapping[str, Any]) -> CollectivePoints:
    op, axis, num_ranks = given["op"], given.get("axis", AXES[0]), given["ranks"]
    if op not in MEASURED_OPS:
        raise ConfigError(f"a collective is {op!r}; collectives: {', '.join(MEASURED_OPS)}")
    if axis not in AXES or not isinstance(num_ranks, int) or num_ranks < 2:
        raise ConfigError(f"{op}: axis {axis!r} must be one of {', '.join(AXES)}, and ranks {num_ranks!r} at least 2")
    points, spreads = _points(given["points"], f"{op} of {num_ranks} ranks")
    if len(points) < 2:
        raise ConfigError(f"{op} of {num_ranks} ranks needs two points or more")
    phase = str(given.get("phase", ""))
    return CollectivePoints(op=op, num_ranks=num_ranks, axis=axis, phase=phase, points=points, spreads=spreads)


def _points(given: list[list[float]], of: str) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    """[[size, us, spread], ...] as (size, seconds), ascending, and the spreads."""
    rows = sorted(given)
    for row in rows:
        if not (len(row) in (2, 3) and row[0] > 0 and row[1] > 0):
            raise ConfigError(f"a point of {of} is {row}; it is [size > 0, us > 0, spread]")
    if len({row[0] for row in rows}) != len(rows):
        raise ConfigError(f"{of} has two points of one size")
    if len(rows) == 1:
        raise ConfigError(f"{of} needs two points or more")
    return tuple((row[0], row[1] / 1e6) for row in rows), tuple(row[2] if len(row) == 3 else 0.0 for row in rows)


def _rows(points: tuple[tuple[float, float], ...], spreads: tuple[float, ...]) -> list[list[float]]:
    known = spreads or (0.0,) * len(points)
    return [[size, round(1e6 * s, 3), round(spread, 3)] for (size, s), spread in zip(points, known, strict=True)]
