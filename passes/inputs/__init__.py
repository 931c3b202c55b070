"""The calibration: turns the user's ``calib`` into batches of arguments.

It may import the ground (errors, config) and the rooms from machine to known_layers.
"""
