"""Trace a model for its calibration batches, by torch.export or make_fx.

It may import the ground (errors, config) and the rooms from machine to inputs.
"""
