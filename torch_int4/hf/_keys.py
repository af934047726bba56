"""Names of tensors in a checkpoint and in a model: the renamings that transformers would make while loading."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

# The linears of experts whose weights transformers puts into one tensor, in the order in which it concatenates them.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_EXPERT = re.compile(r"\.(\d+)\.[^.]+\.[^.]+$")
_LINEAR = re.compile(r"(?P<module>.+)\.(?P<number>\d+)\.(?P<linear>gate_proj|up_proj|down_proj)\.(?P<tensor>[^.]+)")


class Names:
    """From the names of a checkpoint to those of a model on the meta device, before linears are taken out of it."""

    def __init__(self, model: Any, conversions: Iterable[Any]) -> None:
        conversions = list(conversions)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = model.state_dict()
        self._wanted = list(self._known)
        self._experts: set[str] = set()
        self._ignored = ""

    def target(self, key: str) -> str | None:
        """The model's name of a tensor; None where several tensors become one, or one becomes several."""
        expert = self._of_expert(key)
        if expert is not None and expert[0] in self._experts:
            return ".".join(expert)
        renamed, pattern = self._rename(key, self._renamings, self._converters)
        if renamed not in self._known and key in self._known:
            renamed, pattern = self._rename(key, [], [])
        if renamed not in self._known and key.endswith(".weight"):  # a renaming may have added that to a bare name
            bare, pattern_of_bare = self._rename(key.removesuffix(".weight"), self._renamings, self._converters)
            renamed, pattern = (bare, pattern_of_bare) if bare in self._known else (renamed, pattern)
        return renamed if pattern is None else None

    def linear(self, module: str) -> str | None:
        """The model's name of a linear whose weight is quantized in a checkpoint; None where several become one.

        What transformers does to the values of one float weight (vocabularies without padding) is done already.
        """
        key = f"{module}.weight"
        target = self.target(key) or next(
            (x for x in (self._rename(key, self._renamings, [])[0], key) if x in self._known), None
        )
        return target.removesuffix(".weight") if target is not None else None

    def stored_by_expert(self, source: Iterable[str]) -> set[str]:
        """Names of the experts modules whose weights a checkpoint has one by one, expert by expert."""
        found = (self._of_expert(f"{key.rpartition('.')[0]}.weight") for key in source)
        return {expert[0] for expert in found if expert is not None}

    def has_experts(self, module: str) -> bool:
        """Whether the model keeps all experts of this module in one tensor, before any are linears."""
        return f"{module}.down_proj" in self._known

    def split(self, model: Any, experts: set[str]) -> None:
        """Takes in that these experts modules of the model have linears now."""
        self._experts, self._wanted = experts, list(model.state_dict())

    def _of_expert(self, key: str) -> tuple[str, str, str, str] | None:
        """The experts module, the number, the linear and the tensor that a name of a checkpoint stands for, if any."""
        number = _EXPERT.search(key)
        if number is None:
            return None
        renamed, pattern = self._rename(key, self._renamings, self._converters)
        module, _, stack = renamed.rpartition(".")
        if pattern is None:  # the names that experts have once they are linears
            match = _LINEAR.fullmatch(renamed)
            known = match is not None and f"{match['module']}.down_proj" in self._known
            return (match["module"], match["number"], match["linear"], match["tensor"]) if match and known else None
        for converter in self._converters:
            if pattern in converter.source_patterns and stack in PARTS:
                linears = PARTS[stack]
                if len(converter.source_patterns) == len(linears) and renamed in self._known:
                    return module, number[1], linears[converter.source_patterns.index(pattern)], "weight"
        return None

    def missing(self, model: Any, keys: Iterable[str], quantized: Iterable[str]) -> list[str]:
        """Names of the model that a checkpoint lacks, given the linears that are quantized in it.

        Where several tensors of a checkpoint become one, transformers reports what is missing, and nothing is here.
        """
        targets = [self.target(key) for key in keys]
        if None in targets:
            return []
        found = {
            *targets,
            *(f"{name}.weight" for name in quantized),
            *(getattr(model, "all_tied_weights_keys", None) or ()),
        }
        patterns = model._keys_to_ignore_on_load_missing or ()
        missing = [name for name in self._wanted if name not in found]
        present = {name.split(".")[0] for name in found if name is not None}
        return [
            name
            for name in missing
            if not any(re.search(one, name) for one in patterns) and not self._is_new_head(model, name, present)
        ]

    def is_of_another_head(self, model: Any, name: str) -> bool:
        """Whether a tensor or module of the checkpoint belongs to a part beside the base model that this one lacks."""
        first = name.split(".")[0]
        return first not in model._modules and first != self._prefix

    def _is_new_head(self, model: Any, name: str, present: set[str]) -> bool:
        """Whether a tensor belongs to a part beside the base model of which the checkpoint has nothing at all.

        In a checkpoint of this very class it should have something: a shard may be missing.
        """
        first = name.split(".")[0]
        if type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
            return False
        return model.base_model is not model and first != self._prefix and first not in present

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rename_source_key(
            key, renamings, converters, base_model_prefix=self._prefix, meta_state_dict=self._known
        )
        return renamed

    def ignore(self, model: Any, keys: Iterable[str]) -> None:
        """Have transformers pass silently over tensors that are read here."""
        names = {name for key in keys for name in (key, self._rename(key, self._renamings, self._converters)[0])}
        if names:
            self._ignored = "^(?:" + "|".join(re.escape(name) for name in sorted(names)) + ")$"
            model._keys_to_ignore_on_load_unexpected = {*self._given(model), self._ignored}

    def heed(self, model: Any) -> None:
        """Undo `ignore`."""
        model._keys_to_ignore_on_load_unexpected = self._given(model) - {self._ignored}

    def _given(self, model: Any) -> set[str]:
        return set(model._keys_to_ignore_on_load_unexpected or ())
