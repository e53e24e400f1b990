"""Draws the bundled images: `python -m hooked_llava.toy.images`."""

from hooked_llava.toy.images import draw

if __name__ == "__main__":
    draw()
