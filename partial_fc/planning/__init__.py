"""The cost of a head: memory and work, computed before anything is allocated; communication, measured."""
