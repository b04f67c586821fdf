"""What trains a pruned model back: adapters, consumers, and the dense model as a teacher."""
