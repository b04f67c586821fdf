"""The building blocks of pruning methods: statistics, allocation, surgery, repair, and the plan."""
