"""What a model's directory holds, and where it comes from.

It may import the ground (errors, config) and the rooms from machine to comparing.
"""
