"""The large glyph set, drawn from the machine's fonts (`partial-fc data glyphs`); draw_set.py is the way through.

settings.py  font_files.py  draw_face.py  designs.py  write_set.py  draw_set.py
"""
