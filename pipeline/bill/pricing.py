"""What an hour of a device costs, and what that makes of seconds.

Knows no rows and no files. A price in the job file always wins; without one, the list price below is taken and the
bill names it, so that nobody mistakes it for an invoice.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_PER_HOUR = 3600

# On-demand list prices of AWS in us-east-1 as known in 2025, per device: a c7i.large for a CPU worker, else one
# GPU's share of g4dn.xlarge, g5.xlarge, g6.xlarge, g6e.xlarge, p4d.24xlarge, p5.48xlarge, p5en.48xlarge.
LIST_PRICES_USD_PER_HOUR = {
    "cpu": 0.089,
    "T4": 0.526,
    "A10G": 1.006,
    "L4": 0.805,
    "L40S": 1.861,
    "A100": 2.745,
    "H100": 6.88,
    "H200": 7.91,
}


@dataclass(frozen=True, slots=True)
class Price:
    """USD per device-hour and where that number is from."""

    usd_per_device_hour: float
    source: str

    def cost_usd(self, device_seconds: float) -> float:
        return device_seconds * self.usd_per_device_hour / SECONDS_PER_HOUR


def price_of(device: str, usd_per_device_hour: float | None) -> Price:
    """The job file's price, else the list price of the device by its name (`cpu`, `NVIDIA H100 80GB HBM3`).

    0 is a price: that of hardware which is already paid for. A GPU without a list price costs 0, and the source says
    that it is unknown.
    """
    if usd_per_device_hour is not None:
        return Price(usd_per_device_hour, "pricing.usd_per_device_hour of the job file")
    words = device.replace("-", " ").split()
    for name, usd in LIST_PRICES_USD_PER_HOUR.items():
        if name in words or device.startswith(name):
            return Price(
                usd, f"list price of {name}, AWS on demand in us-east-1, 2025; set pricing.usd_per_device_hour"
            )
    return Price(0.0, f"unknown for {device!r}: set pricing.usd_per_device_hour")
