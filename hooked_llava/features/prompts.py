"""What a larger model is asked about a feature, and how its replies are read.

The first three prompts are those of Zhang et al. (2411.14982), as their released code has them (EvolvingLMMs-Lab/multimodal-sae,
MIT license: image_explainer/prompts.py, segment/label_refiner.py, prompt.py). Here the system text stands before the guidelines,
in one message, and the images follow. The last prompt is ours.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, get_args

from hooked_llava.options.explainers import UNABLE

EXPLAIN_PROMPT = r"""You are a meticulous AI researcher conducting an important investigation into a certain neuron in a vision language model. Your task is to analyze the neuron and provide an explanation that thoroughly encapsulates its behavior.

Guidelines:

You will be given a list of image examples on which the neuron activates. The region where the neuron activates on has been highlighted and the other regions are masked out. These images may or may not share similar visual patterns that related to the feature that is activated.

Your task is to
- Try to produce a concise final description. Simply describe the features that activate the neuron, and what its role might be based on the images.
- Please output your description in a concise description way, such as \"The train\", \"The sunglasses\", that directly depicts the object where the region is activated.
- When output the explanations, please first output \"[EXPLANATION]:\" and then follows your explanations.
- The last line of your response must be the formatted explanation.
- If it is unable to determine the shared visual features, you can simply output \"[EXPLANATION]: Unable to produce descriptions\"
"""  # noqa: E501
REFINE_PROMPT = """[GUIDELINES]
You are an AI assistant tasked with extracting meaningful labels from descriptions. You will receive a description that may contain references to various entities, and your job is to rephrase and extract the key entities from the text. You will encounter several types of descriptions, and examples for each case are provided below. Please follow the given instructions carefully.

When presenting your answer, first output "[ANSWER]", followed by the extracted entity. Thank you!

Case 1: Good Description
In this case, the description clearly identifies the entity.
Examples:

Description: The cell phone.
Output: [ANSWER] The cell phone

Description: The letters on the shipping containers.
Output: [ANSWER] The letters on the shipping containers

Case 2: Description includes additional words
In this case, the description contains more information than needed. Extract only the key entity.
Examples:

Description: The images all display different models of Honda vehicles, suggesting the neuron is activated by the presence of Honda vehicles or the Honda logo.
Output: [ANSWER] Honda vehicles

Description: The neuron seems to be reacting to the word "ORD" on the billboard. It could be part of a larger word or phrase, but the neuron specifically highlights the letters "ORD." This suggests that the neuron might be specialized in recognizing or processing certain words or characters in images. The activation across the images indicates that the neuron is consistent in its response to textual elements, particularly those that include the "ORD" sequence.
Output: [ANSWER] The word "ORD"

Case 3: Bad Description
In this case, the description does not provide sufficient or valid information.
Examples:

Description: Unable to produce descriptions.
Output: Unable to produce descriptions


[Description]
{description}
"""  # noqa: E501
CONCEPT_PROMPT = """
[GUIDELINES]
You are an AI assistant tasked with assigning a single label based on the given input text. Each input will contain a description of a visual feature, which you must categorize into one of the following classes:

scene - Describes a scene or environment.
object - Describes an object or entity.
part - Describes a part or aspect of an object.
material - Describes a material or substance that constitutes other objects.
texture - Describes the texture of an object.
color - Describes the color of an object.

Please provide only the class label from the list [scene, object, part, material, texture, color] with no additional text. Only one label should be chosen. Make sure you only choose from the classes listed above and do not output any other classes.

Categorize the following description:

{description}

ANSWER:
"""  # noqa: E501
DETECT_PROMPT = 'Does the image show "{description}"? Answer yes or no, with nothing else.'
Concept: TypeAlias = Literal["scene", "object", "part", "material", "texture", "color"]
"""The classes of Network Dissection (Bau et al., 1704.05796)."""


def filled(prompt: str, description: str) -> str:
    """A prompt about a description."""
    return prompt.replace("{description}", description)


def is_unable(text: str) -> bool:
    """Whether a reply says that nothing is shared.

    >>> is_unable("Unable to produce descriptions."), is_unable("the cable")
    (True, False)
    """
    return UNABLE.lower() in text.lower()


def read_explanation(reply: str) -> str:
    """What comes after the last "[EXPLANATION]:" of a reply; "" if there is none.

    >>> read_explanation("They all show a train. [EXPLANATION]: The train"), read_explanation("The train")
    ('The train', '')
    """
    return _after("EXPLANATION", reply)


def read_answer_phrase(reply: str) -> str:
    """What comes after the last "[ANSWER]" of a reply, on that line; "" if there is none.

    >>> read_answer_phrase("[ANSWER] Honda vehicles"), read_answer_phrase("Unable to produce descriptions")
    ('Honda vehicles', '')
    """
    return _after("ANSWER", reply).partition("\n")[0]


def read_concept(reply: str) -> Concept | None:
    """The one class that a reply names; None if it names none, or several.

    >>> read_concept("Color."), read_concept("ANSWER: object"), read_concept("a part of an object")
    ('color', 'object', None)
    """
    words = set(re.findall(r"[a-z]+", reply.lower().replace("colour", "color")))
    found = [concept for concept in get_args(Concept) if concept in words]
    return found[0] if len(found) == 1 else None


def read_yes_or_no(reply: str) -> bool | None:
    """Whether a reply says yes; None if it says neither, or both.

    >>> read_yes_or_no("Yes, it does."), read_yes_or_no("no"), read_yes_or_no("I cannot tell")
    (True, False, None)
    """
    words = set(re.findall(r"[a-z]+", reply.lower()))
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def _after(mark: str, reply: str) -> str:
    _, found, rest = reply.rpartition(f"[{mark}]")
    return rest.removeprefix(":").strip() if found else ""
