"""What pruning methods are made of: statistics, allocation, surgery, repair, and the plan."""
