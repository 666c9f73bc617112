"""Torch-free ground: errors, atomic files, hashing, constants, small records."""
