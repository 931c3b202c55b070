"""Run the calibration through the traced graphs, block by block, and sum each site's gram.

It may import the ground (errors, config) and the rooms from machine to offloading.
"""
