"""Which device the steps of an engine are priced for: a named one, a profile, or what this machine has a profile of.

Knows the catalogue, profiles and what ranks run on; prices nothing. A profile that is asked for by its file must be of
this machine and version, since a plan would otherwise rest on prices that do not hold here; one that merely lies there
is used where it fits, and where it does not, it is said why.
"""

from __future__ import annotations

from pathlib import Path

from narrows.comm.device import card_name
from narrows.comm.neighbours import is_wanted
from narrows.cost.devices import Device, device, device_of_card
from narrows.cost.here import Setting, here
from narrows.cost.profile import Profile, is_profile, kept_profile, read_profile
from narrows.errors import ConfigError
from narrows.native import why_absent

__all__ = ["calibrate_command", "priced_for", "setting_of", "world_name"]


def world_name(*, run_on: str, ranks: str, several_hosts: bool) -> str:
    """How ranks exchange, by the name that profiles use."""
    if ranks == "threads":
        return "threads"
    if run_on == "cuda":
        return "nccl"
    return "gloo" if several_hosts or why_absent() or not is_wanted() else "shm"


def setting_of(*, run_on: str, ranks: str, several_hosts: bool, num_ranks: int, threads: int) -> Setting:
    """What a profile must have been made for to hold for such ranks here."""
    return here(
        ranks=num_ranks,
        threads=threads,
        world=world_name(run_on=run_on, ranks=ranks, several_hosts=several_hosts),
        card=card_name() if run_on == "cuda" else "",
    )


def calibrate_command(setting: Setting, dtype: str) -> str:
    """What makes a profile for ``setting`` and weights of ``dtype``."""
    threads = f" --threads {setting.threads}" if setting.threads != 1 else ""
    world = "" if setting.world in ("shm", "alone") else f" --world {setting.world}"
    switch = "NARROWS_SHM=0 " if setting.world == "gloo" and not why_absent() else ""
    weights = {"bf16": "", "fp32": " --dtype float32"}.get(dtype, f" --quantization {dtype}")
    return f"{switch}narrows calibrate --ranks {setting.ranks}{threads}{world}{weights}"


def priced_for(
    name: str, *, run_on: str, ranks: str, several_hosts: bool, num_ranks: int, threads: int, dtype: str, model: str
) -> tuple[Device, list[str]]:
    """The device, and notes on what its prices rest on. ``dtype``: of weights, by the name that prices use.

    Raises:
        ConfigError: no such device; a profile of another machine or version; a GPU without prices.
    """
    if name != "auto" and not is_profile(name):
        return device(name), []
    setting = setting_of(run_on=run_on, ranks=ranks, several_hosts=several_hosts, num_ranks=num_ranks, threads=threads)
    if name != "auto":
        profile = read_profile(Path(name))
        if misfit := profile.fits.misfit(setting):
            raise ConfigError(
                f"the profile {name} was made for something else ({misfit}), so its prices do not hold for these "
                f"ranks; make one with: {calibrate_command(setting, dtype)} --out {name}"
            )
        return profile.device, [_said(profile, name, setting, dtype)]
    file, found, refused = kept_profile(setting, dtype=dtype, model=model)
    if found is not None:
        return found.device, [_said(found, file, setting, dtype)]
    notes = [f"{line}; anew: {calibrate_command(setting, dtype)}" for line in refused]
    if run_on == "cpu":
        return device("cpu-core"), notes
    card = device_of_card(setting.card)
    if card is None:
        raise ConfigError(f"there are no prices for {setting.card!r} here; name the most similar device with --device")
    return device(card), notes


def _said(profile: Profile, file: str, setting: Setting, dtype: str) -> str:
    line = profile.said(file, dtype)
    return line if profile.knows(dtype) else f"{line}; {calibrate_command(setting, dtype)} measures it"
