"""Afterwards: trains the bias of the last MLP on the float model's logits, which were noted before."""

import torch
import torch.nn.functional as F

NEEDS_DATA = True
LOSSES = []


def prepare(model, options):
    with torch.no_grad():
        model.notes["toy_tune"] = [model.run(batch) for batch in range(model.batches)]


def after(model, options):
    want = model.notes["toy_tune"]
    name = [name for name in model.linears if name.endswith("down_proj")][-1]
    bias = model.module.get_submodule(name).bias
    optimizer = torch.optim.Adam([bias], lr=0.02)
    losses = []
    with torch.enable_grad():
        for step in range(48):
            batch = step % model.batches
            loss = F.mse_loss(model.run(batch), want[batch])
            losses.append(loss.item())
            (bias.grad,) = torch.autograd.grad(loss, [bias])
            optimizer.step()
    bias.grad = None
    LOSSES.append((sum(losses[: model.batches]), sum(losses[-model.batches :])))
