"""What a head costs, computed before anything is allocated; what share of a step is communication, measured."""
