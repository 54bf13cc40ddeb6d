"""Run folders that are so small that a page of them is made in no time."""

import io

from PIL import Image

from dtnh_jax.finetune.config import Config, identity
from dtnh_jax.finetune.runs.folder import write_json


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return file.getvalue()


def results(accuracy, **options):
    config = Config(methods=("fine-tuning", "l2_sp+dtnh"), seeds=2, **options)

    def level(mean):
        return {"mean": mean, "std": 0.01, "low": mean - 0.05, "high": mean + 0.05}

    methods = {
        "fine-tuning": {"accuracy": level(accuracy), "balanced_accuracy": level(0.5)},
        "l2_sp+dtnh": {
            "accuracy": level(accuracy + 0.02),
            "balanced_accuracy": level(0.5),
            "cosine": -0.012,
            "conflict": 0.61,
            "removed": 0.1,
        },
    }
    return {
        "config": identity(config),
        "strengths": config.strengths,
        "steps": 36,
        "source": {"name": "tiny", "licence": "none"},
        "target": {"name": "folder:<b>photos</b>", "licence": "CC & co"},
        "class_names": ["cup", "mug"],
        "methods": methods,
        "differences": [
            {
                "method": "l2_sp+dtnh",
                "minus": "fine-tuning",
                "by_seed": [0.02, 0.02],
                "accuracy": level(0.02),
            }
        ],
        "tuning": None,
        "cells": [{"accuracy": accuracy, "balanced_accuracy": 0.5}],
    }


def write_runs(directory):
    """Writes two runs; returns their folders."""
    made = []
    for name, colour, accuracy, options in (
        ("one", "red", 0.7, {}),
        ("two", "blue", 0.8, {"scope": "leaf", "steps": 99}),
    ):
        folder = directory / name
        folder.mkdir()
        write_json(folder / "results.json", results(accuracy, **options))
        (folder / "accuracy.png").write_bytes(picture(colour))
        made.append(folder)
    return made
