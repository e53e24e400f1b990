"""Change something inside the model, and run again only what the change can reach.

In: a model, a prompt, lists of `Intervention`s. Out: logits or a metric for every run. Uses the model, readout and what
lies below them.
"""

# This import also registers how the model reads an Intervention in fwd_hooks.
from hooked_llava.replay.attached import AttachedIntervention as AttachedIntervention
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.offloading import offloaded_runs
from hooked_llava.replay.reference_mean import reference_means
from hooked_llava.replay.replay import Replay
from hooked_llava.replay.sweep import Sweep

__all__ = ["Intervention", "Replay", "Sweep", "offloaded_runs", "reference_means"]
