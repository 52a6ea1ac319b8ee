"""Static shell bodies; launcher/render.py puts a quoted header before each."""
