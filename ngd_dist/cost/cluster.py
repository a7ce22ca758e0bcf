"""The machines: nodes, their devices, and the links between them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic import Field, model_validator

from ngd_dist.config import Settings

__all__ = ["PRESETS", "Cluster", "Device", "Link"]


class Link(Settings):
    """A network: a message of n bytes takes latency + n / bandwidth."""

    latency_us: float = Field(default=5.0, ge=0, le=1e6, description="Microseconds before the first byte.")
    gb_s: float = Field(gt=0, le=1e5, description="Gigabytes (1e9 bytes) a second in each direction.")

    def seconds(self, nbytes: float, messages: float = 1.0) -> float:
        """Returns the time of these bytes in this number of messages, one after the other."""
        return messages * self.latency_us / 1e6 + nbytes / (self.gb_s * 1e9)


class Device(Settings):
    """A device that trains one rank. Rates are those that training reaches, times the peak.

    >>> PRESETS["v100"].tflops
    15.7
    """

    name: str = Field(default="", max_length=100)
    memory_gib: float = Field(gt=0, le=1e6, description="Memory of one rank, in GiB.")
    tflops: float = Field(gt=0, le=1e6, description="Peak, in 1e12 operations a second, of the model's dtype.")
    efficiency: float = Field(default=0.45, gt=0, le=1, description="Share of the peak in forward and backward.")
    statistics_efficiency: float = Field(default=0.45, gt=0, le=20, description="The same in second moments of rows.")
    apply_efficiency: float = Field(default=0.3, gt=0, le=20, description="The same in products with inverses.")
    inverse_efficiency: float = Field(default=0.15, gt=0, le=20, description="The same in inversions.")
    memory_gb_s: float = Field(gt=0, le=1e6, description="Gigabytes a second to and from memory.")
    step_us: float = Field(default=0.0, ge=0, le=1e9, description="Microseconds that each step takes in any case.")
    layer_us: float = Field(
        default=30.0, ge=0, le=1e7, description="Microseconds of calls for each layer, forward and backward."
    )
    refresh_us: float = Field(
        default=300.0, ge=0, le=1e7, description="Microseconds of calls for each layer that is refreshed."
    )
    in_turn_us: float = Field(
        default=0.0, ge=0, le=1e7, description="Microseconds more for a layer that no other is refreshed with."
    )


# Peaks and memory of the makers' data sheets, float32 without TF32 for V100, TF32 for A100 and H100, all dense; the
# shares are assumptions, and a measured run (`calibration`) replaces them.
PRESETS: Mapping[str, Device] = MappingProxyType(
    {
        "v100": Device(name="v100", memory_gib=16, tflops=15.7, efficiency=0.5, memory_gb_s=900),
        "a100": Device(
            name="a100", memory_gib=40, tflops=156, efficiency=0.3, memory_gb_s=1555, inverse_efficiency=0.03
        ),
        "h100": Device(
            name="h100", memory_gib=80, tflops=494, efficiency=0.25, memory_gb_s=3350, inverse_efficiency=0.02
        ),
        "h200": Device(
            name="h200", memory_gib=141, tflops=494, efficiency=0.25, memory_gb_s=4800, inverse_efficiency=0.02
        ),
        "cpu": Device(
            name="cpu", memory_gib=4, tflops=0.08, efficiency=0.5, memory_gb_s=10, layer_us=60, refresh_us=500
        ),
    }
)


class Cluster(Settings):
    """Equal nodes. device: the name of a preset, or numbers; {preset: v100, memory_gib: 32} changes some of them.

    >>> Cluster.model_validate({"nodes": 2, "devices_per_node": 4, "device": "v100"}).ranks
    8
    """

    nodes: int = Field(default=1, ge=1, le=100_000)
    devices_per_node: int = Field(default=1, ge=1, le=1024)
    device: Device
    inside: Link = Field(default=Link(latency_us=5, gb_s=50), description="Between devices of a node, of each device.")
    between: Link = Field(default=Link(latency_us=10, gb_s=12.5), description="Between nodes, of each node.")

    @property
    def ranks(self) -> int:
        """The number of devices."""
        return self.nodes * self.devices_per_node

    @model_validator(mode="before")
    @classmethod
    def _named_device(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "device" not in given:
            return given
        device = given["device"]
        if isinstance(device, str):
            device = {"preset": device}
        if isinstance(device, Mapping) and "preset" in device:
            name, changes = device["preset"], {key: value for key, value in device.items() if key != "preset"}
            if not isinstance(name, str) or name not in PRESETS:
                raise ValueError(
                    f"device must name one of {', '.join(PRESETS)}, got {str(name)[:80]!r}; or give memory_gib, tflops "
                    "and memory_gb_s"
                )
            device = PRESETS[name].model_dump() | changes
        return {**given, "device": device}
