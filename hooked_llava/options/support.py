"""What every public call needs of the model and of its prompts: refused by the call, said beforehand by `model.describe`.

A bare name stands for the call with the least that it can be asked. What an option needs besides stands under a name of its
own, such as "path_patching(receivers='mlp')".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hooked_llava.options.markdown import markdown_rows
from hooked_llava.options.needs import NEEDS, Need
from hooked_llava.options.patch_maps import PATCH_MAPS

CALLS: dict[str, tuple[Need, ...]] = {
    # the model
    "prepare": ("processor",),
    "generate": ("processor",),
    "save_pretrained": ("hf_config",),
    "Replay": ("no_functions",),
    # analysis
    "ablate_heads": ("no_functions",),
    "activation_patching": ("no_functions",),
    "activation_patching(hook='hook_image_embed')": ("images_alike", "no_functions"),
    "answer_maps": ("one_prompt", "images_alike"),
    "answer_probability": ("processor",),
    "answer_signs": ("one_image",),
    "answer_without": ("one_prompt", "no_functions"),
    "answer_without(patches=...)": ("one_prompt", "images_alike", "no_functions"),
    "attention_contribution": ("one_prompt",),
    "attention_contribution(constraint='words')": ("one_prompt", "words_known"),
    "attention_knockout": ("no_functions",),
    "attention_knockout(edges='image->last')": ("image_span", "no_functions"),
    "attention_knockout(edges='question->last')": ("question_span", "no_functions"),
    "attribution_patching": (),
    "causal_trace": ("one_prompt", "no_functions"),
    "causal_trace(constraint='words')": ("one_prompt", "words_known", "no_functions"),
    "causal_trace(corruption='words')": ("one_prompt", "processor", "words_known", "no_functions"),
    "deletion_curves": ("one_prompt", "images_alike", "no_functions"),
    "edge_attribution": (),
    "faithfulness_curve": ("separate_mlps", "no_functions"),
    "head_readings": ("one_prompt",),
    "head_scores": (),
    "heads_by_attention": (),
    "heads_by_attention(span='image')": ("image_span",),
    "image_attention": ("one_prompt", "images_alike"),
    "information_storage": (),
    "layer_scores": (),
    "logit_attribution": (),
    "logit_attribution(by='patch')": ("images_alike",),
    "logit_lens": (),
    "neuron_scores": (),
    "next_tokens": (),
    "output_knockout": ("no_functions",),
    "output_knockout(outputs='mlp at question')": ("question_span", "no_functions"),
    "patch_importance": ("images_alike",),
    "patchscope": ("one_prompt", "no_functions"),
    "patchscope(target=None)": ("one_prompt", "no_functions", "identity_prompt"),
    "path_patching": ("no_functions",),
    "path_patching(receivers='mlp')": ("separate_mlps", "no_functions"),
    "position_scores": (),
    "sink_positions": ("images_alike",),
    # pairs of prompts
    "blank_image": ("an_image",),
    "gaussian_noise": ("one_prompt",),
    "other_image": ("an_image",),
    "other_image(pool=images)": ("an_image", "processor"),
    "other_question": ("one_prompt", "originals_known", "processor"),
    "swapped_objects": ("one_prompt", "original_image", "processor"),
    "without_object": ("one_prompt", "original_image", "processor"),
    # weights
    "multedit": ("floating_point", "no_functions"),
    "multedit(constraint='words')": ("floating_point", "words_known", "no_functions"),
    "rome": ("floating_point", "no_functions"),
    "memit": ("floating_point", "no_functions"),
    "finetune": ("floating_point", "no_functions"),
    "edit_sweep": ("floating_point", "no_functions"),
    "key_covariance": ("floating_point",),
    "key_covariances": (),
    "keep_prompts": (),
    # directions and features
    "steering_sweep": ("no_functions",),
    "mean_difference": (),
    "feature_attribution": ("one_prompt",),
}
"""By name, as it is typed, in the order in which they are asked."""


def needs_of_calls() -> dict[str, tuple[Need, ...]]:
    """All calls, with one for each method of `patch_importance`.

    >>> needs_of_calls()["patch_importance(method='occlusion')"]
    ('images_alike', 'no_functions')
    """
    return CALLS | {f"patch_importance(method={name!r})": one.needs for name, one in PATCH_MAPS.items()}


def shortest(calls: Sequence[str]) -> list[str]:
    """Calls without their options where the call with the least is among them.

    >>> shortest(["path_patching", "path_patching(receivers='mlp')", "answer_without(patches=...)"])
    ['path_patching', 'answer_without(patches=...)']
    """
    return [call for call in calls if call == (name := call.partition("(")[0]) or name not in calls]


def markdown_table(calls: Mapping[str, tuple[Need, ...]] | None = None) -> str:
    """What is needed, and the calls that need it, as a table for the documentation.

    >>> markdown_table().splitlines()[4].startswith("| blocks in which the MLP has an input of its own")
    True
    """
    calls = needs_of_calls() if calls is None else calls
    rows = []
    for need, meaning in NEEDS.items():
        own = shortest([call for call, needs in calls.items() if need in needs])
        rows.append((meaning, ", ".join(f"`{call}`" for call in own)))
    return markdown_rows(("needed", "by"), rows)
