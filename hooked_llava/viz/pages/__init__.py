"""Pages that show how an answer came about: a model and prompts in, one HTML file with its figures and results out.

`page.py` makes every page; the other files call analyses and edits, draw their results with figures, and fill in a template.
`hooked_llava.viz` exports them.
"""
