"""Steer a model along a direction or by features of a sparse autoencoder, and measure what that does at which strength.

In: a direction, or features with values, and where they act. Out: a `Steering` that is a context manager, an option of
`generate`, and a list of `Intervention`s for Replay; and sweeps of strengths with controls. Uses the model, replay and what
lies below them.
"""

from hooked_llava.steering.directions import mean_difference, random_direction
from hooked_llava.steering.steering import Steering, steer
from hooked_llava.steering.sweep import steering_sweep

__all__ = ["Steering", "mean_difference", "random_direction", "steer", "steering_sweep"]
