"""The entry points: the common run, MagRPass, torchao's prepare and convert flow, and the plan.

It may import the ground (errors, config) and the rooms from machine to budgeting.
"""
