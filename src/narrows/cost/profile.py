"""Profiles: a machine's prices in a file, whoever wrote it. Reads, checks and writes them (format: docs/profiles.md).

Knows devices, measured tables and JSON. A profile names what it was made for (a :class:`Setting`); who runs ranks
refuses one that is of another machine or version, who only plans may take any.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from narrows.cost.devices import DEVICES, Device, device
from narrows.cost.here import Setting, here
from narrows.cost.measured import CollectivePoints, Measured, StagePoint, StagePoints, StepPoints
from narrows.cost.profile_format import MEASURED_OPS, VERSION, WORKS, ProfileDocument, StageTable, parse
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

_FOLDER_VARIABLE = "NARROWS_PROFILES"
_PEAKS = ("tflops_bf16", "tflops_fp32", "tflops_int8", "tflops_fp8")
_NAMES = {kind: name for name, kind in WORKS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A device with measured prices, and what it was made for. ``made``: date, command, models; for people."""

    device: Device
    fits: Setting
    made: Mapping[str, Any] = field(default_factory=dict)
    like: str = "cpu-core"
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the device that differ from those of ``like``."""

    def said(self, file: str, dtype: str = "") -> str:
        """What prices of weights of ``dtype`` are, in one line, where they are of this profile."""
        line = f"prices: the profile {file}, made {self.made.get('date', 'at an unknown date')}"
        if self.knows(dtype):
            return line
        return f"{line}; it measured {', '.join(self.dtypes)}, by which {dtype} is scaled"

    def knows(self, dtype: str) -> bool:
        """Whether stages were measured in ``dtype``, or none at all; empty: any will do."""
        return not (dtype and self.dtypes) or dtype in self.dtypes

    def knows_model(self, model: str) -> bool:
        """Whether it says that it was made with the model of that name or folder."""
        models = self.made.get("models")
        return isinstance(models, list) and Path(model).name in {Path(str(each)).name for each in models}

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the weights of the stages that were measured."""
        return self.device.measured.dtypes if self.device.measured is not None else ()


def profiles_folder() -> Path:
    """Where this user's profiles are kept: $NARROWS_PROFILES, else narrows/profiles among the user's data."""
    if folder := os.environ.get(_FOLDER_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "narrows" / "profiles"


def kept_profile(
    setting: Setting, *, dtype: str, model: str, whatever: Collection[str] = ()
) -> tuple[str, Profile | None, list[str]]:
    """The profile among this user's that fits ``setting``, and its file's name; or why those for as many ranks do not
    fit. Of several, one that measured weights of ``dtype``, then one made with ``model``, then the one that leaves
    least open, then the newest. ``whatever``: fields of the setting that may differ."""
    fitting, refused = [], []
    for path in sorted(profiles_folder().glob("*.json")):
        try:
            profile = read_profile(path)
        except ConfigError as error:
            refused.append(f"not used: {error}")
            continue
        misfit = profile.fits.misfit(setting, whatever=whatever)
        if not misfit:
            known = dtype in profile.dtypes, bool(profile.dtypes), profile.knows_model(model)
            fitting.append(
                (*known, len(profile.fits.document()), str(profile.made.get("date", "")), path.name, profile)
            )
        elif profile.fits.ranks == setting.ranks:
            refused.append(f"the profile {path.name} is not used: {misfit}")
    if not fitting:
        return "", None, refused
    *_, file, best = max(fitting, key=lambda one: one[:-1])
    return file, best, []


def device_here(num_ranks: int, dtype: str, model: str) -> tuple[Device, str]:
    """The device of this machine's profile for so many ranks, however they exchange; and what it is, in words.
    ``dtype``: of weights; empty: whatever the profile knows.

    Raises:
        ConfigError: there is none.
    """
    setting = here(ranks=num_ranks, threads=1, world="")
    file, profile, refused = kept_profile(setting, dtype=dtype, model=model, whatever=("threads", "world", "card"))
    if profile is None:
        told = (
            "; ".join(refused) or f"there is no profile of this machine for {num_ranks} rank(s) in {profiles_folder()}"
        )
        raise ConfigError(f"{told}; make one with: narrows calibrate --ranks {num_ranks}, or name a --device")
    return profile.device, profile.said(file, dtype)


def is_profile(name: str) -> bool:
    """Whether a device is named by a file."""
    return name.endswith(".json") or os.sep in name


def find_device(name: str, dtype: str = "") -> tuple[Device, tuple[str, ...]]:
    """The device of the catalogue called ``name``, or that of the profile in the file of that name; and notes on what
    its prices are of, since one may plan for another machine, or by what an older version has measured.

    Raises:
        ConfigError: there is none, or the file is not a profile.
    """
    if not is_profile(name):
        return device(name), ()
    profile = read_profile(Path(name))
    misfit = profile.fits.misfit(here(ranks=0, threads=0, world=""), whatever=("ranks", "threads", "world", "card"))
    other = (f"the profile {name} is not of this machine: {misfit}",) if misfit else ()
    return profile.device, (profile.said(name, dtype), *other)


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
        "device": {"like": profile.like, **_shorter(profile.figures)},
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
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; make a profile with: narrows calibrate") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or "narrows_profile" not in document:
        raise ConfigError(f"{path} is not a profile; make one with: narrows calibrate (format: docs/profiles.md)")
    if document["narrows_profile"] != VERSION:
        raise ConfigError(
            f"{path} is a profile of version {document['narrows_profile']!r}, and this narrows reads version "
            f"{VERSION}; make it anew with: narrows calibrate"
        )
    try:
        return _profile(parse(text), path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error} (format: docs/profiles.md)") from None


def _profile(document: ProfileDocument, stem: str) -> Profile:
    like, given = document.device.like, document.device.given()
    base, date = DEVICES[like], document.made.get("date")
    measured = Measured(
        stages=tuple(_stage(each) for each in document.stages),
        collectives=tuple(
            CollectivePoints(op=c.op, num_ranks=c.ranks, axis=c.axis, phase=c.phase or "", **_points(c.points))
            for c in document.collectives
        ),
        copies=_points(document.copies)["points"],
        steps=tuple(StepPoints(phase=each.phase, **_points(each.points)) for each in document.steps),
        num_ranks=document.fits.ranks,
    )
    source = f"this profile ({date or 'no date'}); what it lacks is priced as {like}"
    return Profile(
        device=replace(
            base,
            name=document.name or stem,
            title=document.title or f"{base.title}, as {stem}",
            **_other_rates(base, given),
            measured=measured,
            sources=tuple((group, source) for group, _ in base.sources),
            notes=f"profile for {document.fits.document() or 'any setting'}, made {date or 'at an unknown date'}",
        ),
        fits=document.fits,
        made=document.made,
        like=like,
        figures=given,
    )


def _other_rates(base: Device, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, and the peaks that it does not say: those of ``base``, as much faster or slower as the first that it
    does say."""
    said = next((name for name in _PEAKS if given.get(name) and getattr(base, name)), None)
    if said is None:
        return dict(given)
    factor = given[said] / getattr(base, said)
    others = {name: getattr(base, name) for name in _PEAKS if name not in given}
    return {**{name: peak and peak * factor for name, peak in others.items()}, **given}


def _stage_document(stage: StagePoints) -> dict[str, Any]:
    attends = any(point.attended for point in stage.points)
    return {
        "stage": stage.price_class,
        "dtype": stage.dtype,
        **({"phase": stage.phase} if stage.phase else {}),
        "work": [{"kind": _NAMES[type(item)], **_shorter(asdict(item))} for item in stage.work],
        "points": [
            [_short(p.rows), round(1e6 * p.seconds, 3), round(p.spread, 3), *([p.attended] if attends else [])]
            for p in stage.points
        ],
    }


def _stage(table: StageTable) -> StagePoints:
    points = []
    for row in table.points:
        rows, us, spread, attended = (*row, *(0.0, 0.0)[len(row) - 2 :])
        points.append(StagePoint(rows=rows, seconds=us / 1e6, spread=spread, attended=attended))
    phase = table.phase or ""
    return StagePoints(
        price_class=table.stage, work=table.works(), dtype=table.dtype, phase=phase, points=tuple(points)
    )


def _points(given: Sequence[list[float]]) -> dict[str, Any]:
    """[[size, us, spread], ...] as points (size, seconds), ascending, and their spreads."""
    rows = sorted(given)
    return {
        "points": tuple((row[0], row[1] / 1e6) for row in rows),
        "spreads": tuple(row[2] if len(row) == 3 else 0.0 for row in rows),
    }


def _rows(points: tuple[tuple[float, float], ...], spreads: tuple[float, ...]) -> list[list[float]]:
    known = spreads or (0.0,) * len(points)
    return [
        [_short(size), round(1e6 * s, 3), round(spread, 3)] for (size, s), spread in zip(points, known, strict=True)
    ]


def _shorter(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _short(value) if isinstance(value, float) else value for name, value in values.items()}


def _short(number: float) -> float:
    return int(number) if number == int(number) else number
