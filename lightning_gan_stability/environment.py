"""What a run runs on: versions and devices, and nothing that tells who runs it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("lightning-gan-stability", "torch", "lightning", "torchvision", "torchmetrics", "numpy")


def describe_environment(device: torch.device, processes: int = 1, precision: str = "") -> dict[str, str]:
    """Versions and devices, by what a reader calls them.

    Args:
        device: of this process.
        processes: that train together.
        precision: of the Trainer.

    Example:
        >>> describe_environment(torch.device("cpu"), precision="32-true")["Device"].startswith("cpu")
        True
    """
    found = {"Python": platform.python_version(), "System": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its sources
            continue
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return found | {
        "Device": f"{device.type} ({kind})" if kind else device.type,
        "Threads": str(torch.get_num_threads()),
        "Processes": str(processes),
        "Precision": precision,
    }
