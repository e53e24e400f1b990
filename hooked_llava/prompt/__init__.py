"""A question and images become `Inputs`: token ids, pixels, and a `TokenMap` that says where everything is.

In: text, images, a processor. Out: `Inputs`, what every call of the model takes. Uses the architecture; knows no model.
"""

from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.token_map import TokenMap

__all__ = ["Inputs", "Positions", "TokenMap"]
