"""Find, download, read and check a model's directory, and read calibration texts.

This room may import the ground (errors, config) and the rooms from machine to comparing.
"""
