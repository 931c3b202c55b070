"""The calibration: turns the user's ``calib`` into batches of arguments.

This package may import errors, config and the packages from machine to known_layers.
"""
