"""What the analyses of a decision share: the run kept where the answer is read, its scores, gradients and occlusions."""

from hooked_llava.saliency.decision import Decision, Target, decide, resolve_target

__all__ = ["Decision", "Target", "decide", "resolve_target"]
