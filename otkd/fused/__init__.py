"""Fast paths that keep on chip, or never form, what the plain path writes to memory."""
