"""The callbacks of a fit. They decide when each step happens; lower packages implement the steps."""
