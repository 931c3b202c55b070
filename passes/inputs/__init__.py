"""The calibration: from what the user gives to batches of arguments.

It may import the ground (errors, config) and the rooms from machine to known_layers.
"""
