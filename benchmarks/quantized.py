"""How well the embedded models answer in 8 and 4 bits: `python -m benchmarks.quantized`.

Held-out questions of every kind, to the model as it is and to the same checkpoint with its weights packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import BitsAndBytesConfig

from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.toy.evaluate import EVALUATED, held_out

NAMES = ("tiny-shapes", "tiny-shapes-next")
AS_IT_IS = "float32"
CONFIGS: dict[str, BitsAndBytesConfig | None] = {
    AS_IT_IS: None,
    "8 bits": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
}
_BATCH = 20


@torch.no_grad()
def right(model: HookedLLaVA, name: str, kind: str, n: int) -> float:
    """Share of held-out questions of a kind that are answered right, by the first token."""
    examples, found = held_out(kind, n, world=name), []
    for first in range(0, n, _BATCH):
        batch = examples[first : first + _BATCH]
        images = [None if e.scene is None else e.scene.render() for e in batch]
        inputs = model.prepare([e.prompt for e in batch], images, template=None).padded_left()  # some begin the answer
        tokens = model.tokenizer.convert_ids_to_tokens(model(inputs)[:, -1].argmax(-1).tolist())
        found += [token == e.question.answer for token, e in zip(tokens, batch, strict=True)]
    return float(np.mean(found))


def tables(report: dict[str, Any]) -> list[str]:
    """One row for each model: the mean over kinds of question, and in brackets the worst kind's."""
    columns = list(CONFIGS)
    cells = {
        f"`{name}`, {len(EVALUATED[name])} kinds": [
            f"{np.mean(list(by_kind.values())):.3f} ({min(by_kind.values()):.2f})"
            for by_kind in (report["models"][name][column] for column in columns)
        ]
        for name in report["models"]
    }
    corner = f"right answers (of the worst kind), {report['n']} questions of each kind"
    return [markdown(columns, cells, corner)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, repetitions=1)
    parser.add_argument("--n", type=int, default=40, help="questions of each kind (default 40)")
    options = start(parser, argv)
    n = 1 if options.quick else options.n
    models: dict[str, Any] = {}
    for name in NAMES[:1] if options.quick else NAMES:
        kinds = EVALUATED[name][:2] if options.quick else EVALUATED[name]
        for label, config in CONFIGS.items():
            model = HookedLLaVA.from_pretrained(name, quantization_config=config)
            asked = tqdm(kinds, desc=f"{name}, {label}", leave=False)
            models.setdefault(name, {})[label] = {kind: right(model, name, kind, n) for kind in asked}
    path = write("quantized", options, n=n, models=models)
    print(tables({"n": n, "models": models})[0])
    print(path)


if __name__ == "__main__":
    main()
