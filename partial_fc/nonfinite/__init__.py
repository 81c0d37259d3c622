"""NaN and infinities: who looks, how ranks agree, what is left out."""
