"""All that knows Lightning: the module, the data, the callbacks, the strategies."""
