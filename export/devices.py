# SPDX-License-Identifier: Apache-2.0
"""Which phones have the memory that drawing takes: what an app may have there, against what is planned.

No vendor says what an app may have on a device but for Android 17's recommendation; on iPhones it is what somebody's
app was told by `os_proc_available_memory` or was ended at. The system may allow less when other apps run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ground.errors import TurbopocketError
from ..quant.peak import ComponentMemory
from .units import format_bytes

ENTITLEMENT = "com.apple.developer.kernel.increased-memory-limit"


@dataclass(frozen=True)
class Device:
    """A phone of which it is published what an app may have.

    Attributes:
        ram_bytes: of the phone; app_bytes: of them, for an app in front.
        entitled_bytes: for an app with Apple's entitlement for more memory; None where nobody says.
        source: who says so.
    """

    ram_bytes: int
    app_bytes: int
    entitled_bytes: int | None
    source: str


_GB, _GIB = 10**9, 2**30
_ANDROID = "AOSP, Memory Limiter (Android 17): at least half the RAM for what is visible"
DEVICES: dict[str, Device] = {
    "iphone-12-mini": Device(4 * _GIB, 2100 * 10**6, 2400 * 10**6, "allenai/OLMoE.swift pull request 38 (2024)"),
    "iphone-13-pro": Device(6 * _GIB, 3120 * 10**6, 4200 * 10**6, "a-ghorbani/pocketpal-ai pull request 651 (2026)"),
    "iphone-15-pro": Device(8 * _GIB, 3 * _GB, 6 * _GB, "introlab/rtabmap pull request 1446 (2025)"),
    **{f"android-{gib}gb": Device(gib * _GIB, gib * _GIB // 2, None, _ANDROID) for gib in (6, 8, 12, 16)},
}
"""By the name that the command line has for them."""


@dataclass(frozen=True)
class DeviceFit:
    """Whether a planned artifact can draw on a device; `components` are what each of its components takes."""

    name: str
    components: Mapping[str, ComponentMemory]

    @property
    def device(self) -> Device:
        """The device of that name."""
        return DEVICES[self.name]

    @property
    def together_bytes(self) -> int:
        """With all components open."""
        held = sum(each.held for each in self.components.values())
        return held + max(each.running for each in self.components.values())

    @property
    def in_turn_bytes(self) -> int:
        """With one component open at a time, as an app may do that closes each when it is done."""
        return self.components[self.largest].peak

    @property
    def largest(self) -> str:
        """The component that takes most."""
        return max(self.components, key=lambda name: self.components[name].peak)

    @property
    def fits(self) -> bool:
        """In some way of those that `verdict` names."""
        return self.in_turn_bytes <= max(self.device.app_bytes, self.device.entitled_bytes or 0)

    @property
    def verdict(self) -> str:
        """How it fits, or by how much it does not."""
        device = self.device
        ways = [(device.app_bytes, ""), (device.entitled_bytes or 0, f" with the entitlement {ENTITLEMENT}")]
        for allowed, how in ways:
            if self.together_bytes <= allowed:
                return f"fits{how}"
            if self.in_turn_bytes <= allowed:
                return f"fits{how} when one component is open at a time"
        over = self.in_turn_bytes - max(allowed for allowed, _ in ways)
        return f"does not fit: {self.largest} alone is {format_bytes(over)} over"

    @property
    def line(self) -> str:
        """The numbers and the verdict, for a person."""
        device, most = self.device, self.components[self.largest]
        more = "" if device.entitled_bytes is None else f" ({format_bytes(device.entitled_bytes)} with its entitlement)"
        parts = f"{format_bytes(most.held)} held, {format_bytes(most.running)} to compute with"
        together, in_turn = format_bytes(self.together_bytes), format_bytes(self.in_turn_bytes)
        return (
            f"{self.name}: {self.verdict}. An app may have {format_bytes(device.app_bytes)}{more}; drawing takes "
            f"{together} with all components open, {in_turn} with one at a time ({self.largest}: {parts}). "
            f"Limit: {device.source}"
        )

    def summary(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "device": self.name,
            "fits": self.fits,
            "verdict": self.verdict,
            "app_bytes": self.device.app_bytes,
            "entitled_bytes": self.device.entitled_bytes,
            "source": self.device.source,
            "together_bytes": self.together_bytes,
            "in_turn_bytes": self.in_turn_bytes,
            "components": {
                name: {"held_bytes": each.held, "running_bytes": each.running} for name, each in self.components.items()
            },
        }


def require_devices(names: Sequence[str]) -> None:
    """Raises TurbopocketError for a name that no device has."""
    for name in names:
        if name not in DEVICES:
            raise TurbopocketError(f"no device is called {name}: known are {', '.join(DEVICES)}")


def memory_limits(names: Sequence[str]) -> list[int]:
    """What an app may have on all of these, without Apple's entitlement and with it, the less first."""
    devices = [DEVICES[name] for name in names]
    ways = (
        [each.app_bytes for each in devices],
        [max(each.app_bytes, each.entitled_bytes or 0) for each in devices],
    )
    return sorted({min(way) for way in ways if way})
