"""What a model is made of: families, blocks and their units, and the classes that hold pruned ones."""
