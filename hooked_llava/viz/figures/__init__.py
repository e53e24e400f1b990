"""One function for each kind of result: labelled arrays in, a matplotlib figure out.

Figures use what lies before viz and the helpers beside this package (style, titles, kinds, lines); they run no model.
`hooked_llava.viz` exports them.
"""
