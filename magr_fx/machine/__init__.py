"""What the machine gives: memory, disks, files of tensors, other ranks.

It may import the ground (errors, config).
"""
