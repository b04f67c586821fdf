"""Writers of model formats for other programs, which refuse models that the format cannot hold."""
