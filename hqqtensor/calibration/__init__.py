"""Calibration: what a model's layers see on the user's text, and solvers that use it."""

from hqqtensor.calibration.collect import Calibration, calibrate
from hqqtensor.calibration.finetune import Finetuned, finetune

__all__ = ["Calibration", "Finetuned", "calibrate", "finetune"]
