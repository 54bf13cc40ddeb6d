"""Describes the machine of a run."""

import datetime
import os
import platform
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """Returns a description of the machine, and the current time."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu_count": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
