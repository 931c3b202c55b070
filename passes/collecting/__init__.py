"""The calibration runs through the graphs, block by block, and each site's gram is summed.

It may import the ground (errors, config) and the rooms from machine to offloading.
"""
