"""The cores of a machine that are near a GPU: copies between host and device from elsewhere cross the sockets.

torchrun's `--numa-binding` does the same with the `numactl` program, which few images have, and fails without it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

OFF = "OPD_MEGATRON_NUMA"
"""Environment variable: 0 leaves every rank on all cores."""


def cores_near(pci_address: str, sysfs: Path = Path("/sys")) -> set[int]:
    """Cores of the NUMA node of a device, such as `0000:3b:00.0`; none where the machine does not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci_address / "numa_node").read_text())
        if node < 0:  # a machine of one node, or a virtual one
            return set()
        return _parsed((sysfs / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):
        return set()


def stay_near(pci_address: str, sysfs: Path = Path("/sys")) -> set[int]:
    """Keeps this process, and what it starts, on those of its cores that are near a device.

    Returns them; none where everything stays as it is: they are all of its cores, or none of them.
    """
    allowed = os.sched_getaffinity(0)
    near = cores_near(pci_address, sysfs) & allowed
    if os.environ.get(OFF) == "0" or not near or near == allowed:
        return set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            if os.sched_getaffinity(int(thread)) == allowed:  # or has been put somewhere by a library
                os.sched_setaffinity(int(thread), near)
    return near


def _parsed(text: str) -> set[int]:
    """`0-3,8` -> 0, 1, 2, 3, 8."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores
