"""The prompt by which a patchscope reads an activation, unless another is given."""

IDENTITY = "cat->cat; 1135->1135; hello->hello; ?->"
"""The identity prompt of Ghandeharioun et al., arXiv 2401.06102: the activation is put in the place of the question mark."""
