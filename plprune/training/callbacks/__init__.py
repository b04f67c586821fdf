"""The callbacks of a fit. They decide when something happens; the packages below implement it."""
