"""eft: Exact Fine-Tuning. Supervised fine-tuning of causal language models from one YAML file, with proof."""
