"""Calibration: what a model's layers see on the user's text, and solvers that use it."""

from hqqtensor.calibration.collect import Calibration, calibrate
from hqqtensor.calibration.finetune import Finetuned, finetune
from hqqtensor.calibration.scales import ScaleTraining, train_scales

__all__ = ["Calibration", "Finetuned", "ScaleTraining", "calibrate", "finetune", "train_scales"]
