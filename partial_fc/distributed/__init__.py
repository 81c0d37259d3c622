"""Ranks: their groups, collectives and agreements, and errors that name a missing rank."""
