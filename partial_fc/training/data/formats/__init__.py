"""The formats that a data set can have on disk, one module each."""
