"""What becomes of predictions: targets, metrics with intervals, calibration, comparison; without torch."""
