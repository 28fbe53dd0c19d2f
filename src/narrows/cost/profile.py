"""Profiles: a machine's prices in a file, and how a command finds the device that it plans for.

:class:`Profile` is the file (docs/profiles.md). It names the machine that it was made for (a
:class:`MachineFingerprint`). Ranks that run here refuse a profile of another machine, since their plans would rest on
prices that do not hold. To plan only, any profile may be used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue, ValidationError, field_serializer, model_serializer, model_validator

from narrows.cost.devices import DEVICES, Device, device, device_of_card
from narrows.cost.environment import MachineFingerprint
from narrows.cost.measured import WORKS, CollectiveTable, Measured, ProfileObject, SizeRow, StageTable, StepTable, short
from narrows.cost.network import NETWORKS
from narrows.errors import ConfigError
from narrows.native import why_absent

__all__ = [
    "DeviceFigures",
    "Profile",
    "calibrate_command",
    "check_device_name",
    "choose_device",
    "nearest_device",
    "profiles_folder",
    "read_profile",
    "write_profile",
]

VERSION = 1
_FOLDER_VARIABLE = "NARROWS_PROFILES"
_PEAKS = ("tflops_bf16", "tflops_fp32", "tflops_int8", "tflops_fp8")
_PLANNED = ("threads", "world", "card")
"""What may differ between a profile and ranks that are only planned."""
_KINDS = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"}
"""What users call a kind of device, with the value of ``--run-on``."""

_Rate = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(gt=0, le=1)]
_Seconds = Annotated[float, Field(ge=0)]


# -- the file ----------------------------------------------------------------------------------------------------------

_UNSAID: Any = None


class DeviceFigures(ProfileObject):
    """Figures of a :class:`~narrows.cost.devices.Device`; what is left out is that of ``like``."""

    like: Literal[tuple(DEVICES)] = "cpu-core"  # type: ignore[valid-type]
    tflops_bf16: _Rate = _UNSAID
    tflops_fp8: _Rate | None = _UNSAID
    tflops_int8: _Rate | None = _UNSAID
    tflops_fp32: _Rate = _UNSAID
    hbm_bytes_per_s: _Rate = _UNSAID
    memory_bytes: _Rate = _UNSAID
    link_bytes_per_s: _Rate = _UNSAID
    num_links: Annotated[int, Field(ge=1)] = _UNSAID
    is_cpu: bool = _UNSAID
    shared_memory: bool = _UNSAID
    fused_norm_bytes: Annotated[int, Field(ge=0)] = _UNSAID
    link_latency_s: _Seconds = _UNSAID
    network: Literal[tuple(NETWORKS)] = _UNSAID  # type: ignore[valid-type]
    node_ranks: Annotated[int, Field(ge=1)] | None = _UNSAID
    gemm_efficiency: _Share = _UNSAID
    gemm_memory_efficiency: _Share = _UNSAID
    norm_plain_efficiency: _Share = _UNSAID
    norm_fused_efficiency: _Share = _UNSAID
    stream_efficiency: _Share = _UNSAID
    attention_efficiency: _Share = _UNSAID
    launch_s: _Seconds = _UNSAID
    gemm_launch_s: _Seconds = _UNSAID

    def given(self) -> dict[str, Any]:
        """The figures that the file gives. For fp8 and int8 it may say that the device has no such rate."""
        return {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set - {"like"}
        }

    @model_serializer
    def _given_fields(self) -> dict[str, Any]:
        return {
            "like": self.like,
            **{name: short(x) if isinstance(x, float) else x for name, x in self.given().items()},
        }


class Profile(ProfileObject):
    """A machine's prices, and what they were made for. ``made``: date, command, models; for people."""

    narrows_profile: Literal[1] = 1
    name: str | None = None
    title: str | None = None
    fits: MachineFingerprint = MachineFingerprint()
    made: dict[str, JsonValue] = Field(default_factory=dict)
    figures: DeviceFigures = Field(default=DeviceFigures(), alias="device")
    stages: list[StageTable] = Field(default_factory=list)
    collectives: list[CollectiveTable] = Field(default_factory=list)
    copies: list[SizeRow] = Field(default_factory=list)
    steps: list[StepTable] = Field(default_factory=list)

    @model_validator(mode="after")
    def _each_once(self) -> Profile:
        if len(self.copies) == 1:
            raise ValueError("copies: two points or more are needed")
        keys: list[tuple[str, object]] = [(f"the stage {s.stage}", (s.dtype, s.phase, s.works)) for s in self.stages]
        keys += [(f"the collective {c.op}", (c.ranks, c.axis, c.phase, c.nodes, c.algorithm)) for c in self.collectives]
        keys += [("steps", s.phase) for s in self.steps]
        seen: set[tuple[str, object]] = set()
        for key in keys:
            if key in seen:
                raise ValueError(f"{key[0]} has two tables of the same")
            seen.add(key)
        return self

    @field_serializer("fits")
    def _fits(self, fits: MachineFingerprint) -> dict[str, str | int]:
        return fits.document()

    @property
    def device(self) -> Device:
        """What plans are priced for: the device that it is like, with its figures and tables."""
        base, given = DEVICES[self.figures.like], self.figures.given()
        date = self.made.get("date")
        source = f"this profile ({date or 'no date'}); what it lacks is priced as {base.name}"
        return replace(
            base,
            name=self.name or "profile",
            title=self.title or f"{base.title}, as {self.name}",
            **_other_rates(base, given),
            measured=Measured(
                stages=self.stages,
                collectives=self.collectives,
                copies=self.copies,
                steps=self.steps,
                num_ranks=self.fits.ranks,
            ),
            sources=tuple((group, source) for group, _ in base.sources),
            notes=f"profile for {self.fits.document() or 'any setting'}, made {date or 'at an unknown date'}",
        )

    def line(self, file: str, dtype: str = "") -> str:
        """One line for the log: which profile the prices come from, and whether it measured ``dtype``."""
        text = f"prices: the profile {file}, made {self.made.get('date', 'at an unknown date')}"
        if self.knows(dtype):
            return text
        return f"{text}; it measured {', '.join(self.dtypes)}, by which {dtype} is scaled"

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
        return tuple(dict.fromkeys(each.dtype for each in self.stages))


def write_profile(path: Path, profile: Profile) -> None:
    """Write ``profile`` to ``path``, whose folder is made where it is not there.

    Raises:
        ConfigError: it cannot be written.
    """
    document = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    lists = ("stages", "collectives", "steps")
    text = json.dumps({name: value for name, value in document.items() if name not in lists}, indent=1)[:-2]
    for name in lists:  # a line for each table, so that a person can read and compare files
        lines = ",\n  ".join(json.dumps(each) for each in document[name])
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
            f"{VERSION}; make a new one with: narrows calibrate"
        )
    try:
        profile = Profile.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error.errors())} (format: docs/profiles.md)") from None
    return profile if profile.name else profile.model_copy(update={"name": path.stem})


def _other_rates(base: Device, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, and the peaks that it does not say: those of ``base``, as much faster or slower as the first that it
    does say."""
    reference = next((name for name in _PEAKS if given.get(name) and getattr(base, name)), None)
    if reference is None:
        return dict(given)
    factor = given[reference] / getattr(base, reference)
    others = {name: getattr(base, name) for name in _PEAKS if name not in given}
    return {**{name: peak and peak * factor for name, peak in others.items()}, **given}


def _first(errors: Sequence[Any]) -> str:
    error = errors[0]
    where = ".".join(str(part) for part in error["loc"] if part not in WORKS)
    what = {
        "extra_forbidden": "there is no such field",
        "unexpected_keyword_argument": "there is no such field",
        "missing": "it is missing",
    }.get(error["type"])
    if what is None:
        what = error["msg"].removeprefix("Value error, ")
        if not isinstance(error["input"], dict | list | BaseModel):
            what += f", not {error['input']!r}"
    return f"{where}: {what[0].lower()}{what[1:]}" if where else what


# -- the door ----------------------------------------------------------------------------------------------------------


def profiles_folder() -> Path:
    """Where this user's profiles are kept: $NARROWS_PROFILES, else narrows/profiles among the user's data."""
    if folder := os.environ.get(_FOLDER_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "narrows" / "profiles"


def check_device_name(name: str, *, runs: bool) -> None:
    """Refuse a kind of device (``cpu``, ``cuda``, ``cuda:0``) as the name of the one that plans are priced for.

    Args:
        name: the value of ``--device``.
        runs: whether ranks run here, so that the user may mean where they compute.

    Raises:
        ConfigError: it is a kind; the text has the way out.
    """
    kind = _KINDS.get(name.partition(":")[0])
    if kind is None:
        return
    if runs:
        raise ConfigError(
            f"--device {name}: --device names the device that plans are priced for; to choose where ranks compute, "
            f"say --run-on {kind}"
        )
    raise ConfigError(f"--device {name} is a kind of device; name the one that is priced: {', '.join(DEVICES)}")


def choose_device(
    name: str, setting: Callable[[], MachineFingerprint], *, dtype: str = "", model: str = "", runs: bool
) -> tuple[Device, list[str]]:
    """The device that plans are priced for, and notes on what its prices rest on.

    Args:
        name: a device of the catalogue; the file of a profile; or ``auto``: the profile among this user's that fits.
        setting: says this machine and its ranks; needed only where a profile may be taken.
        dtype: of weights, by the name that prices use. Empty: whatever the profile knows.
        model: that the steps are of: its name or folder.
        runs: ranks run here by these prices. They refuse a profile of another setting, and without a profile take the
            nearest device of the catalogue. A command that only plans gets a note on
            a profile's other setting, and needs a profile.

    Raises:
        ConfigError: no such device, no such profile, or one that does not hold here, with the way out.
    """
    check_device_name(name, runs=runs)
    if name == "auto":
        return _kept(setting(), dtype, model, runs)
    if not (name.endswith(".json") or os.sep in name):
        return device(name), []
    profile, mine = read_profile(Path(name)), setting()
    misfit = profile.fits.misfit(mine, whatever=() if runs else ("ranks", *_PLANNED))
    if not runs:
        other = [f"the profile {name} is not of this machine: {misfit}"] if misfit else []
        return profile.device, [profile.line(name, dtype), *other]
    if misfit:
        raise ConfigError(
            f"the profile {name} was made for something else ({misfit}), so its prices do not hold for these "
            f"ranks; make one with: {calibrate_command(mine, dtype)} --out {name}"
        )
    return profile.device, [_profile_line(profile, name, mine, dtype)]


def _kept(setting: MachineFingerprint, dtype: str, model: str, runs: bool) -> tuple[Device, list[str]]:
    """By the profile among this user's that fits. Of several, one that measured weights of ``dtype``, then one made
    with ``model``, then the one that leaves least open, then the newest. If there is none: why those for as many ranks
    do not fit."""
    fitting, refused = [], []
    for path in sorted(profiles_folder().glob("*.json")):
        try:
            profile = read_profile(path)
        except ConfigError as error:
            refused.append(f"not used: {error}")
            continue
        misfit = profile.fits.misfit(setting, whatever=() if runs else _PLANNED)
        if not misfit:
            known = dtype in profile.dtypes, bool(profile.dtypes), profile.knows_model(model)
            rank = (*known, len(profile.fits.document()), str(profile.made.get("date", "")), path.name)
            fitting.append((rank, profile))
        elif profile.fits.ranks == setting.ranks:
            refused.append(f"the profile {path.name} is not used: {misfit}")
    if fitting:
        (*_, file), best = max(fitting, key=lambda one: one[0])
        return best.device, [_profile_line(best, str(file), setting, dtype) if runs else best.line(str(file), dtype)]
    if not runs:
        ranks = setting.ranks
        none = f"there is no profile of this machine for {ranks} rank(s) in {profiles_folder()}"
        way_out = f"make one with: narrows calibrate --num-ranks {ranks}, or name a --device"
        raise ConfigError(f"{'; '.join(refused) or none}; {way_out}")
    nearest = nearest_device(setting)
    if nearest is None:
        raise ConfigError(f"there are no prices for {setting.card!r} here; name the most similar device with --device")
    return device(nearest), [f"{line}; make a new one with: {calibrate_command(setting, dtype)}" for line in refused]


def nearest_device(setting: MachineFingerprint) -> str | None:
    """The name of the device of the catalogue that is most like one rank of ``setting``; None for an unknown GPU."""
    return device_of_card(setting.card) if setting.card else "cpu-core"


def _profile_line(profile: Profile, file: str, setting: MachineFingerprint, dtype: str) -> str:
    line = profile.line(file, dtype)
    return line if profile.knows(dtype) else f"{line}; {calibrate_command(setting, dtype)} measures it"


def calibrate_command(setting: MachineFingerprint, dtype: str) -> str:
    """What makes a profile for ``setting`` and weights of ``dtype``."""
    threads = f" --threads {setting.threads}" if setting.threads != 1 else ""
    transport = "" if setting.world in ("shm", "shm+gloo", "alone") else f" --transport {setting.world}"
    transport += f" --nnodes {setting.hosts} (on each host)" if setting.hosts > 1 else ""
    switch = "NARROWS_SHM=0 " if setting.world == "gloo" and not why_absent() else ""
    weights = {"bf16": "", "fp32": " --dtype float32"}.get(dtype, f" --quantization {dtype}")
    model = " MODEL.gguf" if dtype == "stored" else ""
    return f"{switch}narrows calibrate{model} --num-ranks {setting.ranks}{threads}{weights}{transport}"
