"""Ranks: who they are, what they tell each other, who is missing."""
