"""Calibration: what a model's layers see on the user's text, and solvers that use it."""

from hqqtensor.calibration.collect import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
