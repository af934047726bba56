"""The plug-in by which transformers' `from_pretrained` and `save_pretrained` know int4."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

from torch_int4 import recipes
from torch_int4.checkpoint.stored import Stored, StoredConfig
from torch_int4.config import OF_RUNNING, Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats.parts.files import Checkpoint
from torch_int4.hf._fill import Reading, fill, plan_quantization, plan_reading
from torch_int4.hf._keys import Names
from torch_int4.hf._stacked import stacks, unstacked
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import experts
from torch_int4.patching.loading import leave_floats, leave_hooked
from torch_int4.patching.patcher import carry_out
from torch_int4.patching.plan import Survey, decide
from torch_int4.patching.report import PatchReport
from torch_int4.weights import panel_files as panels


class Int4Quantizer(HfQuantizer):
    """Reads or quantizes linears itself, one after the other, while transformers loads the rest of a model.

    Placeholders stand for the linears while transformers loads, places and ties everything else. After that each
    weight is read from its file, quantized (or taken over from an int4 format), packed and put into its place; then
    the model is patched as any other is: what was left is converted, linears are merged, attention is fused.
    """

    requires_calibration = False
    quantization_config: Int4Config

    def __init__(self, quantization_config: Int4Config, **kwargs: Any) -> None:
        self.stored: Stored | None = None
        if isinstance(quantization_config, StoredConfig):
            self.stored, quantization_config = quantization_config.stored, quantization_config.plain
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized and self.stored is None:
            raise Int4Error(
                "quantization_config of config.json: is torch_int4's but does not say how weights are stored; the "
                "checkpoint was not written by save_pretrained"
            )
        self._files: list[Any] | None = None
        self._survey: Survey | None = None
        self._reading: Reading | None = None
        self._names: Names | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses devices that are no CPU."""
        devices = device_map.values() if isinstance(device_map, dict) else []
        for device in devices:
            if str(device) not in ("cpu", "disk", "meta"):
                raise Int4Error(f"device_map: {device!r} cannot hold int4 weights, which need a CPU; use 'cpu', 'disk'")

    def update_device_map(self, device_map: Any) -> Any:
        """Keeps "auto" off accelerators."""
        if isinstance(device_map, (int, torch.device)) and str(torch.device(device_map).type) != "cpu":
            raise Int4Error(f"device_map: {device_map!r} cannot hold int4 weights; kernels run on CPUs")
        return device_map

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Only the CPU and the disk can hold int4 weights."""
        return {device: size for device, size in max_memory.items() if device in ("cpu", "disk")}

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Remembers the files; weights are planned when the names of their tensors are known."""
        self._files = kwargs.get("checkpoint_files")
        super().preprocess_model(model, dtype=dtype, **kwargs)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Takes the linears that are read here out of transformers' hands, before it looks for their weights."""
        files, self._files = self._files, None
        if files is not None and Checkpoint.serves(files):
            source, self._names = Checkpoint(files), Names(model, weight_conversions)
            apart, together = self._names.stored_by_expert(source), stacks(source, self._names)
            split = experts.split(model, self.quantization_config, {*apart, *together})
            self._names.split(model, split.names)
            source = unstacked(source, model, {name: together[name] for name in together if name in split.names})
            self._survey = Survey(model)
            if self.stored is not None:
                config = self.quantization_config
                self._reading = plan_reading(self._survey, self.stored, source, self._names, config)
            else:
                self._reading = plan_quantization(self._survey, self.quantization_config, source, self._names)
            self._names.ignore(model, self._reading.all_keys())
        elif self.stored is not None:
            raise Int4Error("a quantized checkpoint must be safetensors files; pickled ones are not read")
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        survey, self._survey = self._survey, None
        reading, self._reading = self._reading, None
        config = self.quantization_config
        report = PatchReport(config)
        if reading is not None and self._names is not None:
            report.linears = fill(model, reading, config, self._key(reading))
            reading.source.close()
            self._names.heed(model)
        foreign = self.stored is not None and self.stored.foreign
        whole = None if foreign else experts.split(model, config)  # those that the files hold in one tensor
        if survey is None or survey.model is not model or (whole and whole.names) or not survey.holds():
            survey = Survey(model)
        if foreign:
            config = leave_floats(survey, config)
        config = leave_hooked(survey, config)
        report.config = config
        plan = decide(survey, config)
        plan.skipped += whole.skipped if whole else []
        carry_out(plan, report, progress=False)
        model.config.quantization_config = config
        return model

    def _key(self, reading: Reading) -> str | None:
        """The key of this model's panels; None where none are kept."""
        folder = panels.cache_folder()
        if folder is None or (self.stored is None and recipes.parse(self.quantization_config.recipe).extras):
            return None  # panels hold no extras, and those of weights that are rounded here would be found anew
        made = {name: [*place.shape, place.kind.bits, str(place.dtype)] for name, place in reading.pending.items()}
        how = {} if self.stored is None else asdict(self.stored.settings)
        if self.stored is None or not self.stored.form.on_grid(self.stored.settings):
            how |= self.quantization_config.to_dict()
        kept = {key: value for key, value in how.items() if key not in OF_RUNNING}
        return panels.key_of(reading.source.files, [metadata.version("torch-int4"), kept, made, reading.keys], folder)

    def is_serializable(self) -> bool:
        """Yes: models that were loaded save themselves as patched ones do."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The operators have fake kernels."""
        return True

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Int4Linear):
                raise Int4Error(f"{name}: cannot become float again in place; load the float checkpoint instead")
        return model
