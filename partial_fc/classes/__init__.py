"""Classes between training steps: add, remove and merge them, start them from class means, find nearest classes."""
