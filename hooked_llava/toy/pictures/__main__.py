"""Draws the bundled pictures: `python -m hooked_llava.toy.pictures`."""

from hooked_llava.toy.pictures import draw

if __name__ == "__main__":
    draw()
