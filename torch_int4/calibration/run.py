"""Quantization with data: one pass over a model, block by block.

The inputs of a block come from the quantized blocks before it. Statistics of an input are gathered once for all
linears that read it, and every stage of the recipe uses them. At any time one block is held in fp32, besides the
captured inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4 import recipes
from torch_int4.calibration.capture import Tape, evaluating
from torch_int4.calibration.data import Calibration
from torch_int4.calibration.fold_check import checked
from torch_int4.calibration.resume import Progress, fingerprint
from torch_int4.calibration.uses import count, places_of
from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.layouts.scales import ScaleFold
from torch_int4.recipes.parts import folds as folding
from torch_int4.recipes.parts.block import Block, Inputs, Linear
from torch_int4.recipes.parts.compose import round_block
from torch_int4.recipes.parts.folds import Fold
from torch_int4.support.progress import ProgressLine
from torch_int4.support.snapshot import values_kept
from torch_int4.weights.result import Result

Chosen = dict[str, tuple[nn.Module, int]]  # linears to quantize: name -> module, bits


class CalibratedPass:
    """Quantizes the linears of a model's blocks. Nothing is changed before `results` is iterated.

    Of a recipe with stages that prepare the model as a whole, the caller has them do so, and then calls `capture`.

    Args:
        model: the float model.
        chosen: the linears to quantize, those outside of blocks included, which are left to the caller.
        facts: for the `id` of a module, the scale folds that its family knows of.
        config: with the recipe.
        calibration: the data.
        progress: show a line with the time left; by default on a terminal.

    Raises:
        Int4Error: the data is unusable, or the model has no blocks that run one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Chosen,
        facts: dict[int, tuple[ScaleFold, ...]],
        config: Int4Config,
        calibration: Calibration,
        progress: bool | None = None,
    ) -> None:
        self.model, self.calibration = model, calibration
        self.recipe = recipes.parse(config.recipe)
        self.options = self.recipe.configure(config.weights)
        self.notices: list[str] = []
        self.names, _ = find_blocks(model, chosen)
        self.windows = calibration.windows(model)
        self.progress = progress
        self.saved: Progress | None = None
        if calibration.resume is not None:
            bits = {name: bits for name, (_, bits) in chosen.items()}
            notes = (calibration.batch, calibration.seed, self.names, bits)
            mark = fingerprint(self.options, self.windows, _tensors(model), *notes)
            self.saved = Progress(calibration.resume, mark, self.recipe.extras)
        # A model that is going to be prepared is looked at again afterwards; one window shows whether it can be run.
        self._capture(chosen, facts, self.windows[:1] if self.recipe.preparing else self.windows)

    def capture(self, chosen: Chosen, facts: dict[int, tuple[ScaleFold, ...]]) -> None:
        """Capture anew, of a model that stages have prepared as a whole since; arguments as for the constructor."""
        self._capture(chosen, facts, self.windows)

    def _capture(self, chosen: Chosen, facts: dict[int, tuple[ScaleFold, ...]], windows: Tensor) -> None:
        self.facts = facts
        self.names, blocks = find_blocks(self.model, chosen)
        self.chosen = self._of_one_block(chosen)
        # On a large model the arguments of all blocks take a while, before any block is done.
        with self._line(len(blocks), "arguments of") as line:
            self.tape = Tape(self.model, blocks, windows, self.calibration.batch, line.reach)
        self.clean: Tensor | None = self.tape.hidden.clone() if self.recipe.needs_targets else None
        if self.calibration.offload is not None:
            self.tape.offload(self.calibration.offload, "quantized.bin")

    def results(self) -> Iterator[tuple[str, Result]]:
        """Names and results, block after block; the caller replaces each linear before it asks for the next one."""
        done = self.saved.done if self.saved else 0
        with evaluating(self.model), self._line(len(self.tape.blocks), done=done) as line:
            for index, module in enumerate(self.tape.blocks):
                if index < done:
                    yield from self._restore(index, module, last=index == done - 1)
                    continue
                found, rest = self._quantize(index, module)
                yield from found.items()
                self.tape.advance(index, module)
                if self.saved is not None:
                    self.saved.save(index, found, rest, self._states())
                line.advance()

    def _of_one_block(self, chosen: Chosen) -> Chosen:
        """The linears to quantize without those that several blocks run: one block's data does not speak for them."""
        where = places_of(self.model.named_modules(remove_duplicate=False), self.names)
        several = [name for name, (linear, _) in chosen.items() if len(where[id(linear)]) > 1]
        self.notices += [f"{name}: several blocks run it, so it is rounded to nearest" for name in several]
        return {name: entry for name, entry in chosen.items() if name not in several}

    def _line(self, blocks: int, what: str = "", done: int = 0) -> ProgressLine:
        title = f"{self.recipe.name}, {what}".strip()
        return ProgressLine(blocks, "blocks", title=title, show=self.progress, done=done)

    def _states(self) -> dict[str, Tensor]:
        return {"hidden": self.tape.hidden, **({} if self.clean is None else {"clean": self.clean})}

    def _restore(self, index: int, module: nn.Module, *, last: bool) -> Iterator[tuple[str, Result]]:
        assert self.saved is not None
        results, rest = self.saved.load(index)
        for name in results:
            del self.chosen[name]
        _put_back(module, rest)
        yield from results.items()
        if last:
            states = self.saved.states()
            self.tape.hidden.copy_(states["hidden"])
            if self.clean is not None:
                self.clean.copy_(states["clean"])

    def _quantize(self, index: int, module: nn.Module) -> tuple[dict[str, Result], dict[str, Tensor]]:
        """Results of a block's linears, and what else of the block is to be kept. The block is in fp32 meanwhile, and
        after an error it is what it was."""
        with values_kept(module):
            return self._quantize_in_fp32(index, module)

    def _quantize_in_fp32(self, index: int, module: nn.Module) -> tuple[dict[str, Result], dict[str, Tensor]]:
        dtypes = {name: tensor.dtype for name, tensor in _tensors(module)}
        module.float()
        block = self._block(index, module)
        self._advance_clean(index, module)
        if self.recipe.folds_scales:
            block.folds = self._folds(index, block)
        if self.options.clip or self.recipe.needs_inputs:
            self._gather(index, block)
        folds = block.folds
        for stage in self.recipe.transforms:
            block.folds = list(folds)
            stage.transform(block, self.options)
            block.folds = []  # the rounding gets none that a transform has used
        found = round_block(self.recipe, block, self.options)
        self.notices += [notice for notice in block.notices if notice not in self.notices]
        quantized = {f"{linear.path}.weight" for linear in block.linears}
        for name, tensor in _tensors(module):
            tensor.data = tensor.data.to(dtypes[name])
        return found, {name: tensor.detach() for name, tensor in _tensors(module) if name not in quantized}

    def _block(self, index: int, module: nn.Module) -> Block:
        name = self.names[index]
        own = [full for full in self.chosen if full.startswith(name + ".")]
        # popped, for the float weight of a linear has to be free once the caller has replaced it
        linears = [Linear(full, full[len(name) + 1 :], *self.chosen.pop(full)) for full in own]
        generator = torch.Generator().manual_seed(self.calibration.seed * 1_000_003 + index)

        def run(batch: int, parameters: dict[str, Tensor]) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(module, parameters, args, kwargs)

            return self.tape.run(index, batch, call if parameters else module)

        def targets(batch: int) -> Tensor:
            assert self.clean is not None
            return self.clean[self.tape.spans[batch]].float()

        return Block(name, module, linears, [], run, targets, self.tape.batches, generator)

    def _folds(self, index: int, block: Block) -> list[Fold]:
        """The scales that may be moved in a block: what its family knows and no other block has, checked on a batch."""
        where = places_of(self.model.named_parameters(remove_duplicate=False), self.names)
        known = []
        for name, module in block.module.named_modules():
            for fold in folding.find(module, f"{block.name}.{name}".rstrip("."), self.facts.get(id(module), ())):
                if all(len(where[id(tensor)]) < 2 for tensor in fold.tensors()):
                    known.append(fold)
                    continue
                source, *targets = (part[len(block.name) + 1 :] for part in fold.names)
                block.notices.append(
                    f"{self.options.recipe}: scales of {', '.join(targets)} cannot be folded into {source} in "
                    f"{block.name}: several blocks share their weights"
                )
        return checked(known, block, lambda: self.tape.run(index, 0, block.module), self.options.recipe)

    @torch.no_grad()
    def _advance_clean(self, index: int, module: nn.Module) -> None:
        """Run the float block on the float model's states: its outputs are what stages aim at."""
        if self.clean is not None:
            for batch, span in enumerate(self.tape.spans):
                self.clean[span] = self.tape.run(index, batch, module, self.clean).to(self.clean.dtype)

    @torch.no_grad()
    def _gather(self, index: int, block: Block) -> None:
        """Statistics of all that each linear is given, however often it runs; linears that are given the same tensors
        share them."""
        seen: list[list[Tensor]] = [[] for _ in block.linears]  # kept, so that no tensor reuses another's memory

        def hook(inputs: list[Tensor]) -> Any:
            return lambda module, args: inputs.append(args[0])

        handles = [
            linear.module.register_forward_pre_hook(hook(inputs))
            for linear, inputs in zip(block.linears, seen, strict=True)
        ]
        try:
            for batch in range(self.tape.batches):
                block.run(batch, {})
                count(block.linears, seen)
                for inputs in seen:
                    inputs.clear()
        finally:
            for handle in handles:
                handle.remove()
        for linear in block.linears:
            if linear.inputs is None:  # an expert that no token was sent to
                linear.inputs = Inputs(linear.weight.shape[1])
                block.notices.append(f"{linear.name}: no calibration token reached it, so it is rounded to nearest")


def find_blocks(model: nn.Module, chosen: Chosen) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the blocks: of all lists of modules the one that holds most weights to quantize, before
    others one of the decoder, which text goes through while towers for images wait.

    Raises:
        Int4Error: there is no such list, or a block occurs in it twice.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    getter = getattr(model, "get_decoder", None)
    decoder = getter() if callable(getter) else None
    inside_of = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    best, most = None, (False, 0)
    for name, blocks in lists:
        if any(name != other and name.startswith(other + ".") for other, _ in lists):
            continue  # a list within a block
        inside = [linear for full, (linear, _) in chosen.items() if full.startswith(name + ".")]
        weights = sum(linear.weight.numel() for linear in inside if isinstance(linear.weight, Tensor))
        if weights and (id(blocks) in inside_of, weights) > most:
            best, most = (name, blocks), (id(blocks) in inside_of, weights)
    if best is None:
        raise Int4Error(
            f"calibration: {type(model).__name__} has no list of blocks with linears to quantize; "
            "use a recipe without calibration, such as recipe='rtn'"
        )
    name, blocks = best
    modules = list(blocks)
    if len(set(map(id, modules))) < len(modules):
        raise Int4Error(f"calibration: {name} runs one block several times; use recipe='rtn'")
    return [f"{name}.{index}" for index in range(len(modules))], modules


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


@torch.no_grad()
def _put_back(module: nn.Module, rest: dict[str, Tensor]) -> None:
    own = dict(_tensors(module))
    for name, tensor in rest.items():
        own[name].data = tensor.to(own[name].dtype)
