"""The machine that work is done on: its devices, and the processes of one launch.

In: numbers and batches. Out: tensors on a device without waiting for it, work that goes on with less where memory runs out, and
what processes tell each other. Uses `errors` alone.
"""
