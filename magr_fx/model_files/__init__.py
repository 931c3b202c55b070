"""Find, download, read and check a model's directory, and read calibration texts.

It may import the ground (errors, config) and the rooms from machine to comparing.
"""
