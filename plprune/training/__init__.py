"""The code that uses Lightning: the module, the data, the callbacks, the strategies."""
