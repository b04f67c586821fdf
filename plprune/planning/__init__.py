"""What a pruning will come to before it is run: sizes, memory, time, and the sparsity for a target."""
