"""The entry points: the common run, MagRPass, torchao's prepare and convert flow, and the plan.

This package may import errors, config and the packages from machine to rewriting.
"""
