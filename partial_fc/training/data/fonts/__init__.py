"""The large glyph set, drawn from the machine's fonts."""
