"""Labelled arrays that say where they come from, their files, and their statistics.

In: tensors and the facts of a run. Out: xarray arrays whose attributes name model, prompts, method and forward passes;
safetensors files; areas under curves with intervals. Uses readout and what lies below it.
"""

from hooked_llava.results.arrays import load, recovered, save, stack

__all__ = ["load", "recovered", "save", "stack"]
