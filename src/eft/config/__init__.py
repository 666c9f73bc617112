"""The typed config: one flat YAML, in sections by inheritance. Torch-free."""
