"""Change something inside the model, and run again only what the change can reach."""

from hooked_llava.interventions.attached import AttachedIntervention as AttachedIntervention
from hooked_llava.interventions.intervention import Intervention
from hooked_llava.interventions.reference_mean import reference_means
from hooked_llava.interventions.replay import Replay
from hooked_llava.interventions.sweep import Sweep

__all__ = ["Intervention", "Replay", "Sweep", "reference_means"]
