"""How well a lens reads each layer of the embedded models: `python -m benchmarks.tuned_lens`.

For every checkpoint a tuned lens is trained on questions about the embedded world, at the positions of the text. On other
questions it is compared with the logit lens with and without the final norm: KL(model || lens) in nats by layer, over all
positions of the text and at the last one, where the answer is read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.analysis import lens_kl, train_tuned_lens
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.evaluate import embedded
from hooked_llava.toy.gqa_tables import gqa_rows

TOKENS = ("text", "last")
_TRAINING_SEED = 1  # other questions than those that are measured
_STEPS, _N, _FEW_STEPS, _FEW = 200, 8, 5, 1
_TRAINED_ON = 40  # questions of each kind

Measured = dict[str, Any]


def measure(name: str, steps: int, n: int, trained_on: int) -> Measured:
    """One checkpoint: divergences by span, norm and layer."""
    begin = time.perf_counter()
    model = HookedLLaVA.from_pretrained(f"tiny-shapes-{name}")
    lens = train_tuned_lens(model, gqa_rows(trained_on, seed=_TRAINING_SEED), tokens="text", steps=steps)
    found = {tokens: lens_kl(model, gqa_rows(n), lens=lens, tokens=tokens) for tokens in TOKENS}
    return {
        "kl": {
            tokens: {str(norm): [float(f"{v:.4g}") for v in kl.sel(norm=norm).values] for norm in kl["norm"].values}
            for tokens, kl in found.items()
        },
        "layers": found["text"]["layer_name"].values.tolist(),
        "n_positions": {tokens: kl.attrs["n_positions"] for tokens, kl in found.items()},
        "forwards_of_training": lens.training["n_forward"],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def tables(checkpoints: Mapping[str, Measured]) -> list[str]:
    """For each span the divergence by layer: the mean over the checkpoints, and the lowest and highest of them."""
    first = next(iter(checkpoints.values()))
    made = []
    for tokens, by_norm in first["kl"].items():
        rows = {
            name: [
                _cell([one["kl"][tokens][norm][layer] for one in checkpoints.values()]) for layer in range(len(values))
            ]
            for norm, name in (("none", "raw"), ("final", "final norm"), ("tuned", "tuned"))
            for values in [by_norm[norm]]
        }
        made.append(markdown(first["layers"], rows, f"KL at `{tokens}`, nats, by layer"))
    return made


def _cell(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if max(values) < 0.0005:
        return "0"
    return f"{mean:.2g}" + ("" if len(values) == 1 else f" ({min(values):.2g} to {max(values):.2g})")


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"steps of training (default {_STEPS})")
    parser.add_argument("--n", type=int, default=_N, help=f"measured questions of each kind (default {_N})")
    options = start(parser, argv)
    names, trained_on = [folder.name for folder in embedded()], _TRAINED_ON
    if options.quick:
        options.steps, options.n, trained_on, names = _FEW_STEPS, _FEW, _FEW, names[:1]
    checkpoints = {name: measure(name, options.steps, options.n, trained_on) for name in names}
    print("\n\n".join(tables(checkpoints)))
    path = write(
        "tuned_lens", options, n=options.n, steps=options.steps, trained_on=trained_on, checkpoints=checkpoints
    )
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
