"""A few documents of our own for every local task, in the layout of real data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "hellaswag/validation.jsonl": [
        {
            "ind": index,
            "activity_label": "Baking bread",
            "ctx_a": f"A woman pours flour into bowl {index} [substep] slowly.",
            "ctx_b": "the woman",
            "ctx": "unused",
            "endings": ["stirs it.", "eats the bowl [title] whole.", "flies away.", "reads a book about  tides."],
            "label": str(index % 4),
        }
        for index in range(6)
    ],
    "lambada_openai/test.jsonl": [
        {"text": f"The {animal} sat by the door. Nobody let in the {animal}"} for animal in ("cat", "dog", "hen", "ox")
    ],
    "piqa/validation.jsonl": [
        {"goal": f"How to open jar {index}?", "sol1": "Turn the lid.", "sol2": "Sing to it.", "label": index % 2}
        for index in range(5)
    ],
    "winogrande/validation.jsonl": [
        {"sentence": "The cup fell off the shelf because the _ was loose.", "option1": "cup", "option2": "shelf"}
        | {"answer": str(1 + index % 2)}
        for index in range(3)
    ],
    "wikitext-2/test_document_level.jsonl": [
        {"page": f" = Heading {index} = \n \n It 's a test @-@ page , with {count} words : " + "word " * count}
        for index, count in enumerate((3, 40, 11))
    ],
    "arc_easy/test.jsonl": [
        {
            "id": str(index),
            "question": "What is wet?",
            "choices": {"text": ["Water", "Sand", "Iron"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[index % 3],
        }
        for index in range(4)
    ],
}


def write(folder: Path) -> Path:
    """Writes every file below `folder`, and returns it."""
    for name, documents in DOCUMENTS.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return folder
