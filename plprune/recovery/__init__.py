"""Ways to recover a pruned model: LoRA, full training of consumers, and distillation from the dense model."""
