"""Class rows between steps: classes that come and go, rows from class means, nearest classes."""
