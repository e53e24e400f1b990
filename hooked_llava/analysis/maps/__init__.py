"""The ways to draw a map of what each patch of the image is worth for the answer."""
