"""What a run is measured on."""

import datetime
import os
import platform
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """What a run is measured on, and when."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "cpu_count": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
