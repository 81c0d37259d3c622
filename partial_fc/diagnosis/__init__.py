"""Is a training loop set up correctly (`doctor`), and is a margin (`check_margin`)?"""
